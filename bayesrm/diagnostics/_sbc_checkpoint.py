"""Replicates on disk, a line each, so that a long calibration survives being stopped."""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import PersistenceError
from ..likelihoods.base import source_hash

_FORMAT = "bayesrm-sbc-2"
#: Where an object lies in memory, which says nothing in another process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclasses.dataclass(frozen=True)
class Replicate:
    """What one simulation gave.

    Attributes:
        ranks: Rank of the truth by quantity; `None` when the engine refused.
        refusal: Why it did.
        converged: Whether the fit says it converged.
        independent: Whether the draws were as good as independent.
    """

    ranks: dict[str, int] | None
    refusal: str | None = None
    converged: bool = True
    independent: bool = True


class Checkpoint:
    """A file of replicates of one calibration; without a path nothing is kept.

    Args:
        path: The file, made when it is absent.
        identity: What tells this calibration from others.

    Raises:
        PersistenceError: The file holds another calibration, or cannot be read.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self.replicates: list[Replicate] = []
        if self._path is None:
            return
        header = json.dumps({"format": _FORMAT} | identity)
        try:
            lines = self._path.read_text().split("\n") if self._path.exists() else []
            # A line without an end was being written when the run was stopped.
            lines = lines[:-1]
            if lines and lines[0] != header:
                raise PersistenceError(
                    f"`checkpoint` {self._path} holds another calibration ({_differences(lines[0], header)}); give "
                    "another file"
                )
            self.replicates = [Replicate(**json.loads(line)) for line in lines[1:]]
            self._path.write_text("\n".join([header, *lines[1:], ""]))
        except (OSError, ValueError, TypeError) as error:
            raise PersistenceError(f"`checkpoint` {self._path} cannot be used: {error}") from error

    def add(self, replicate: Replicate) -> None:
        """Keeps the next replicate."""
        self.replicates.append(replicate)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(replicate)) + "\n")


def described(value: Any, within: tuple[int, ...] = ()) -> Any:
    """What tells a program, an engine or a function from others, the same in every process, as JSON values.

    Functions and classes of your own are known by their source, functions also by their defaults and by the variables
    that they enclose; what they read from their module is not seen. Classes of this package are known by name.

    Args:
        value: What is described.
        within: Identities of the objects that hold it, at which a circle ends.
    """
    if id(value) in within:
        return "itself"
    inner = functools.partial(described, within=(*within, id(value)))
    if isinstance(value, Mapping):
        return {str(key): inner(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [inner(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(inner(v)) for v in value)
    if isinstance(value, np.ndarray | torch.Tensor):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        return {"array": _digest(str((array.dtype, array.shape)).encode() + np.ascontiguousarray(array).tobytes())}
    if isinstance(value, functools.partial):
        return {"partial": inner(value.func), "given": [inner(value.args), inner(value.keywords)]}
    if inspect.ismethod(value):
        return {"method": inner(value.__func__), "of": inner(value.__self__)}
    if inspect.isfunction(value):
        given = [inner(v) for v in (value.__defaults__, value.__kwdefaults__, _enclosed(value))]
        return {"function": value.__qualname__, "source": _source(value) or _code_digest(value), "given": given}
    if inspect.isclass(value):
        return {"class": value.__qualname__, "source": _source(value)}
    if dataclasses.is_dataclass(value):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
        return {"type": type(value).__qualname__, "source": _source(value), "fields": fields}
    if getattr(type(value), "__repr__", None) is object.__repr__:
        state = inner(getattr(value, "__dict__", {}))
        return {"type": type(value).__qualname__, "source": _source(value), "state": state}
    return _ADDRESS.sub("", repr(value))


def _source(value: Any) -> str:
    own = (value if inspect.isclass(value) or inspect.isfunction(value) else type(value)).__module__
    return "" if own.startswith(f"{__package__.split('.')[0]}.") else source_hash(value)


def _enclosed(function: Any) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            found[name] = None  # The variable has no value yet.
    return found


def _code_digest(function: Any) -> str:
    """A digest of what a function does, where its text is not at hand: typed at a prompt, for instance."""
    code = function.__code__
    return _digest(
        repr((code.co_code, code.co_names, code.co_varnames, _ADDRESS.sub("", repr(code.co_consts)))).encode()
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _differences(found: str, expected: str) -> str:
    """The names of the entries of a header that differ."""
    kept = json.loads(found)
    if not isinstance(kept, dict) or kept.get("format") != _FORMAT:
        return f"not of format {_FORMAT}: {found[:80]}"
    own = json.loads(expected)
    return "another " + ", ".join(f"`{key}`" for key in sorted(kept | own) if kept.get(key) != own.get(key))

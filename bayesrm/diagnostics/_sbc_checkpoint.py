"""Replicates on disk, a line each, so that a long calibration survives being stopped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import PersistenceError

_FORMAT = "bayesrm-sbc-1"


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
                    f"`checkpoint` {self._path} holds another calibration ({lines[0][:200]}); give another file"
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

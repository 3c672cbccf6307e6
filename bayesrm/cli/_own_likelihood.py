"""Likelihoods of the user's own that no name finds again: saved with the settings of their program, built from it."""

import argparse
import contextlib
import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ..errors import ArgumentError, LikelihoodChangedWarning, PersistenceError
from ..likelihoods.base import to_config
from ..rewards import text_head
from . import _files, _parser
from ._console import dump

#: File of a run that holds the settings of a program whose likelihood is not registered, beside those of the posterior.
_PROGRAM, _POSTERIOR = "program.json", "posterior.json"


def own_likelihoods(likelihood: Any) -> list[Any]:
    """Those of a likelihood and what it wraps that a later process knows only after running the user's file."""
    if isinstance(likelihood, Mapping):
        return [own for value in likelihood.values() for own in own_likelihoods(value)]
    target = likelihood if inspect.isfunction(likelihood) else type(likelihood)
    found = [] if target.__module__.startswith("bayesrm.") else [likelihood]
    inner = [getattr(likelihood, name) for name in to_config(likelihood)["settings"]]
    return found + [own for value in inner if callable(value) for own in own_likelihoods(value)]


def keep_settings(run: Path, file: str, build: Any, settings: Namespace | None) -> None:
    """Writes with which settings `build` of `file` made the program of a run.

    Raises:
        PersistenceError: The file cannot be written.
    """
    scope = Namespace(program=settings)  # type: ignore[no-untyped-call]
    given = "{}" if settings is None else _flags(build).dump(scope, format="json")
    record = {"file": str(Path(file).resolve()), "settings": json.loads(given)}
    with _files.complete_files(run / _PROGRAM) as (part,):
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def supplied(run: str, file: str | None, build: Any) -> Any:
    """The likelihood of a run that was saved unregistered, from its program; `None` where a name finds it.

    Args:
        run: Folder of the run.
        file: File of the program, if one was given.
        build: Its function `build`, if it has one.

    Raises:
        ArgumentError: The program was not given, cannot be built, or has another likelihood.

    Warns:
        LikelihoodChangedWarning: The source of the likelihood is not that of the fit.
    """
    saved = _saved_likelihood(Path(run) / _POSTERIOR)
    if saved is None or not _unregistered(saved):
        return None
    record = _record(Path(run) / _PROGRAM)
    if file is None or build is None:
        origin = f" (it was fitted from {record['file']})" if record else ""
        lacks = "pass --program with" if file is None else f"--program {file} defines no function `build`; give"
        raise ArgumentError(f"{run}: its likelihood was saved unregistered; {lacks} the file of its program{origin}")
    parser = _flags(build)
    try:
        settings = parser.parse_object(record.get("settings", {})).get("program")
    except argparse.ArgumentError as error:
        hint = "" if record else "; the run does not hold them, since `bayesrm fit` did not write it"
        raise ArgumentError(f"`build` of {file} cannot be called with the settings of {run}: {error}{hint}") from error
    with contextlib.redirect_stdout(sys.stderr):
        program = build(**({} if settings is None else settings.as_dict()))
    if not hasattr(program, "likelihood"):
        raise ArgumentError(f"`build` of {file} returned {type(program).__name__}, which has no likelihood")
    for name in dict.fromkeys(_changed(saved, program.likelihood, f"the likelihood of {file} is not that of {run}")):
        warnings.warn(
            f"the source of likelihood '{name}' has changed since the posterior in {run} was fitted",
            LikelihoodChangedWarning,
            stacklevel=2,
        )
    return program.likelihood


def _flags(build: Any) -> Any:
    """The flags `--program.*` alone."""
    parser = _parser.make_parser("fit", "")
    _parser.add_flags(parser, build, "program", "flags of the program", also=text_head)
    return parser


def _saved_likelihood(file: Path) -> dict[str, Any] | None:
    """What `to_config` said of it; `None` where the run cannot be read, which is told where it is loaded."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["program"]["likelihood"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PersistenceError(f"{file} cannot be read: {error}") from error
    return found


def _unregistered(saved: Mapping[str, Any]) -> bool:
    if "kinds" in saved:
        return any(map(_unregistered, saved["kinds"].values()))
    return saved["name"] is None or any(_unregistered(inner) for inner in _inner(saved).values())


def _inner(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The likelihoods that one wraps, by the name of the setting."""
    settings = saved["settings"].items()
    return {k: v["likelihood"] for k, v in settings if isinstance(v, Mapping) and set(v) == {"likelihood"}}


def _changed(saved: Mapping[str, Any], likelihood: Any, refusal: str) -> list[str]:
    """Names of the likelihoods whose source differs from the saved one.

    Raises:
        ArgumentError: They differ in more.
    """
    if "kinds" in saved or isinstance(likelihood, Mapping):
        mine, theirs = saved.get("kinds"), likelihood if isinstance(likelihood, Mapping) else None
        if mine is None or theirs is None or set(mine) != set(theirs):
            raise ArgumentError(f"{refusal}: they describe other kinds of feedback")
        return [name for kind in mine for name in _changed(mine[kind], theirs[kind], refusal)]
    # As in the file: lists for tuples, null for numbers that are not finite.
    found = json.loads(dump(to_config(likelihood)))
    name = found["name"] or getattr(likelihood, "__name__", type(likelihood).__name__)
    if saved["name"] not in (None, found["name"]):
        raise ArgumentError(f"{refusal}: the one is {name}, the other {saved['name']}")
    inner = _inner(saved)
    mine, theirs = ({k: v for k, v in c["settings"].items() if k not in inner} for c in (saved, found))
    if mine != theirs or set(_inner(found)) != set(inner):
        raise ArgumentError(f"{refusal}: {name} has the settings {found['settings']}, the run has {saved['settings']}")
    changed = [name] if saved["source"] != found["source"] else []
    return changed + [n for key, one in inner.items() for n in _changed(one, getattr(likelihood, key), refusal)]

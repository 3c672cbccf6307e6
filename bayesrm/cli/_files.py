"""Output files and folders: refused if they exist, complete or absent."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError, PersistenceError

_MANIFEST = "manifest.json"


def check_output_file(path: str, suffix: str, *, overwrite: bool) -> Path:
    """Refuses an output file that exists, has another suffix or cannot be made.

    Raises:
        ArgumentError: The path cannot be used.
    """
    target = Path(path)
    if target.suffix != suffix:
        raise ArgumentError(f"`--output` is {path}; its name must end in {suffix}")
    if target.is_dir():
        raise ArgumentError(f"`--output` {path} is a folder; give the name of a file")
    if target.exists() and not overwrite:
        raise ArgumentError(f"{path} exists; pass --overwrite to replace it, or choose another name")
    _check_parent(target)
    return target


def check_output_run(path: str, *, overwrite: bool) -> Path:
    """Refuses a run directory that exists, or that is no run directory and cannot be replaced.

    Raises:
        ArgumentError: The path cannot be used.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"`--output` {path} is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / _MANIFEST).exists():
            raise ArgumentError(f"{path} exists and is not a saved posterior; choose another folder")
        if not overwrite:
            raise ArgumentError(
                f"{path} holds a saved posterior; pass --overwrite to replace it, or choose another folder"
            )
    _check_parent(target)
    return target


@contextlib.contextmanager
def complete_files(*targets: Path) -> Iterator[list[Path]]:
    """Files in temporary folders beside the targets, which take their places only when all are written.

    Raises:
        PersistenceError: A file cannot be written.
    """
    try:
        with contextlib.ExitStack() as stack:
            parts = []
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder = tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent)
                parts.append(Path(stack.enter_context(folder)) / target.name)
            yield parts
            for part, target in zip(parts, targets, strict=True):
                part.replace(target)
    except OSError as error:
        raise PersistenceError(f"cannot write {' and '.join(map(str, targets))}: {error}") from error


def _check_parent(target: Path) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArgumentError(f"`--output` {target} cannot be made: {parent} is not a folder that can be written to")

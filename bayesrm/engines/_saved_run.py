"""The folder of a saved posterior: settings, tensors, and a manifest with the digests of all files."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from .._typing import Tensor
from ..errors import PersistenceError

FORMAT_VERSION = 1
_SETTINGS, _TENSORS, _MANIFEST = "posterior.json", "posterior.safetensors", "manifest.json"


@contextlib.contextmanager
def new_run(path: str | Path) -> Iterator[Path]:
    """A folder to fill; after the block it stands at `path`, in place of an existing run, or nothing has changed.

    Raises:
        PersistenceError: `path` is something else than a saved posterior, or cannot be written.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / _MANIFEST).exists())):
        raise PersistenceError(f"{target} exists and is not a saved posterior; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PersistenceError(f"cannot write to {target.parent}: {error}") from error
    try:
        yield folder
        files = {str(f.relative_to(folder)): _digest(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        manifest = {"format": "bayesrm.posterior", "version": FORMAT_VERSION, "sha256": files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        folder.chmod(0o755)
        _put_in_place(folder, target)
    except OSError as error:
        raise PersistenceError(f"cannot write {target}: {error}") from error
    finally:
        # Gone already unless something, an interrupt too, kept it from taking the target's place.
        shutil.rmtree(folder, ignore_errors=True)


def write_run(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes settings and tensors into the folder that `new_run` gave.

    JSON has no numbers that are not finite: they are written as `null`, with their places and what they were under
    `not_finite`, from where `read_run` puts them back.
    """
    places: list[tuple[list[str | int], str]] = []
    plain = {name: _strict(value, [name], places) for name, value in settings.items()}
    text = json.dumps(plain | ({"not_finite": places} if places else {}), indent=2, allow_nan=False)
    (folder / _SETTINGS).write_text(text + "\n")
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / _TENSORS)


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a saved posterior, after checking all its files against the manifest.

    Raises:
        PersistenceError: A file is missing, damaged or of another format version; the message names it.
    """
    manifest = _read_json(folder / _MANIFEST)
    if manifest.get("format") != "bayesrm.posterior" or manifest.get("version") != FORMAT_VERSION:
        raise PersistenceError(
            f"{folder / _MANIFEST} describes {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this release reads 'bayesrm.posterior' version {FORMAT_VERSION}"
        )
    for name in dict.fromkeys([_SETTINGS, _TENSORS, *manifest.get("sha256", {})]):
        file = folder / name
        if not file.is_file():
            raise PersistenceError(f"{file} is missing; the run directory is incomplete")
        if _digest(file) != manifest.get("sha256", {}).get(name):
            raise PersistenceError(f"{file} differs from the digest in {_MANIFEST}; it was damaged or edited")
    settings = _read_json(folder / _SETTINGS)
    for place, value in settings.pop("not_finite", []):
        *way, last = place
        holder: Any = settings
        for key in way:
            holder = holder[key]
        holder[last] = float(value)
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise PersistenceError(f"{folder / _TENSORS} cannot be read: {error}") from error
    return settings, tensors


def _strict(value: Any, place: list[str | int], found: list[tuple[list[str | int], str]]) -> Any:
    """The value without numbers that are not finite, whose places are noted."""
    if isinstance(value, Mapping):
        return {key: _strict(inner, [*place, str(key)], found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner, [*place, i], found) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found.append((place, str(value)))
        return None
    return value


def _put_in_place(folder: Path, target: Path) -> None:
    """Moves a complete folder to where a run is to be; one that is there goes only when the new one has its place."""
    if not target.exists():
        os.replace(folder, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / target.name)
    try:
        os.replace(folder, target)
    except OSError:
        os.replace(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise PersistenceError(f"{file} is missing; is {file.parent} a saved posterior?") from error
    except (OSError, ValueError) as error:
        raise PersistenceError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PersistenceError(f"{file} does not hold a JSON object")
    return value


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

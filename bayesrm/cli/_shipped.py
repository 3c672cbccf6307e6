"""Finds ready programs and engine settings by name, and loads them or files of the user's own."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

#: Folder of each sort of file, and what an error calls one.
KINDS = {"models": "program", "inference": "engine"}

_PACKAGE = Path(__file__).resolve().parent.parent


def folder(kind: str) -> Path:
    """The folder of the shipped files of `kind`, `"models"` or `"inference"`.

    In a wheel they are packed into the package; in an editable installation they lie at the root of the repository.

    Raises:
        ArgumentError: There is none: the installation is incomplete.
    """
    places = [_PACKAGE / "_shipped" / kind, _PACKAGE.parent / kind]
    for place in places:
        if place.is_dir():
            return place
    raise ArgumentError(f"no folder `{kind}` at {' or '.join(map(str, places))}; install the package again")


def names(kind: str) -> list[str]:
    """Names of the shipped files of `kind`.

    Example:
        >>> "davidson" in names("models")
        True
    """
    return sorted(path.stem for path in folder(kind).glob("*.py") if not path.stem.startswith("_"))


def locate(kind: str, name: str) -> Path:
    """The file that a name, or a path to a `.py` file, stands for.

    Raises:
        ArgumentError: There is no such file; the message lists the names.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ArgumentError(f"there is no {KINDS[kind]} file {name}; check the path, or use one of {names(kind)}")
        return Path(name)
    if name not in names(kind):
        raise ArgumentError(
            f"there is no {KINDS[kind]} `{name}`; it is one of {', '.join(names(kind))}, or a path to a .py file"
        )
    return folder(kind) / f"{name}.py"


def load_build(kind: str, name: str) -> Callable[..., Any]:
    """The function `build` of a shipped file or of one's own.

    Raises:
        ArgumentError: The file cannot be found or run, or defines no `build`.
    """
    path = locate(kind, name)
    build = getattr(load_module(path), "build", None)
    if not inspect.isfunction(build):
        raise ArgumentError(f"{path} defines no function `build`; see {folder(kind)} for examples")
    return build


def load_module(path: Path) -> Any:
    """Runs a Python file and returns it as a module.

    Raises:
        ArgumentError: The file cannot be run; the message names the error and the line.
    """
    name = f"_bayesrm_{path.resolve().parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and signatures of the file are resolved through the table of modules.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ArgumentError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        line = next((f.lineno for f in reversed(inspect.trace()) if f.filename == str(path)), "?")
        raise ArgumentError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module

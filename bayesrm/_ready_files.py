"""Finds ready programs and engine settings by name, and loads them, files of the user's own, or registered engines."""

import dataclasses
import enum
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ArgumentError, EngineError

#: Folder of each sort of file, and what an error calls one.
KINDS = {"models": "program", "inference": "engine", "inference/alignment": "alignment method"}

_PACKAGE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """The folder of the shipped files of `kind`, one of `KINDS`.

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


def registered() -> list[str]:
    """Names of the engines that other packages register."""
    from .engines import registry

    return list(dict.fromkeys(e.name for e in registry.available() if e.distribution != registry.BUILT_IN))


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
        known = [*names(kind), *(registered() if kind == "inference" else [])]
        raise ArgumentError(
            f"there is no {KINDS[kind]} `{name}`; it is one of {', '.join(known)}, or a path to a .py file"
        )
    return folder(kind) / f"{name}.py"


def load_build(kind: str, name: str) -> Callable[..., Any]:
    """The function `build` of a shipped file or of one's own, or one that makes a registered engine.

    Raises:
        ArgumentError: The file cannot be found or run, or defines no `build`.
        EngineError: A registered engine has the name of a shipped file, or cannot be loaded.
    """
    if kind == "inference" and not name.endswith(".py") and name in registered():
        from .engines import registry

        if name in names(kind):
            raise EngineError(
                f"the name `{name}` is that of {folder(kind) / name}.py and of a registered engine; "
                "give the path of the file, or uninstall the package that registers the engine"
            )
        return engine_build(registry.load(name))
    path = locate(kind, name)
    build = getattr(load_module(path), "build", None)
    if not inspect.isfunction(build):
        raise ArgumentError(f"{path} defines no function `build`; see {folder(kind)} for examples")
    return build


def settings_of(build: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a `build`."""
    return list(inspect.signature(build).parameters)


def engine_build(engine: type[Any]) -> Callable[..., Any]:
    """A function `build` of an engine class: fields of plain types are its arguments, others keep their defaults."""
    hints = typing.get_type_hints(engine)
    arguments = []
    for field in dataclasses.fields(engine):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and _is_plain(hints[field.name]):
            empty = inspect.Parameter.empty if default is dataclasses.MISSING else default
            arguments.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=hints[field.name]
                )
            )

    def build(**settings: Any) -> Any:
        return engine(**settings)

    # What the parser reads: the signature, the documentation of the arguments, and the module for the heading.
    build.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    build.__doc__ = (inspect.getdoc(engine) or "").replace("\nAttributes:\n", "\nArgs:\n")
    build.__module__ = engine.__module__
    return build


def _is_plain(hint: Any) -> bool:
    """Whether a command line can give a value of the type."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list):
        return all(_is_plain(part) for part in typing.get_args(hint))
    plain = (bool, int, float, str, Path, types.NoneType, types.EllipsisType)
    return hint is Ellipsis or (isinstance(hint, type) and issubclass(hint, (*plain, enum.Enum)))


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

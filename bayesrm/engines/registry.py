"""Engines by name: those of this package, and those that other packages register under the group `bayesrm.engines`."""

import dataclasses
import importlib.metadata
import inspect
import re

from ..errors import ArgumentError, EngineError
from .base import Engine

#: Entry-point group under which packages register engine classes.
GROUP = "bayesrm.engines"

#: The distribution of the engines of this package.
BUILT_IN = "bayesrm"


@dataclasses.dataclass(frozen=True)
class RegisteredEngine:
    """An engine class that can be loaded by name.

    Attributes:
        name: Its name: what `fit(..., inference="name")` and `bayesrm fit PROGRAM name` take.
        target: Where it is, `"module:Class"`.
        distribution: The installed distribution that registered it.
    """

    name: str
    target: str
    distribution: str

    def load(self) -> type[Engine]:
        """Imports the class.

        Raises:
            EngineError: It cannot be imported, or is no engine class; the message names the distribution.
        """
        place = f"engine `{self.name}` of the distribution {self.distribution} ({self.target})"
        point = importlib.metadata.EntryPoint(self.name, self.target, GROUP)
        try:
            found = point.load()
        except Exception as error:  # importing runs the code of somebody else, which may raise anything
            raise EngineError(
                f"the {place} cannot be imported: {type(error).__name__}: {error}; "
                f"update or uninstall {self.distribution}"
            ) from error
        if not isinstance(found, type) or not dataclasses.is_dataclass(found) or not isinstance(found, Engine):
            raise EngineError(
                f"the {place} is no dataclass with a method `fit(program, data, *, seed, progress)`; "
                f"tell the authors of {self.distribution}"
            )
        return found


def available() -> list[RegisteredEngine]:
    """Every engine that has a name, in the order of the names. Nothing is imported.

    A name that two distributions register is listed twice; `load` refuses it.

    Example:
        >>> [engine.target for engine in available() if engine.name == "laplace"]
        ['bayesrm.engines:Laplace']
    """
    third = [
        RegisteredEngine(point.name, point.value, "unknown" if point.dist is None else point.dist.name)
        for point in importlib.metadata.entry_points(group=GROUP)
    ]
    return sorted([*_built_in(), *third], key=lambda engine: (engine.name, engine.distribution))


def load(name: str) -> type[Engine]:
    """The engine class of a name: a dataclass whose fields are its settings.

    Args:
        name: One of `available()`. That of a built-in engine is its class's in snake case: `"importance_sampling"`.

    Raises:
        ArgumentError: No engine has the name; the message lists those there are.
        EngineError: Two distributions register the name, or the class cannot be imported.

    Example:
        >>> load("laplace")(structure="diag").structure
        'diag'
    """
    engines = available()
    found = [engine for engine in engines if engine.name == name]
    if not found:
        names = ", ".join(dict.fromkeys(engine.name for engine in engines))
        raise ArgumentError(f"there is no engine `{name}`; it is one of {names}, or install the package that has it")
    if len(found) > 1:
        raise EngineError(
            f"the name `{name}` is that of several engines: "
            f"{' and '.join(f'{e.target} of the distribution {e.distribution}' for e in found)}; "
            "uninstall all but one, or import the class and pass `inference` an object"
        )
    return found[0].load()


def make(name: str) -> Engine:
    """The engine of a name with its default settings.

    Raises:
        ArgumentError: No engine has the name, or it has settings without a default.
        EngineError: As for `load`.

    Example:
        >>> make("map").gradient_tolerance
        1e-06
    """
    cls = load(name)
    needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    if needed:
        raise ArgumentError(
            f"engine `{name}` has no default for {', '.join(needed)}; "
            f"make it by bayesrm.engines.load({name!r})({needed[0]}=...)"
        )
    return cls()


def _built_in() -> list[RegisteredEngine]:
    from .. import engines

    found: list[RegisteredEngine] = []
    for public in engines.__all__:
        value = getattr(engines, public)
        if isinstance(value, type) and dataclasses.is_dataclass(value) and isinstance(value, Engine):
            found.append(RegisteredEngine(_snake_case(public), f"{engines.__name__}:{public}", BUILT_IN))
    return found


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()

"""The published methods of `inference/alignment/` by name."""

from typing import Any

from .. import _ready_files
from ..errors import ArgumentError
from .method import Method

_KIND = "inference/alignment"


def available_methods() -> list[str]:
    """Names of the ready methods.

    Example:
        >>> "brain" in available_methods()
        True
    """
    return _ready_files.names(_KIND)


def load_method(name: str, **settings: Any) -> Method:
    """A ready method, or one of a file of your own, with the settings of its paper but for those that are given.

    Args:
        name: One of `available_methods()`, or the path of a `.py` file with a function `build` that returns a `Method`.
        settings: Arguments of its `build`.

    Raises:
        ArgumentError: There is no such method, it has no such setting, or the value of one is not accepted.

    Example:
        >>> load_method("brain", beta=0.5).target.goodness.temperature
        0.5
    """
    build = _ready_files.load_build(_KIND, name)
    known = _ready_files.settings_of(build)
    for setting in settings:
        if setting not in known:
            raise ArgumentError(f"`{name}` has no setting {setting!r}; it has {known}")
    method = build(**settings)
    if not isinstance(method, Method):
        raise ArgumentError(f"`build` of {name} returned {type(method).__name__}; it must return a Method")
    return method

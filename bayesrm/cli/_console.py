"""What a command writes: results on stdout, everything else on stderr, errors as exit codes."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ArgumentError, BayesRMError


@dataclasses.dataclass
class Status:
    """The exit code of a command."""

    code: int = 0


@contextlib.contextmanager
def reporting() -> Iterator[Status]:
    """Turns errors that a user can cause into one line on stderr and an exit code, and warnings into one line each."""
    status = Status()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield status
        except (ArgumentError, argparse.ArgumentError) as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            status.code = 2
        except BayesRMError as error:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            status.code = 1
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            status.code = 130
        except SystemExit as stop:
            status.code = int(stop.code or 0)


@dataclasses.dataclass(frozen=True)
class Console:
    """Where the results of one command go.

    Attributes:
        json: Whether the result is one JSON object, and nothing else is written to stdout.
        stream: The standard output, a text stream.
    """

    json: bool
    stream: Any

    @classmethod
    @contextlib.contextmanager
    def open(cls, *, json: bool) -> Iterator["Console"]:
        """The console of a command; whatever else is printed meanwhile goes to stderr."""
        stream = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield cls(json, stream)

    def say(self, text: str) -> None:
        """Writes text for a person, unless the result is JSON."""
        if not self.json:
            print(text, file=self.stream, flush=True)

    def result(self, record: Mapping[str, Any]) -> None:
        """Writes the result as JSON, if that was asked for."""
        if self.json:
            print(dump(record), file=self.stream, flush=True)


def dump(value: Any, indent: int | None = None) -> str:
    """JSON text of a value; numbers that are not finite become null.

    Example:
        >>> dump({"a": [1.5, float("nan")]})
        '{"a": [1.5, null]}'
    """
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)

"""Parsers of the commands: fixed options, and flags made from the signatures of programs, engines and readers."""

import argparse
import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_origin

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import restricted_number_type

from .. import _ready_files
from ..errors import ArgumentError

#: What a random generator takes as seed.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])


def make_parser(command: str, description: str) -> ArgumentParser:
    """A parser with the options that every command has."""
    description += " Flags may be written with - for _."
    parser = ArgumentParser(prog=f"bayesrm {command}", description=description, exit_on_error=False)
    parser.add_argument("--json", action="store_true", help="write one JSON object to stdout and nothing else")
    return parser


def positionals(arguments: Sequence[str], switches: Iterable[str]) -> list[str]:
    """The arguments that are no options, found before the options are known.

    Args:
        arguments: All arguments.
        switches: Options that take no value; every other one takes one.

    Example:
        >>> positionals(["davidson", "-o", "run", "--json", "map", "--seed=1"], ["--json"])
        ['davidson', 'map']
    """
    found, place = [], 0
    while place < len(arguments):
        argument = arguments[place]
        if not argument.startswith("-"):
            found.append(argument)
        elif argument not in switches and "=" not in argument:
            place += 1
        place += 1
    return found


def load_build(kind: str, name: str | None) -> Callable[..., Any] | None:
    """The function `build` behind a name given on the command line, `None` for no name."""
    if name is None:
        return None
    with contextlib.redirect_stdout(sys.stderr):
        return _ready_files.load_build(kind, name)


def add_flags(
    parser: ArgumentParser,
    function: Callable[..., Any],
    group: str,
    title: str,
    *,
    skip: Iterable[str] = (),
    also: Any = None,
) -> None:
    """Makes a flag `--group.argument` of each argument of a function, with its type, default and documentation.

    Args:
        parser: Receives the flags.
        function: Its arguments become the flags; those that it passes on as `**kwargs` too.
        group: Prefix of the flags.
        title: Heading in the help.
        skip: Arguments to leave out.
        also: A further function whose documentation describes arguments passed on to it.
    """
    parser.add_function_arguments(function, group, as_group=True, skip=set(skip))
    assert parser.groups is not None  # it has one now
    documentation = _arguments(also) | _arguments(function)
    for action in parser._actions:
        if action.dest.startswith(f"{group}."):
            action.help = documentation.get(action.dest.removeprefix(f"{group}."))
    parser.groups[group].title = title


def heading(what: str, name: str | None, build: Callable[..., Any]) -> str:
    """Heading of the flags of a program or an engine: its name and the first line of its file."""
    first = (inspect.getdoc(inspect.getmodule(build)) or "").partition("\n")[0].rstrip(".")
    return f"flags of the {what} {name}" + (f" ({first})" if first else "")


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses arguments; flags may be written with `-` for `_`, lists without brackets.

    Raises:
        argparse.ArgumentError: The arguments are not accepted.
    """
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    settled: list[str] = []
    pending: argparse.Action | None = None
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            flag = flag if flag in flags else flag.replace("--", "##", 1).replace("-", "_").replace("##", "--", 1)
            pending = flags.get(flag)
            settled.append(flag + equals + (_bracketed(pending, value) if equals else ""))
        else:
            settled.append(_bracketed(pending, argument))
            pending = None
    try:
        parsed: Namespace = parser.parse_args(settled)
    except argparse.ArgumentError as error:
        # The names that a user knows are those of the help.
        message = str(error)
        for action in parser._actions:
            if isinstance(action.metavar, str) and not action.option_strings:
                message = message.replace(action.dest, action.metavar)
        raise argparse.ArgumentError(None, message) from error
    return parsed


def built(build: Callable[..., Any], settings: Namespace | None, what: str, expected: str, accepted: Any) -> Any:
    """Calls `build` with its flags and checks what it returns.

    Raises:
        ArgumentError: It returns something else.
    """
    value = build(**({} if settings is None else settings.as_dict()))
    if isinstance(value, type) or not isinstance(value, accepted):
        raise ArgumentError(f"`build` of {what} returned {type(value).__name__}; it must return {expected}")
    return value


def _bracketed(action: argparse.Action | None, value: str) -> str:
    """`32,16` as `[32,16]` where a list is wanted."""
    kind = getattr(action, "_typehint", None)
    kinds = (kind, *getattr(kind, "__args__", ()))
    listed = any(get_origin(k) in (list, tuple) for k in kinds)
    return f"[{value}]" if listed and not value.startswith("[") and value != "null" else value


def _arguments(function: Callable[..., Any] | None) -> dict[str, str]:
    """What the section `Args` of a Google docstring says of each argument."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    if section is None:
        return {}
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(entry.split()).replace("%", "%%") for name, entry in found}

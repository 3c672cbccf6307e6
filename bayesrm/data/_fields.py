"""Reads the fields of one row, or says why they cannot be used."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ._texts import Text

Row = Mapping[str, Any]

#: Roles that a message may have.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_TRUE = {"true", "1", "1.0", "yes"}
_FALSE = {"false", "0", "0.0", "no"}


class BadRowError(Exception):
    """A row cannot be used; the message is the reason."""


def present(row: Row, *names: str) -> str:
    """Returns the first of `names` that the row has and that is not null."""
    for name in names:
        if row.get(name) is not None:
            return name
    shown = " or ".join(f"`{name}`" for name in names)
    if any(name in row for name in names):
        raise BadRowError(f"{shown} is null; give a value")
    raise BadRowError(f"{shown} is missing; the row has {sorted(row)}")


def read_text(value: Any, name: str, *, empty: bool = False) -> Text:
    """Reads a string, or a list of messages, which is encoded as JSON.

    Args:
        value: The field.
        name: What to call it in an error.
        empty: Whether an empty text is allowed (it is for a prompt).
    """
    if isinstance(value, str):
        if not empty and (not value or value.isspace()):
            raise BadRowError(f"{name} is empty; give a text")
        _check_unicode(value, name)
        return Text(value)
    if isinstance(value, Sequence):
        return encode_messages(read_messages(value, name, empty=empty), name)
    kind = "null" if value is None else f"of type {type(value).__name__}"
    raise BadRowError(f"{name} is {kind}; give a string or a list of messages")


def read_messages(value: Any, name: str, *, empty: bool = False) -> list[dict[str, Any]]:
    """Checks a list of messages and returns it without null entries.

    Args:
        value: A sequence of mappings with `role` and `content`.
        name: What to call it in an error.
        empty: Whether the list, and the content of its last message, may be empty.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise BadRowError(f"{name} is of type {type(value).__name__}; give a list of messages")
    messages = [_read_message(message, f"{name}[{place}]") for place, message in enumerate(value)]
    if not empty:
        if not messages:
            raise BadRowError(f"{name} is empty; give at least one message")
        if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
            raise BadRowError(f"{name} is empty: the content of its last message has no text")
    return messages


def encode_messages(messages: Sequence[Mapping[str, Any]], name: str) -> Text:
    """Encodes messages as JSON in a form that is equal for equal messages."""
    try:
        value = json.dumps(list(messages), ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRowError(f"{name} cannot be written as JSON: {error}") from None
    _check_unicode(value, name)
    return Text(value, is_messages=True)


def decode_cell(cell: str) -> Any:
    """Returns the messages in a CSV cell that holds a JSON list of them, else the cell itself."""
    if cell.startswith("[{") and '"role"' in cell:
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def read_list(value: Any, name: str) -> list[Any]:
    """Reads a list; a string that holds a JSON list (as in a CSV file) is decoded."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRowError(f"{name} is not valid JSON ({error.msg} at character {error.pos})") from None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise BadRowError(f"{name} is of type {type(value).__name__}; give a list")
    return list(value)


def read_number(value: Any, name: str) -> float:
    """Reads a finite number; numerals in a string (as in a CSV file) count as numbers."""
    try:
        number = float(value)
        if isinstance(value, bool):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"{name} is {shorten_repr(value)}; give a number") from None
    if not math.isfinite(number):
        raise BadRowError(f"{name} is {number}; give a finite number")
    return number


def read_integer(value: Any, name: str) -> int:
    """Reads a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = read_number(value, name)
    if number != int(number):
        raise BadRowError(f"{name} is {shorten_repr(value)}; give a whole number")
    return int(number)


def read_flag(value: Any, name: str) -> bool:
    """Reads a truth value: a bool, 0 or 1, or one of the usual spellings in a string."""
    spelled = str(value).strip().lower()
    if spelled in _TRUE:
        return True
    if spelled in _FALSE:
        return False
    raise BadRowError(f"{name} is {shorten_repr(value)}; give true or false (or 1 or 0)")


def read_choice(row: Row, count: int, name: str) -> int:
    """Reads the field `choice`: the index of one of `count` candidates, or `count` for a tie."""
    choice = row[present(row, "choice")]
    if isinstance(choice, str) and choice.strip().lower() == "tie":
        return count
    outcome = read_integer(choice, "`choice`")
    if not 0 <= outcome < count:
        raise BadRowError(
            f"`choice` is {outcome}, but there are {count} {name}; give an index from 0 to {count - 1}, or 'tie'"
        )
    return outcome


def read_annotator(row: Row) -> str | None:
    """Reads the optional field `annotator`; a number becomes a name."""
    value = row.get("annotator")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRowError(f"`annotator` is {shorten_repr(value)}; give a name or an integer")
    _check_unicode(str(value), "`annotator`")
    return str(value)


def read_weight(row: Row) -> float:
    """Reads the optional field `weight`; without one a row counts once."""
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    weight = read_number(value, "`weight`")
    if weight < 0:
        raise BadRowError(f"`weight` is {weight}; give a number of at least 0 (0 masks the row)")
    return weight


def read_margin(row: Row) -> float | None:
    """Reads the optional field `margin`."""
    value = row.get("margin")
    return None if value is None or value == "" else read_number(value, "`margin`")


def shorten_repr(value: Any, width: int = 60) -> str:
    """Returns the representation of a value, cut to `width` characters."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _read_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRowError(f"{name} is of type {type(message).__name__}; give a message with `role` and `content`")
    kept = {key: value for key, value in message.items() if value is not None}
    if "content" not in kept and kept.get("tool_calls"):
        kept["content"] = ""
    for key in ("role", "content"):
        if key not in kept:
            raise BadRowError(f"{name} has no `{key}`; give a message with `role` and `content`")
        if not isinstance(kept[key], str):
            raise BadRowError(f"`{key}` of {name} is of type {type(kept[key]).__name__}; give a string")
    if kept["role"] not in ROLES:
        raise BadRowError(f"{name} has the unknown role {shorten_repr(kept['role'])}; accepted are {', '.join(ROLES)}")
    return kept


def _check_unicode(value: str, name: str) -> None:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"{name} holds half of a surrogate pair at character {error.start}; repair it") from None

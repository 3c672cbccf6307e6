"""Checks of settings and texts, with errors that name the argument or the item."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from ..data.rendering import Content
from ..errors import ArgumentError, DataError


def check_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    if value not in accepted:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, map(str, accepted)))}, got {value!r}")


def as_member(kind: Any, name: str, value: object) -> Any:
    check_choice(name, value, kind)
    return kind(value)


def check_integer(name: str, value: object, smallest: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (smallest is not None and value < smallest):
        kind = "an integer" if smallest is None else f"an integer of at least {smallest}"
        raise ArgumentError(f"`{name}` must be {kind}, got {value!r}")


def is_real(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_device(device: Any) -> None:
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(f'`device` must be None or a torch device such as "cuda:0", got {device!r}') from error


def check_cache_dir(cache_dir: object) -> None:
    if not (cache_dir is None or cache_dir is False or (cache_dir and isinstance(cache_dir, str | os.PathLike))):
        raise ArgumentError(
            f"`cache_dir` must be a folder, None (the default one) or False (no cache), got {cache_dir!r}"
        )


def check_columns(prompts: Sequence[Content], responses: Sequence[Content]) -> None:
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, str):
            raise ArgumentError(
                f"`{name}` must be a sequence with one text for each item, got one string; put it in a list"
            )
    if len(prompts) != len(responses):
        raise ArgumentError(
            f"`prompts` and `responses` must have the same length, got {len(prompts)} and {len(responses)}"
        )


def check_item(item: int, prompt: object, response: object) -> None:
    for name, text in (("prompt", prompt), ("response", response)):
        messages = isinstance(text, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in text
        )
        if not (isinstance(text, str) or messages):
            raise DataError(
                f"item {item}: the {name} must be a string or a list of messages with `role` and `content`, "
                f"got {type(text).__name__}"
            )
        words = plain(cast(Content, text))
        try:
            words.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"item {item}: the {name} holds half of a surrogate pair at character {error.start}; repair it"
            ) from None
        if name == "response" and not words.strip():
            raise DataError(f"item {item}: the response is empty; leave the item out")


def plain(text: Content) -> str:
    """The words of a text without roles or templates."""
    if isinstance(text, str):
        return text
    parts = []
    for message in text:
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    return " ".join(parts)

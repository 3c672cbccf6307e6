"""Separates a prompt from the completions that follow it, in the ways in which preference data sets write them."""

from collections.abc import Sequence
from typing import Any

from ._fields import BadRowError, encode_messages, read_messages, read_text
from ._texts import Text


def split_prompt(prompt: Any, completions: Sequence[Any], names: Sequence[str]) -> tuple[Text, list[Text]]:
    """Reads a prompt and its completions.

    Without a prompt (`None`) it is what the completions have in common at their start: for conversations the messages,
    for strings the longest common prefix, cut back to a white space so that no word is torn. A string as prompt of
    whole conversations becomes their common messages; a string as completion of a conversation becomes a message of
    the assistant.

    Args:
        prompt: A string, a list of messages, or `None`.
        completions: At least two strings or lists of messages.
        names: What to call each completion in an error.

    Returns:
        The prompt and the completions, none of which is empty.

    Example:
        >>> prompt, completions = split_prompt(None, ["Sky is blue", "Sky is blank"], ["chosen", "rejected"])
        >>> prompt.value, completions[0].value
        ('Sky is', ' blue')
    """
    conversational = [not isinstance(completion, str) for completion in completions]
    if prompt is None or (isinstance(prompt, str) and any(conversational)):
        return _extract(prompt, completions, names)
    if isinstance(prompt, str):
        return read_text(prompt, "`prompt`", empty=True), _read_all(completions, names)
    completions = [
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str) and completion.strip()
        else completion
        for completion in completions
    ]
    return read_text(prompt, "`prompt`", empty=True), _read_all(completions, names)


def _read_all(completions: Sequence[Any], names: Sequence[str]) -> list[Text]:
    return [read_text(completion, name) for completion, name in zip(completions, names, strict=True)]


def _extract(prompt: str | None, completions: Sequence[Any], names: Sequence[str]) -> tuple[Text, list[Text]]:
    texts = _read_all(completions, names)
    kinds = {text.is_messages for text in texts}
    if len(kinds) > 1:
        raise BadRowError(f"{' and '.join(names)} mix strings and lists of messages; use one of the two")
    if not kinds.pop():
        cut = _common_words([text.value for text in texts])
        split = Text(texts[0].value[:cut]), [Text(text.value[cut:]) for text in texts]
        for text, name in zip(split[1], names, strict=True):
            read_text(text.value, f"{name} after the common prompt")
        return split
    conversations = [read_messages(completion, name) for completion, name in zip(completions, names, strict=True)]
    shared = 0
    while shared < min(map(len, conversations)) - 1 and all(
        c[shared] == conversations[0][shared] for c in conversations
    ):
        shared += 1
    start: list[dict[str, Any]] = conversations[0][:shared]
    if prompt is not None and not start:
        read_text(prompt, "`prompt`", empty=True)
        start = [{"role": "user", "content": prompt}]
    rest = [encode_messages(c[shared:], name) for c, name in zip(conversations, names, strict=True)]
    return (encode_messages(start, "`prompt`") if start else Text("")), rest


def _common_words(texts: Sequence[str]) -> int:
    """Length of the longest common prefix that ends just before a white space."""
    low, high = 0, min(map(len, texts))
    while low < high:
        middle = (low + high + 1) // 2
        if all(text[low:middle] == texts[0][low:middle] for text in texts):
            low = middle
        else:
            high = middle - 1
    while low > 0 and not texts[0][low - 1].isspace():
        low -= 1
    return max(low - 1, 0)

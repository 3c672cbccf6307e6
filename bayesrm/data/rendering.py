"""Turns prompts and responses into the text a language model reads, and shortens what is too long."""

import enum
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import ArgumentError, DataError

#: A plain text, or a list of messages with `role` and `content`.
Content: TypeAlias = str | Sequence[Mapping[str, Any]]


class Shortened(enum.StrEnum):
    """What was cut from a prompt and response to make them fit."""

    NONE = "none"
    """Nothing."""
    PROMPT = "prompt"
    """Tokens from the start of the prompt (all of it, if the response just fits)."""
    RESPONSE = "response"
    """The whole prompt, and tokens from the end of the response."""


def render(prompt: Content, response: Content, tokenizer: Any) -> tuple[str, str]:
    r"""Returns the texts of a prompt and of its response.

    Two plain strings stay as they are. Messages go through the tokenizer's chat template: the prompt with the marker
    that opens the assistant's turn, the response as the rest of the rendered conversation. A tokenizer without a
    template gets lines `User: ...` and `Assistant: ...`, separated by empty lines. Of a string and a list of messages,
    the string counts as one message of the user (prompt) or the assistant (response); an empty prompt as no message.

    Args:
        prompt: A string or a list of messages.
        response: A string or a list of messages.
        tokenizer: A tokenizer of transformers.

    Raises:
        DataError: The chat template refuses the messages, or does not render the conversation as a continuation of its
            prompt.

    Example:
        >>> class Plain:
        ...     chat_template = None
        >>> render([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello!"}], Plain())
        ('User: Hi\n\nAssistant:', ' Hello!')
    """
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    before = _as_messages(prompt, "user")
    after = _as_messages(response, "assistant")
    if getattr(tokenizer, "chat_template", None) is None:
        return _render_plainly(before, after)
    return _render_with_template(before, after, tokenizer)


def shorten(prompt_ids: Sequence[int], response_ids: Sequence[int], max_length: int) -> tuple[list[int], Shortened]:
    """Joins prompt and response, cutting the start of the prompt, and only then the end of the response, to fit.

    The end of a prompt holds the question and the response is what is judged, so they go last. Special tokens are the
    caller's: pass `max_length` without them.

    Args:
        prompt_ids: Tokens of the prompt.
        response_ids: Tokens of the response.
        max_length: Largest number of tokens to return, at least 1.

    Returns:
        The tokens, at most `max_length`, and what was cut.

    Raises:
        ArgumentError: `max_length` is below 1.

    Example:
        >>> shorten([1, 2, 3], [4, 5], 4)
        ([2, 3, 4, 5], <Shortened.PROMPT: 'prompt'>)
    """
    if max_length < 1:
        raise ArgumentError(f"`max_length` is {max_length}; give at least 1")
    room = max_length - len(response_ids)
    if room < 0:
        return list(response_ids[:max_length]), Shortened.RESPONSE
    if room >= len(prompt_ids):
        return [*prompt_ids, *response_ids], Shortened.NONE
    return [*prompt_ids[len(prompt_ids) - room :], *response_ids], Shortened.PROMPT


def _as_messages(content: Content, role: str) -> list[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"role": role, "content": content}] if content else []
    return list(content)


def _render_plainly(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    opening = f"{after[0]['role'].capitalize()}:" if after else "Assistant:"
    prompt = "\n\n".join([*map(_line, before), opening])
    response = "\n\n".join([f" {after[0]['content']}", *map(_line, after[1:])]) if after else ""
    return prompt, response


def _line(message: Mapping[str, Any]) -> str:
    return f"{message['role'].capitalize()}: {message['content']}"


def _render_with_template(
    before: list[Mapping[str, Any]], after: list[Mapping[str, Any]], tokenizer: Any
) -> tuple[str, str]:
    whole = _apply(tokenizer, [*before, *after], add_generation_prompt=False)
    if not before:
        return "", whole
    prompt = _apply(tokenizer, before, add_generation_prompt=True)
    if not whole.startswith(prompt):
        # Some templates open the assistant's turn with more than a finished turn has, such as an empty thought.
        closed = _apply(tokenizer, before, add_generation_prompt=False)
        prompt = _common_prefix(prompt, whole)
        if not prompt.startswith(closed):
            raise DataError(
                "the chat template renders the conversation other than as its prompt and a continuation, so the "
                "response cannot be told apart; join the texts yourself and pass strings"
            )
    return prompt, whole[len(prompt) :]


def _apply(tokenizer: Any, messages: list[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template refuses messages with the roles {roles}: {error}") from error


def _common_prefix(first: str, second: str) -> str:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(character for character, _ in pairs)

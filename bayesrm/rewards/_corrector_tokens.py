"""Prompts and responses as the tokens that a corrector reads and writes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..data.rendering import Content, render
from ..errors import ArgumentError, DataError
from ._checks import check_columns, check_item
from ._tokens import _special_tokens, stop_tokens
from .corrector import Corrector


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt with a response, as a corrector reads them.

    Attributes:
        before: Token ids up to the response, the prompt among them.
        response: Token ids of the response, with the end-of-sequence token unless it was cut.
        after: Token ids behind the response.
        text: The response.
        ended: Whether the response is whole.
        shortened: Whether something was cut off.
    """

    before: tuple[int, ...]
    response: tuple[int, ...]
    after: tuple[int, ...]
    text: str
    ended: bool
    shortened: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """Everything that is read; the response's end shows in what comes after it."""
        return (*self.before, *(self.response[:-1] if self.ended else self.response), *self.after)


class CorrectorCodec:
    """From texts to token ids, for one tokenizer and the limits of one model.

    Args:
        settings: The corrector's settings.
        tokenizer: Its tokenizer.
        two_parts: Whether an encoder reads.
        positions: Most tokens that the model (each part of it) can read, if it says so.
        generation_config: The model's own, where it names tokens that end a text.

    Raises:
        ArgumentError: The tokenizer does not tell where tokens stand in a text or has no end of sequence, or the limits
            leave no room.
    """

    def __init__(
        self, settings: Corrector, tokenizer: Any, *, two_parts: bool, positions: int | None, generation_config: Any
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ArgumentError(
                f"`model` {settings.model!r}: its tokenizer ({type(tokenizer).__name__}) does not tell where tokens "
                "stand in a text; use a fast tokenizer (one with a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self.stop_ids = stop_tokens(tokenizer, generation_config)
        self._settings = settings
        self._opening, closing = _around(tokenizer) if two_parts else _special_tokens(tokenizer)
        head, self._between, after = settings.template_parts
        self._head = head
        self._after = (*self._tokenize([after])[0], *closing)
        most = settings.max_prompt_tokens
        if positions is not None:
            written = 0 if two_parts else settings.max_response_tokens
            most = min(most, positions - settings.max_response_tokens - written - len(self._after))
        needed = len(self._opening) + len(self._tokenize([self._between])[0])
        if most <= needed:
            raise ArgumentError(
                f"`max_prompt_tokens` is {settings.max_prompt_tokens} and `max_response_tokens` "
                f"{settings.max_response_tokens}; of {'any number of' if positions is None else positions} tokens that "
                f"the model reads they leave {most} to the prompt, and the template with its special tokens takes "
                f"{needed} of these"
            )
        self.max_prompt_tokens = most

    def encode(self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0) -> list[Reading]:
        """Token ids of prompts with responses, one each; errors count items from `start`.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A text cannot be used.
        """
        check_columns(prompts, responses)
        rendered, by_template = [], []
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            check_item(start + place, prompt, response)
            try:
                rendered.append(render(prompt, response, self.tokenizer))
            except DataError as error:
                raise DataError(f"item {start + place}: {error}") from error
            plain = isinstance(prompt, str) and isinstance(response, str)
            by_template.append(not plain and getattr(self.tokenizer, "chat_template", None) is not None)
        befores = self._tokenize([self._head + prompt + self._between for prompt, _ in rendered])
        texts = self._tokenize([response for _, response in rendered])
        return [
            self._reading(start + place, *parts)
            for place, parts in enumerate(zip(befores, texts, rendered, by_template, strict=True))
        ]

    def _reading(
        self, item: int, before: list[int], response: list[int], rendered: tuple[str, str], by_template: bool
    ) -> Reading:
        opening = self._opening
        if opening and before[: len(opening)] == opening:
            before = before[len(opening) :]
        elif by_template:
            # A chat template writes the special tokens itself.
            opening = []
        room = self.max_prompt_tokens - len(opening)
        closed = self._close(response, item)
        most = self._settings.max_response_tokens
        if self._settings.on_long == "raise" and (len(before) > room or len(closed) > most):
            what, count, limit = (
                ("response", len(closed), "max_response_tokens") if len(closed) > most
                else ("prompt", len(before) + len(opening), "max_prompt_tokens")
            )  # fmt: skip
            raise DataError(
                f"item {item} ({rendered[1][:40]!r}): the {what} has {count} tokens, more than "
                f"{room if what == 'prompt' else most}; raise `{limit}` if the model can read more, shorten the text, "
                'or pass `on_long="shorten"`'
            )
        kept = (*opening, *before[max(len(before) - room, 0) :])
        if not kept and not self._after:
            raise DataError(f"item {item}: nothing stands around the response; give a prompt, or words in `template`")
        return Reading(
            kept, tuple(closed[:most]), self._after, rendered[1], len(closed) <= most,
            len(before) > room or len(closed) > most,
        )  # fmt: skip

    def _close(self, ids: list[int], item: int) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            return [*ids, self.stop_ids[0]]
        if self.decode(ids[end + 1 :]).strip():
            raise DataError(
                f"item {item}: the response holds an end-of-sequence token before its end; remove that token, or cut "
                "the response there"
            )
        return ids[: end + 1]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """All tokens that the tokenizer puts around a text, as an encoder with a decoder reads it."""
    ordinary = (token for token in sorted(tokenizer.get_vocab()) if token not in tokenizer.all_special_tokens)
    for probe in ("a", *ordinary):
        body = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        if body:
            whole = list(tokenizer(probe)["input_ids"])
            for start in range(len(whole) - len(body) + 1):
                if whole[start : start + len(body)] == body:
                    return whole[:start], whole[start + len(body) :]
            break
    raise ArgumentError(
        f"`tokenizer` {tokenizer.name_or_path!r} changes the tokens of a text when it adds special ones; choose another"
    )

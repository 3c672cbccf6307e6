"""Prompts and responses as the tokens that a policy reads and draws."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ..data.rendering import Content, render
from ..errors import ArgumentError, DataError
from ._checks import check_choice, check_columns


@dataclasses.dataclass(frozen=True)
class TokenSequences:
    """Pairs of a prompt and a response, as token ids.

    Responses stay token ids from the draw to the score: text that is tokenized again may give other tokens, which the
    policy did not draw.

    Attributes:
        prompts: Token ids of each prompt, at least one each.
        responses: Token ids of each response, at least one each, with the end-of-sequence token where it ended.
        ended: Whether each response ended by itself; otherwise it was cut and has no end-of-sequence token.
        prompt_shortened: Whether the start of each prompt was cut off; empty if none was.
        response_shortened: Whether the end of each response was cut off; empty if none was.

    Raises:
        ArgumentError: The columns differ in length, or a prompt or response has no token.

    Example:
        >>> sequences = TokenSequences(prompts=((5, 6), (5,)), responses=((7, 2), (7,)), ended=(True, False))
        >>> len(sequences), sequences.lengths.tolist(), sequences[[1]].responses
        (2, [2, 1], ((7,),))
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    prompt_shortened: tuple[bool, ...] = ()
    response_shortened: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.prompts)
        for name in ("responses", "ended", "prompt_shortened", "response_shortened"):
            given = len(getattr(self, name))
            if given != count and not (name.endswith("shortened") and given == 0):
                raise ArgumentError(f"`{name}` has {given} entries, `prompts` has {count}")
        for name in ("prompts", "responses"):
            empty = [row for row, ids in enumerate(getattr(self, name)) if not ids]
            if empty:
                raise ArgumentError(f"`{name}`: row {empty[0]} has no tokens; each row needs at least one")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Sequence[int]) -> "TokenSequences":
        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows

        def chosen(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[row] for row in wanted) if column else ()

        return TokenSequences(*(chosen(getattr(self, field.name)) for field in dataclasses.fields(self)))

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each response, the end-of-sequence token included, shape `(N,)`."""
        return np.array([len(ids) for ids in self.responses], dtype=np.int64)


class Codec:
    """Between texts and token ids, for one tokenizer and its limits.

    Args:
        stop_ids: Tokens that end a response; the first closes responses that come as text.
    """

    def __init__(
        self, tokenizer: Any, *, max_prompt_tokens: int, max_new_tokens: int, stop_ids: tuple[int, ...]
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self._opening, self._closing = _special_tokens(tokenizer)
        if max_prompt_tokens <= len(self._opening) + len(self._closing):
            raise ArgumentError(
                f"`max_prompt_tokens` is {max_prompt_tokens}; the tokenizer alone adds "
                f"{len(self._opening) + len(self._closing)} special tokens"
            )

    def prompts(self, prompts: Sequence[Content]) -> tuple[list[tuple[int, ...]], list[bool]]:
        """Token ids of prompts, and whether the start of each was cut off."""
        if isinstance(prompts, str):
            raise ArgumentError("`prompts` must be a sequence with one prompt for each item, got one string")
        templated = [self._has_template and not isinstance(prompt, str) for prompt in prompts]
        texts = self._tokenize(self._prompt_text(row, prompt) for row, prompt in enumerate(prompts))
        found, shortened = [], []
        for row, (ids, by_template) in enumerate(zip(texts, templated, strict=True)):
            # A template writes the special tokens itself.
            closing = [] if by_template else self._closing
            opening = self._opening
            if opening and ids[: len(opening)] == opening:
                ids = ids[len(opening) :]
            elif by_template:
                opening = []
            room = self.max_prompt_tokens - len(opening) - len(closing)
            kept = [*opening, *ids[max(len(ids) - room, 0) :], *closing]
            if not kept and self.tokenizer.bos_token_id is not None:
                kept = [self.tokenizer.bos_token_id]
            if not kept:
                raise DataError(
                    "the prompt is empty and the tokenizer has no token that starts a text; give a prompt", row=row
                )
            found.append(tuple(kept))
            shortened.append(len(ids) > room)
        return found, shortened

    def encode(self, prompts: Sequence[Content], responses: Sequence[Content], on_long: str) -> TokenSequences:
        """Token ids of prompts with responses, one each."""
        check_columns(prompts, responses)
        check_choice("on_long", on_long, ("raise", "shorten"))
        prompt_ids, prompt_shortened = self.prompts(
            [
                [{"role": "user", "content": prompt}]
                if isinstance(prompt, str) and not isinstance(response, str)
                else prompt
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        )
        texts = self._tokenize(
            render(prompt, response, self.tokenizer)[1] for prompt, response in zip(prompts, responses, strict=True)
        )
        response_ids, shortened = [], []
        for row, ids in enumerate(texts):
            closed = self._close(ids, row)
            too_long = len(closed) > self.max_new_tokens
            if too_long and on_long == "raise":
                raise DataError(
                    f"the response has {len(closed)} tokens with its end, more than `max_new_tokens` "
                    f'({self.max_new_tokens}); raise that limit, or pass `on_long="shorten"`', row=row,
                )  # fmt: skip
            response_ids.append(tuple(closed[: self.max_new_tokens]))
            shortened.append(too_long)
        return TokenSequences(
            tuple(prompt_ids), tuple(response_ids), tuple(not cut for cut in shortened), tuple(prompt_shortened),
            tuple(shortened),
        )  # fmt: skip

    def decode(self, responses: Iterable[Sequence[int]]) -> list[str]:
        """Texts of responses, without special tokens."""
        return [str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in responses]

    def _close(self, ids: list[int], row: int) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            return [*ids, self.stop_ids[0]]
        if self.decode([ids[end + 1 :]])[0].strip():
            raise DataError(
                "the response holds an end-of-sequence token before its end, where this policy would have stopped; "
                "remove that token, or cut the response there", row=row,
            )  # fmt: skip
        return ids[: end + 1]

    @property
    def _has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def _prompt_text(self, row: int, prompt: Content) -> str:
        if isinstance(prompt, str):
            return prompt
        if not self._has_template:
            return render(prompt, "-", self.tokenizer)[0]
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the prompt: {error}", row=row) from error
        return str(text)

    def _tokenize(self, texts: Iterable[str]) -> list[list[int]]:
        listed = list(texts)
        if not listed:
            return []
        encoded = self.tokenizer(listed, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def stop_tokens(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's own, then those that the model's settings name beside it.

    Encoders have no end-of-sequence token; their separator ends a text.

    Raises:
        ArgumentError: The tokenizer has neither.
    """
    own = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if own is None:
        raise ArgumentError(
            f"`tokenizer` {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no end-of-sequence token and no "
            "separator, so no response could end; set `tokenizer.eos_token`"
        )
    named = getattr(generation_config, "eos_token_id", None)
    # A setting that does not know the tokenizer's own token belongs to another tokenizer.
    others = [token for token in named if token != own] if isinstance(named, list) and own in named else []
    return (int(own), *others)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens around a prompt: what the tokenizer puts before a text, and a separator that it puts after one."""
    ordinary = (token for token in sorted(tokenizer.get_vocab()) if token not in tokenizer.all_special_tokens)
    for probe in ("a", *ordinary):
        body = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        if not body:
            continue
        whole = list(tokenizer(probe)["input_ids"])
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                closing = whole[start + len(body) :]
                # An end-of-sequence token would close the text that the response is to continue.
                return whole[:start], [token for token in closing if token == tokenizer.sep_token_id]
        break
    raise ArgumentError(
        f"`tokenizer` {tokenizer.name_or_path!r} changes the tokens of a text when it adds special ones; choose another"
    )


def token_spans(tokenizer: Any, text: str, count: int) -> Int[np.ndarray, "tokens 2"]:
    """Offsets of the first character of each of a text's first `count` tokens and of the one after its last.

    Tokens beyond those of the text, such as the end of the sequence, have an empty span at its end.

    Raises:
        ArgumentError: The tokenizer does not tell offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            f"`tokenizer` {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) does not tell where tokens stand in "
            "a text; use a fast tokenizer (one with a tokenizer.json)"
        )
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    found = np.full((count, 2), len(text), dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:count]
    found[: len(offsets)] = offsets
    return found

"""From texts to the distinct token sequences that a model must read."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Integer

from ..data.rendering import Content, render, shorten
from ..errors import ArgumentError, DataError
from ._checks import plain
from ._encoder import Encoder

#: Stands between a prompt and a response that are plain strings and are read as one sequence.
SEPARATOR = "\n\n"

#: Families that count positions from `pad_token_id + 1`, and so read fewer tokens than they have positions.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "xmod", "ibert", "data2vec-text")

#: The members of `TextInput` that go through a model as they are.
SequenceKind = Literal["joint", "prompt", "response"]


@dataclasses.dataclass
class Chunk:
    """Token sequences of some items: each distinct one once, and where the items use it (-1: empty prompt)."""

    words: list[int]
    sequences: list[np.ndarray] = dataclasses.field(default_factory=list)
    first_item: list[int] = dataclasses.field(default_factory=list)
    uses: dict[SequenceKind, list[int]] = dataclasses.field(default_factory=dict)
    shortened: dict[str, set[int]] = dataclasses.field(default_factory=lambda: {"prompt": set(), "response": set()})


@dataclasses.dataclass(frozen=True)
class SequencePlanner:
    """Tokenizes texts for an encoder; the settings are those of `FeatureExtractor`.

    Args:
        closing: Tokens that end every sequence of a tokenizer that ends none by itself.
    """

    encoder: Encoder
    _: dataclasses.KW_ONLY
    kinds: Sequence[SequenceKind]
    max_length: int
    on_long: str
    closing: tuple[int, ...] = ()

    def plan(self, items: range, pairs: list[tuple[Content, Content]]) -> Chunk:
        """Finds the distinct token sequences of some items."""
        chunk = Chunk([len(plain(response).split()) for _, response in pairs])
        if not self.kinds:
            return chunk
        rendered = [self._render(item, *pair) for item, pair in zip(items, pairs, strict=True)]
        joints = [
            prompt + SEPARATOR if prompt and isinstance(pair[0], str) and isinstance(pair[1], str) else prompt
            for (prompt, _), pair in zip(rendered, pairs, strict=True)
        ]
        texts = {response for _, response in rendered}
        texts.update(joints if "joint" in self.kinds else ())
        texts.update((prompt for prompt, _ in rendered) if "prompt" in self.kinds else ())
        tokens = self._tokenize(sorted(texts))
        known: dict[bytes, int] = {}
        for kind in self.kinds:
            chunk.uses[kind] = []
            for item, (prompt, response), joint in zip(items, rendered, joints, strict=True):
                if not len(tokens[response]):
                    raise DataError(
                        f"item {item}: no tokens are left of the response {response[:60]!r}; leave the item out"
                    )
                prompt_ids = tokens[{"joint": joint, "prompt": prompt}.get(kind, "")]
                response_ids = tokens["" if kind == "prompt" else response]
                if not len(prompt_ids) + len(response_ids):
                    chunk.uses[kind].append(-1)
                    continue
                ids = self._sequence(prompt_ids, response_ids, kind, item, chunk)
                index = known.setdefault(ids.tobytes(), len(chunk.sequences))
                if index == len(chunk.sequences):
                    chunk.sequences.append(ids)
                    chunk.first_item.append(item)
                chunk.uses[kind].append(index)
        return chunk

    def _render(self, item: int, prompt: Content, response: Content) -> tuple[str, str]:
        try:
            return render(prompt, response, self.encoder.tokenizer)
        except DataError as error:
            raise DataError(f"item {item}: {error}") from error

    def _tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        found = {"": np.empty(0, np.int64)}
        if texts := [text for text in texts if text]:
            encoded = self.encoder.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            found |= {text: np.array(ids, np.int64) for text, ids in zip(texts, encoded["input_ids"], strict=True)}
        return found

    def _sequence(
        self, prompt_ids: np.ndarray, response_ids: np.ndarray, kind: SequenceKind, item: int, chunk: Chunk
    ) -> Integer[np.ndarray, "tokens"]:
        """Puts one sequence together: shortened where needed, each special token there once."""
        first, last = self._special_tokens
        prompt, response = prompt_ids.tolist(), response_ids.tolist()
        # A chat template writes the special tokens itself; they must neither be doubled nor be cut off.
        opening, closing = (prompt or response), (response or prompt)
        if first and opening[: len(first)] == first:
            del opening[: len(first)]
        if last and closing[-len(last) :] == last:
            del closing[-len(last) :]
        room, count = self._room, len(prompt) + len(response)
        if count > room and self.on_long == "raise":
            total, limit = count + len(first) + len(last), room + len(first) + len(last)
            raise DataError(
                f"item {item}: the {kind} text has {total} tokens, at most {limit} fit "
                f"(`max_length={self.max_length}`); "
                'raise `max_length` if the model can read more, shorten the text, or pass `on_long="shorten"`'
            )
        ids, shortened = shorten(prompt, response, room)
        if count > room:
            chunk.shortened[shortened.value].add(item)
        return np.array([*first, *ids, *last], dtype=np.int64)

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after a sequence, found by looking at one."""
        tokenizer = self.encoder.tokenizer
        ordinary = (token for token in sorted(tokenizer.get_vocab()) if token not in tokenizer.all_special_tokens)
        for probe in ("a", *ordinary):
            body = tokenizer(probe, add_special_tokens=False)["input_ids"]
            if body:
                whole = tokenizer(probe)["input_ids"]
                for start in range(len(whole) - len(body) + 1):
                    if whole[start : start + len(body)] == body:
                        return list(whole[:start]), list(whole[start + len(body) :]) or list(self.closing)
                break
        raise ArgumentError(
            f"`model` {self.encoder.model!r}: its tokenizer changes the tokens of a text when it adds special ones; "
            "choose another model"
        )

    @cached_property
    def _room(self) -> int:
        """Tokens that fit beside the special ones."""
        config, special = self.encoder.config, sum(map(len, self._special_tokens))
        limit = min(self.max_length, self.encoder.tokenizer.model_max_length)
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            offset = any(family in config.model_type for family in _OFFSET_POSITIONS)
            limit = min(limit, positions - (config.pad_token_id + 1 if offset else 0))
        if limit <= special:
            raise ArgumentError(
                f"`max_length` must be at least {special + 1} for {self.encoder.model!r}, whose tokenizer adds "
                f"{special} special tokens, got {self.max_length}"
            )
        return int(limit - special)

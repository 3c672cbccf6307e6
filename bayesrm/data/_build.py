"""Builds the three tables of comparisons from a stream of judgements."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, UInt64

from ._digests import DigestIndex, pair_digests, text_digests
from ._rows import KINDS, Ragged, RowTable
from ._texts import IN_MEMORY_LIMIT, TemporaryFolder, Text, TextTable, TextWriter, count_words
from .formats import Judgement


class UniqueTexts:
    """Texts stored once each and numbered in order of first appearance."""

    def __init__(self, name: str, folder: TemporaryFolder, limit: int) -> None:
        self._index = DigestIndex()
        self._writer = TextWriter(name, folder=folder, limit=limit)

    def add(
        self, texts: Sequence[Text], digests: UInt64[np.ndarray, "texts 2"]
    ) -> tuple[Int64[np.ndarray, " texts"], Int64[np.ndarray, " new"]]:
        """Adds a batch; returns the number of each text, and the positions of those that are new."""
        numbers, new = self._index.add(digests)
        if new.size:
            fresh = [texts[position] for position in new]
            self._writer.append(
                pa.array([text.value for text in fresh], pa.large_string()), [text.is_messages for text in fresh]
            )
        return numbers, new

    def finish(self) -> TextTable:
        """Returns the table of distinct texts."""
        return self._writer.finish()


class TableBuilder:
    """Receives judgements batch by batch and keeps only arrays and Arrow tables.

    Args:
        in_memory_limit: Bytes of texts a table above which they go to a memory-mapped file.
        cache_dir: Where to make that file, the system's temporary folder by default.
    """

    def __init__(self, *, in_memory_limit: int = IN_MEMORY_LIMIT, cache_dir: str | Path | None = None) -> None:
        folder = TemporaryFolder(cache_dir)
        self._prompts = UniqueTexts("prompts", folder, in_memory_limit)
        self._items = UniqueTexts("items", folder, in_memory_limit)
        self._prompt_of_item: list[Int64[np.ndarray, " new"]] = []
        self._words: list[Int32[np.ndarray, " new"]] = []
        self._rows: list[RowTable] = []
        self._names: dict[str, int] = {}
        self._annotators: list[Int32[np.ndarray, " rows"]] = []
        self.num_mentions = 0

    def add_items(self, prompts: Sequence[Text], responses: Sequence[Text]) -> Int64[np.ndarray, " responses"]:
        """Adds responses, each with its prompt, and returns their item numbers, shape `(responses,)`."""
        distinct: dict[Text, int] = {}
        place = np.array([distinct.setdefault(prompt, len(distinct)) for prompt in prompts], np.int64)
        return self._add_items(list(distinct), place, responses)

    def add(self, judgements: Sequence[Judgement]) -> None:
        """Adds a batch of rows."""
        if not judgements:
            return
        counts = np.array([len(judgement.responses) for judgement in judgements], np.int64)
        responses = [response for judgement in judgements for response in judgement.responses]
        place = np.repeat(np.arange(len(judgements)), counts)
        numbers = self._add_items([judgement.prompt for judgement in judgements], place, responses)
        outcomes = np.array([value for judgement in judgements for value in judgement.outcome], np.int64)
        names = self._names
        self._annotators.append(
            np.array(
                [-1 if j.annotator is None else names.setdefault(j.annotator, len(names)) for j in judgements], np.int32
            )
        )
        self._rows.append(
            RowTable(
                kind=np.array([KINDS.index(judgement.kind) for judgement in judgements], np.int8),
                candidates=Ragged.from_lengths(numbers, counts),
                outcomes=Ragged.from_lengths(outcomes, np.array([len(j.outcome) for j in judgements], np.int64)),
                annotator=np.full(len(judgements), -1, np.int32),
                weight=np.array([judgement.weight for judgement in judgements], np.float64),
                margin=np.array([np.nan if j.margin is None else j.margin for j in judgements], np.float64),
                num_levels=np.zeros(len(judgements), np.int32),
            )
        )

    def _add_items(
        self, prompts: Sequence[Text], place: Int64[np.ndarray, " responses"], responses: Sequence[Text]
    ) -> Int64[np.ndarray, " responses"]:
        prompt_digests = text_digests([text.value for text in prompts], [text.is_messages for text in prompts])
        prompt_numbers, _ = self._prompts.add(prompts, prompt_digests)
        owner = prompt_numbers[place]
        digests = text_digests([text.value for text in responses], [text.is_messages for text in responses])
        numbers, new = self._items.add(responses, pair_digests(owner, digests))
        self._prompt_of_item.append(owner[new])
        self._words.append(np.array([count_words(responses[position]) for position in new], np.int32))
        self.num_mentions += len(responses)
        return numbers

    def finish_items(self) -> tuple[TextTable, TextTable, Int64[np.ndarray, " items"], Int32[np.ndarray, " items"]]:
        """Returns the prompts, the items, the prompt of each item and the words of each item."""
        none = np.empty(0, np.int64)
        return (
            self._prompts.finish(),
            self._items.finish(),
            np.concatenate([none, *self._prompt_of_item]),
            np.concatenate([none.astype(np.int32), *self._words]),
        )

    def finish_rows(self) -> RowTable:
        """Returns the rows; ratings are still the raw integers."""
        rows = RowTable.concatenate(self._rows)
        names = tuple(sorted(self._names))
        codes = {name: code for code, name in enumerate(names)}
        translate = np.array([codes[name] for name in self._names] + [-1], np.int32)  # code -1 finds the last entry
        annotator = translate[np.concatenate([np.empty(0, np.int32), *self._annotators])]
        self._rows.clear()
        return dataclasses.replace(rows, annotator=annotator, names=names)

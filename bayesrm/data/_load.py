"""Reads judgements into tables, and merges tables."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError, DataError
from ._build import TableBuilder
from ._fields import BadRowError, Row
from ._report import Report
from ._rows import FEEDBACK_KINDS, KINDS, Ragged, RowTable
from ._texts import Text, TextTable
from .base import Batch, OnBadRow, Source, describe_source, parse_batches, read_batches
from .formats import FORMATS, Format, Judgement, detect

_MAX_LEVELS = 1000


class FormatReader:
    """Detects the format of a source at its first batch and parses its rows."""

    def __init__(self, kind: str | None, levels: tuple[int, int] | None, formats: Sequence[Format]) -> None:
        if kind is not None and kind not in FEEDBACK_KINDS:
            raise ArgumentError(f"`kind` is {kind!r}; accepted are {', '.join(map(repr, FEEDBACK_KINDS))}")
        if levels is not None and not levels[0] < levels[1]:
            raise ArgumentError(f"`levels` is {levels}; give (lowest, highest) with the first below the second")
        self._asked = kind
        self._formats = formats
        self._levels = levels
        self._format: Format | None = None
        self._columns: set[str] = set()
        self.kind = ""
        self.num_rows = 0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, detecting the format at the first and noting the columns of each."""
        for batch in batches:
            columns = set().union(*batch.rows)
            if self._format is None:
                self._format, self.kind = detect(sorted(columns), self._asked, batch.source, self._formats)
                if self._levels is not None and self.kind != "rating":
                    raise ArgumentError(f"`levels` is given, but {batch.source} is read as {self.kind}, not as rating")
            elif batch.start == 0:
                other, _ = detect(sorted(columns), self._asked, batch.source, self._formats)
                if other is not self._format:
                    raise DataError(
                        f"its format is {other.name}, but the files before it are {self._format.name}; load them apart "
                        "and join them with `Comparisons.concatenate`",
                        source=batch.source,
                    )
            self._columns |= columns
            self.num_rows += len(batch.rows)
            yield batch

    def parse(self, row: Row) -> Iterator[Judgement]:
        """Parses one row."""
        assert self._format is not None  # `watch` has seen the batch of this row
        for judgement in self._format.parse(row, self.kind):
            if self.kind == "rating":
                self._check_level(judgement.outcome[0])
            yield judgement

    @property
    def name(self) -> str:
        """Name of the format."""
        return "" if self._format is None else self._format.name

    @property
    def ignored(self) -> tuple[str, ...]:
        """Columns that the format does not use."""
        return () if self._format is None else tuple(sorted(self._columns - self._format.used))

    def _check_level(self, rating: int) -> None:
        if self._levels is not None and not self._levels[0] <= rating <= self._levels[1]:
            raise BadRowError(f"the rating {rating} is outside `levels`, {self._levels[0]} to {self._levels[1]}")
        if abs(rating) > 2**30:
            raise BadRowError(f"the rating {rating} is too large for a level; bring ratings to a few levels")


def load(
    source: Source,
    builder: TableBuilder,
    kind: str | None,
    columns: Mapping[str, str] | None,
    split: str | None,
    on_bad_row: OnBadRow,
    levels: tuple[int, int] | None,
    formats: Sequence[Format] = FORMATS,
) -> tuple[Any, ...]:
    """Reads a source; returns the leading fields of `Comparisons`, whose `load` documents the arguments."""
    reader = FormatReader(kind, levels, formats)
    refused: list[tuple[int, str]] = []
    batches = reader.watch(read_batches(source, columns=columns, split=split))
    for judgements in parse_batches(batches, reader.parse, on_bad_row, refused):
        builder.add(judgements)
    name = describe_source(source)
    if reader.num_rows == 0:
        raise DataError("it holds no rows; give at least one", source=name)
    if len(refused) == reader.num_rows:
        first = f"row {refused[0][0]}: {refused[0][1]}"
        raise DataError(f"none of its {reader.num_rows} rows can be used; the first is {first}", source=name)
    tables = builder.finish_items()
    rows = _number_levels(builder.finish_rows(), levels, name)
    repeats = builder.num_mentions - len(tables[1])
    report = Report(name, reader.name, reader.num_rows, builder.num_mentions, repeats, tuple(refused), reader.ignored)
    return (*tables, rows, report)


def concatenate(parts: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Merges the fields of several `Comparisons`; `Comparisons.concatenate` documents it."""
    if not parts:
        raise ArgumentError("`parts` is empty; give at least one set")
    with_texts = {part["_items"].has_texts for part in parts}
    if len(with_texts) > 1:
        raise ArgumentError("some `parts` have texts and others only features; give one sort")
    with_features = {None if part["_features"] is None else part["_features"].shape[1] for part in parts}
    if len(with_features) > 1:
        raise ArgumentError(f"`parts` have features of widths {with_features}; give all or none the same width")
    merge = _merge_texts if with_texts.pop() else _append_items
    prompts, items, prompt_of_item, words, numbers = merge(parts)
    moved = []
    for part, number in zip(parts, numbers, strict=True):
        rows: RowTable = part["_rows"]
        candidates = Ragged(number[rows.candidates.values].astype(np.int32), rows.candidates.starts)
        moved.append(RowTable(**{**vars(rows), "candidates": candidates}))
    rows = RowTable.concatenate(moved)
    levels = np.unique(rows.num_levels[rows.num_levels > 0])
    if len(levels) > 1:
        raise DataError(f"the parts have ratings of {levels.tolist()} levels; load them with the same `levels`")
    features = _merge_features([part["_features"] for part in parts], numbers, len(items))
    ids = _merge_ids([part["_ids"] for part in parts], numbers, len(items))
    mentions = sum(len(number) for number in numbers)
    refused = tuple(entry for part in parts for entry in part["_report"].refused)
    name = " + ".join(dict.fromkeys(part["_report"].source for part in parts))
    report = Report(name, "concatenated", None, mentions, mentions - len(items), refused)
    return prompts, items, prompt_of_item, words, rows, report, features, ids


def _number_levels(rows: RowTable, levels: tuple[int, int] | None, source: str) -> RowTable:
    """Counts the levels of ratings from 0."""
    if not len(rows) or KINDS[rows.kind[0]] != "rating":
        return rows
    values = rows.outcomes.values
    low, high = levels or (int(values.min()), int(values.max()))
    if not 1 <= high - low < _MAX_LEVELS:
        raise DataError(
            f"ratings span {low} to {high}; that is {high - low + 1} levels, accepted are 2 to {_MAX_LEVELS}: pass "
            "`levels`, or bring ratings to a few levels",
            source=source,
        )
    counted = Ragged((values - low).astype(np.int32), rows.outcomes.starts)
    return RowTable(**{**vars(rows), "outcomes": counted, "num_levels": np.full(len(rows), high - low + 1, np.int32)})


def _merge_texts(parts: Sequence[Mapping[str, Any]]) -> tuple[TextTable, TextTable, np.ndarray, Any, list[np.ndarray]]:
    builder = TableBuilder()
    numbers = []
    for part in parts:
        prompt_of_item = part["_prompt_of_item"]
        found, start = [np.empty(0, np.int64)], 0
        for batch in part["_items"].batches():
            owners = prompt_of_item[start : start + len(batch)]
            prompts = [part["_prompts"][int(owner)] for owner in owners]
            found.append(builder.add_items(prompts, _texts(batch)))
            start += len(batch)
        numbers.append(np.concatenate(found))
    return (*builder.finish_items(), numbers)


def _append_items(parts: Sequence[Mapping[str, Any]]) -> tuple[TextTable, TextTable, np.ndarray, Any, list[np.ndarray]]:
    item_starts = np.cumsum([0] + [len(part["_items"]) for part in parts])
    prompt_starts = np.cumsum([0] + [len(part["_prompts"]) for part in parts])
    owners = [part["_prompt_of_item"] + start for part, start in zip(parts, prompt_starts, strict=False)]
    words = [part["_words"] for part in parts]
    return (
        TextTable(None, int(prompt_starts[-1])),
        TextTable(None, int(item_starts[-1])),
        np.concatenate(owners),
        None if any(counts is None for counts in words) else np.concatenate(words),
        [np.arange(start, stop) for start, stop in itertools.pairwise(item_starts)],
    )


def _merge_features(arrays: Sequence[Any], numbers: Sequence[np.ndarray], num_items: int) -> np.ndarray | None:
    if arrays[0] is None:
        return None
    merged = np.zeros((num_items, arrays[0].shape[1]), np.result_type(*arrays))
    filled = np.zeros(num_items, bool)
    for part, (array, number) in enumerate(zip(arrays, numbers, strict=True)):
        differs = filled[number] & (merged[number] != array).any(axis=1)
        if differs.any():
            item = int(np.argmax(differs))
            raise DataError(f"item {item} of part {part} has other features than the same item of a part before it")
        merged[number] = array
        filled[number] = True
    return merged


def _merge_ids(ids: Sequence[tuple[str, ...] | None], numbers: Sequence[np.ndarray], num_items: int) -> Any:
    if any(names is None for names in ids):
        return None
    merged = [""] * num_items
    for names, number in zip(ids, numbers, strict=True):
        for name, item in zip(names or (), number, strict=True):
            merged[item] = merged[item] or name
    return tuple(merged)


def _texts(batch: Any) -> list[Text]:
    columns = zip(batch["text"].to_pylist(), batch["is_messages"].to_pylist(), strict=True)
    return [Text(value, flag) for value, flag in columns]

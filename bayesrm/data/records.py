"""What demonstrations, corrections and conversations have in common: rows of texts under prompts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Float64, Int32, Int64

from ..errors import ArgumentError
from . import _load
from ._arrays import check_row_indices
from ._build import TableBuilder
from ._report import Report
from ._rows import RowTable
from ._select import compact, split_prompts
from ._texts import IN_MEMORY_LIMIT, TextTable
from .base import OnBadRow, Source
from .formats import Format

# Not `typing.Self`, which run-time type checkers of single methods cannot resolve.
_Records = TypeVar("_Records", bound="Records")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Records:
    """Rows of one or more texts under a prompt, stored like `Comparisons`; use one of the subclasses.

    Attributes:
        formats: Formats that the class reads.
    """

    formats: ClassVar[tuple[Format, ...]] = ()

    _prompts: TextTable
    _items: TextTable
    _prompt_of_item: np.ndarray
    _words: np.ndarray
    _rows: RowTable
    _report: Report

    @classmethod
    def load(
        cls: type[_Records],
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        on_bad_row: OnBadRow = "raise",
        in_memory_limit: int = IN_MEMORY_LIMIT,
        cache_dir: str | Path | None = None,
    ) -> _Records:
        """Reads rows; the class names the columns it needs.

        Args:
            source: Path (`.parquet`, `.jsonl`, `.json`, `.csv`) or list of paths, list of dicts, `datasets.Dataset`,
                or hub id.
            columns: Renames columns: our name to the source's name.
            split: Split to read, for a data set with several.
            on_bad_row: `"raise"` stops at the first row that cannot be used; `"skip"` leaves such rows out and lists
                them in `refused`.
            in_memory_limit: Bytes of texts above which a table goes to a memory-mapped file.
            cache_dir: Where to make that file (the system's temporary folder by default); it is removed with the data.

        Raises:
            DataError: The source or a row cannot be used; the message names the file, the row and the reason.
            ArgumentError: An argument has a value that is not accepted.
        """
        builder = TableBuilder(in_memory_limit=in_memory_limit, cache_dir=cache_dir)
        return cls(*_load.load(source, builder, None, columns, split, on_bad_row, None, cls.formats))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_prompts(self) -> int:
        """Number of unique prompts."""
        return len(self._prompts)

    @property
    def prompt_of_row(self) -> Int64[np.ndarray, " rows"]:
        """Prompt of each row, shape `(rows,)`."""
        candidates = self._rows.candidates
        owners: np.ndarray = self._prompt_of_item[candidates.values[candidates.starts[:-1]]]
        return owners

    @property
    def annotators(self) -> tuple[str, ...]:
        """Sorted names of the annotators; a part keeps all names of the whole, so that codes agree."""
        return self._rows.names

    @property
    def annotator(self) -> Int32[np.ndarray, " rows"]:
        """Position in `annotators` of each row's annotator, -1 where none is named, shape `(rows,)`."""
        return self._rows.annotator

    @property
    def weight(self) -> Float64[np.ndarray, " rows"]:
        """Weight of each row, shape `(rows,)`; 0 masks it."""
        return self._rows.weight

    @property
    def refused(self) -> tuple[tuple[int, str], ...]:
        """Index and reason of each row of the source that was left out."""
        return self._report.refused

    def select(self: _Records, row_indices: Any) -> _Records:
        """Returns the selected rows with the texts that they use.

        Args:
            row_indices: Indices of rows in the order wanted, shape `(selected,)`, or a mask, shape `(rows,)`.

        Raises:
            ArgumentError: An index is out of range, or nothing is selected.
        """
        rows = self._rows.select(check_row_indices(row_indices, len(self)))
        prompts, items, prompt_of_item, rows, used = compact(self._prompts, self._items, self._prompt_of_item, rows)
        return dataclasses.replace(
            self,
            _prompts=prompts,
            _items=items,
            _prompt_of_item=prompt_of_item,
            _words=self._words[used],
            _rows=rows,
            _report=self._report.part(),
        )

    def split_by_prompt(self: _Records, test_fraction: float, *, seed: int) -> tuple[_Records, _Records]:
        """Splits the rows so that no prompt is on both sides.

        Args:
            test_fraction: Share of the prompts held out, between 0 and 1; at least one prompt falls on each side.
            seed: Seed of the draw; the same seed gives the same split.

        Returns:
            The training and the test part, rows in their order.

        Raises:
            ArgumentError: The fraction is out of range.
            DataError: There are fewer than two prompts.
        """
        train, test = split_prompts(self.prompt_of_row, test_fraction, seed)
        return self.select(train), self.select(test)

    def summary(self) -> str:
        """What was read, and which rows were refused."""
        lines = [repr(self), *self._report.lines()]
        if self._rows.names:
            missing = int((self._rows.annotator < 0).sum())
            lines.append(f"annotators: {len(self._rows.names)}" + (f", {missing} rows name none" if missing else ""))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows, {self.num_prompts} prompts)"

    def __str__(self) -> str:
        return self.summary()

    def _row_texts(self, row: int) -> tuple[Any, ...]:
        """Returns the prompt and the texts of a row, messages decoded."""
        if not 0 <= row < len(self):
            raise ArgumentError(f"`row` is {row}; accepted are 0 to {len(self) - 1}")
        items = self._rows.candidates[row].tolist()
        prompt = self._prompts[int(self._prompt_of_item[items[0]])].decode()
        return (prompt, *(self._items[item].decode() for item in items))

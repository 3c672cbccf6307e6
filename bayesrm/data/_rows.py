"""The table of rows: what was compared and what was answered, as flat arrays."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int, Int8, Int32, Int64

#: Kinds of feedback that comparisons hold.
FEEDBACK_KINDS = ("choice", "ranking", "rating", "approval")

#: Every kind of row; a row's kind code is its position here.
KINDS = (*FEEDBACK_KINDS, "demonstration", "correction")


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Lists of integers of unequal length.

    Attributes:
        values: All lists end to end, shape `(values,)`.
        starts: Where each list starts, and where the last ends, shape `(lists + 1,)`.
    """

    values: Int32[np.ndarray, " values"]
    starts: Int64[np.ndarray, " ends"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, position: int) -> np.ndarray:
        part: np.ndarray = self.values[self.starts[position] : self.starts[position + 1]]
        return part

    @property
    def lengths(self) -> Int64[np.ndarray, " lists"]:
        """Length of each list, shape `(lists,)`."""
        return np.diff(self.starts)

    @classmethod
    def from_lengths(cls, values: Int[np.ndarray, " values"], lengths: Int[np.ndarray, " lists"]) -> "Ragged":
        """Cuts `values` into lists of the given lengths."""
        starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(values.astype(np.int32, copy=False), starts)

    @classmethod
    def from_matrix(cls, matrix: Int[np.ndarray, "lists length"]) -> "Ragged":
        """Takes the rows of a matrix as lists."""
        return cls.from_lengths(matrix.reshape(-1), np.full(len(matrix), matrix.shape[1]))

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Puts the lists of several parts one after another."""
        values = np.concatenate([part.values for part in parts]) if parts else np.empty(0, np.int32)
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.empty(0, np.int64)
        return cls.from_lengths(values, lengths)

    def positions(self, lists: Int[np.ndarray, " selected"]) -> Int64[np.ndarray, " values"]:
        """Positions in `values` of the selected lists, end to end."""
        lengths = self.lengths[lists]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        positions: np.ndarray = np.repeat(self.starts[lists], lengths) + within
        return positions

    def select(self, lists: Int[np.ndarray, " selected"]) -> "Ragged":
        """Returns the selected lists."""
        return Ragged.from_lengths(self.values[self.positions(lists)], self.lengths[lists])

    def to_arrow(self) -> pa.Array:
        """Returns an Arrow list column."""
        return pa.ListArray.from_arrays(pa.array(self.starts.astype(np.int32)), pa.array(self.values))


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Rows of feedback; every array has one entry a row.

    Attributes:
        kind: Position of the kind in `KINDS`, shape `(rows,)`.
        candidates: Items compared in each row.
        outcomes: Encoded feedback of each row (encodings: `FeedbackGroup`).
        annotator: Position in `names`, or -1 where no annotator is named, shape `(rows,)`.
        weight: Weight of the row's log likelihood, shape `(rows,)`.
        margin: Handicap of candidate 0 against candidate 1, NaN where there is none, shape `(rows,)`.
        num_levels: Number of levels of a rating, 0 for other kinds, shape `(rows,)`.
        names: Sorted names of the annotators.
    """

    kind: Int8[np.ndarray, " rows"]
    candidates: Ragged
    outcomes: Ragged
    annotator: Int32[np.ndarray, " rows"]
    weight: Float64[np.ndarray, " rows"]
    margin: Float64[np.ndarray, " rows"]
    num_levels: Int32[np.ndarray, " rows"]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.kind)

    def select(self, rows: Int[np.ndarray, " selected"]) -> "RowTable":
        """Returns the selected rows; annotators keep their codes, so that a part can be scored with the whole's fit."""
        return RowTable(
            kind=self.kind[rows],
            candidates=self.candidates.select(rows),
            outcomes=self.outcomes.select(rows),
            annotator=self.annotator[rows],
            weight=self.weight[rows],
            margin=self.margin[rows],
            num_levels=self.num_levels[rows],
            names=self.names,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["RowTable"]) -> "RowTable":
        """Puts the rows of several tables one after another and pools their annotators by name."""
        names = tuple(sorted({name for part in parts for name in part.names}))
        codes = {name: code for code, name in enumerate(names)}
        annotators = []
        for part in parts:
            translate = np.array([codes[name] for name in part.names] + [-1], np.int32)  # code -1 finds the last entry
            annotators.append(translate[part.annotator])
        return cls(
            kind=np.concatenate([part.kind for part in parts]),
            candidates=Ragged.concatenate([part.candidates for part in parts]),
            outcomes=Ragged.concatenate([part.outcomes for part in parts]),
            annotator=np.concatenate(annotators),
            weight=np.concatenate([part.weight for part in parts]),
            margin=np.concatenate([part.margin for part in parts]),
            num_levels=np.concatenate([part.num_levels for part in parts]),
            names=names,
        )

    def to_arrow(self) -> pa.Table:
        """Returns the table in the form in which users see and store it."""
        names = pa.array([*self.names, None], pa.string())
        codes = np.where(self.annotator < 0, len(self.names), self.annotator)
        return pa.table(
            {
                "kind": pa.array(KINDS).take(pa.array(self.kind)),
                "candidates": self.candidates.to_arrow(),
                "outcome": self.outcomes.to_arrow(),
                "annotator": names.take(pa.array(codes)),
                "weight": pa.array(self.weight),
                "margin": pa.array(self.margin, mask=np.isnan(self.margin)),
                "num_levels": pa.array(self.num_levels, mask=self.num_levels == 0),
            }
        )

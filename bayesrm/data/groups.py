"""What a likelihood sees of the data: rows of one kind of feedback and one number of candidates, without padding."""

import dataclasses
from typing import Any

from .._typing import Array


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The circumstances under which a group of rows was judged: everything a likelihood may use, except the outcome.

    Attributes:
        kind: `"choice"`, `"ranking"`, `"rating"` or `"approval"`.
        num_rows: Number of rows in the group.
        num_candidates: Candidates in each row, K (1 for ratings and approvals).
        depth: For rankings, the number of ranked places (K for a full ranking, 1 for top-1); otherwise `None`.
        num_levels: For ratings, the number of ordered levels; otherwise `None`.
        annotator: Integer code of each row's annotator, shape `(rows,)`, or `None` when the data name none.
        num_annotators: Number of distinct annotators in the whole data set (0 when the data name none).
        margin: Handicap of candidate 0 against candidate 1 in units of reward, shape `(rows,)`, or `None`.
        lengths: Response lengths in words, floating, shape `(rows, K)`, or `None` when unknown.
    """

    kind: str
    num_rows: int
    num_candidates: int
    depth: int | None = None
    num_levels: int | None = None
    annotator: Array | None = None
    num_annotators: int = 0
    margin: Array | None = None
    lengths: Array | None = None


@dataclasses.dataclass(frozen=True)
class FeedbackGroup:
    """Rows of one kind and one shape: which items were compared, what was answered, and how much it counts.

    Attributes:
        comparison: What the likelihood sees.
        items: Index of each candidate in the table of unique items, shape `(rows, K)`, integer.
        outcome: The feedback, integer. *choice*: index of the chosen candidate, or K for a tie, shape `(rows,)`.
            *ranking*: candidate indices from best to worst, shape `(rows, depth)`. *rating*: level from 0, shape
            `(rows,)`. *approval*: 0 or 1, shape `(rows,)`.
        weight: Weight of each row's log likelihood, shape `(rows,)`; 0 masks a row.
        rows: Position of each row in the `Comparisons` it came from, shape `(rows,)`, integer.
    """

    comparison: Comparison
    items: Array
    outcome: Array
    weight: Array
    rows: Array

    @property
    def label(self) -> str:
        """Name of the group: kind, number of candidates and, for rankings, depth (`"choice.2"`, `"ranking.4.3"`)."""
        c = self.comparison
        parts = [c.kind, str(c.num_candidates)] + ([str(c.depth)] if c.depth is not None else [])
        return ".".join(parts)

    def map_arrays(self, convert: Any) -> "FeedbackGroup":
        """Returns a copy with `convert` applied to every array (for example to move it to a device or to JAX)."""

        def fields(obj: Any) -> dict[str, Any]:
            values = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
            return {k: convert(v) if hasattr(v, "shape") else v for k, v in values.items()}

        comparison = dataclasses.replace(self.comparison, **fields(self.comparison))
        return dataclasses.replace(self, **(fields(self) | {"comparison": comparison}))

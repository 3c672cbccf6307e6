"""Comparisons: unique items and the rows of feedback that name them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from ..errors import ArgumentError
from . import _arrays, _canonical, _groups, _load
from ._build import TableBuilder
from ._report import Report
from ._rows import KINDS, RowTable
from ._select import compact, split_prompts
from ._texts import IN_MEMORY_LIMIT, Text, TextTable
from .base import OnBadRow, Source
from .groups import FeedbackGroup

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Comparisons:
    """Feedback that compares or judges responses, with every prompt and every (prompt, response) stored once.

    Made by `load`, `from_pairs`, `from_arrays` or `concatenate`; the fields are for this package's own use. Texts stay
    in Arrow (in memory while small, else in a memory-mapped file) and rows are integers, so a model encodes an item
    once however many rows name it.

    Four kinds of feedback may be mixed: *choice* of one candidate or a tie, *ranking* (full, partial or top-1),
    *rating* on ordered levels, and *approval*. A row may name its `annotator`, has a `weight` (0 masks it), and a pair
    may have a `margin`, a handicap of candidate 0 against candidate 1 in units of reward.

    Example:
        >>> data = Comparisons.from_pairs(["Capital of France?"] * 2, ["Paris."] * 2, ["Lyon.", "I will not say."])
        >>> len(data), data.num_prompts, data.num_items
        (2, 1, 3)
        >>> data.groups()[0].items.tolist()
        [[0, 1], [0, 2]]
    """

    _prompts: TextTable
    _items: TextTable
    _prompt_of_item: np.ndarray
    _words: np.ndarray | None
    _rows: RowTable
    _report: Report
    _features: np.ndarray | None = None
    _ids: tuple[str, ...] | None = None

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        kind: str | None = None,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        on_bad_row: OnBadRow = "raise",
        annotator_column: str | None = None,
        levels: tuple[int, int] | None = None,
        in_memory_limit: int = IN_MEMORY_LIMIT,
        cache_dir: str | Path | None = None,
    ) -> "Comparisons":
        """Reads feedback; the format is told by the columns.

        | format | columns |
        |---|---|
        | preference pairs (TRL) | `prompt` (optional), `chosen`, `rejected`; optional `margin`, `tie` |
        | pairs with a verdict | `prompt` (optional), `response_a`, `response_b`, `winner` (a, b, tie or bothbad) |
        | choice among responses | `prompt`, `responses`, `choice` (index, or `"tie"`) |
        | ranked responses | `prompt`, `responses`, `ranking` (indices, best first, may be partial) |
        | scored completions | `prompt`, `completions` (each with `response` and `overall_score`, `score` or `rating`) |
        | scored responses | `prompt`, `responses`, `scores` |
        | unpaired labels (TRL) | `prompt`, `completion` or `response`, `label` |
        | ratings | `prompt`, `response`, `rating` |
        | this package's own | written by `to_parquet` |

        Each may have `annotator` and `weight`; `instruction` may stand for `prompt`. Texts are strings or lists of
        messages. Scored formats become *choices* by default: all pairs of a row (each with the row's weight), equal
        scores as ties, which loses nothing of the order. `kind="ranking"` makes one ranking a row and refuses ties;
        `kind="rating"` makes one rating a response and needs whole numbers.

        Args:
            source: Path (`.parquet`, `.jsonl`, `.json`, `.csv`) or list of paths, list of dicts, `datasets.Dataset`, or
                hub id.
            kind: Kind of feedback to read a scored format as, or to tell formats apart.
            columns: Renames columns: our name to the source's name.
            split: Split to read, for a data set with several.
            on_bad_row: `"raise"` stops at the first row that cannot be used; `"skip"` leaves such rows out and lists
                them in `refused`.
            annotator_column: Column that names the annotator; the same as `columns={"annotator": ...}`.
            levels: Lowest and highest rating; by default those of the data.
            in_memory_limit: Bytes of texts above which a table goes to a memory-mapped file.
            cache_dir: Where to make that file (the system's temporary folder by default); it is removed with the data.

        Raises:
            DataError: The source or a row cannot be used; the message names the file, the row and the reason.
            ArgumentError: An argument has a value that is not accepted.

        Example:
            >>> rows = [{"prompt": "2 + 2?", "responses": ["4", "5", "22"], "scores": [9, 3, 3]}]
            >>> Comparisons.load(rows).describe_row(2)
            "choice on '2 + 2?': a tie among '5' | '22'"
        """
        if annotator_column is not None:
            columns = {**(columns or {}), "annotator": annotator_column}
        builder = TableBuilder(in_memory_limit=in_memory_limit, cache_dir=cache_dir)
        if not columns and _canonical.is_canonical(source):
            return cls(*_canonical.read(Path(source), in_memory_limit, cache_dir))
        return cls(*_load.load(source, builder, kind, columns, split, on_bad_row, levels))

    @classmethod
    def from_pairs(
        cls,
        prompts: Sequence[Any],
        chosen: Sequence[Any],
        rejected: Sequence[Any],
        *,
        annotator: Sequence[str | int | None] | None = None,
        weight: Sequence[float] | None = None,
        margin: Sequence[float | None] | None = None,
    ) -> "Comparisons":
        """Makes choices between two responses from lists of equal length.

        Args:
            prompts: Strings or lists of messages, one a row.
            chosen: The better responses.
            rejected: The worse responses.
            annotator: Name of each row's annotator.
            weight: Weight of each row.
            margin: Handicap of the chosen response in units of reward.

        Raises:
            ArgumentError: The lists differ in length.
            DataError: A row cannot be used.

        Example:
            >>> len(Comparisons.from_pairs(["Hi"], ["Hello!"], ["What?"]))
            1
        """
        given = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
        given |= {k: v for k, v in (("annotator", annotator), ("weight", weight), ("margin", margin)) if v is not None}
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) > 1:
            raise ArgumentError(f"the lists differ in length: {lengths}; give one entry a row")
        return cls.load([dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)])

    @classmethod
    def from_arrays(
        cls,
        features: Any,
        *,
        candidates: Any = None,
        outcome: Any,
        kind: str = "choice",
        prompt_index: Any = None,
        annotator: Sequence[str | int | None] | None = None,
        weight: Any = None,
        margin: Any = None,
        words: Any = None,
        num_levels: int | None = None,
        ids: Sequence[str] | None = None,
    ) -> "Comparisons":
        """Makes rows over items that are known by their features alone.

        Args:
            features: Features of each item, shape `(items, D)`.
            candidates: Items compared in each row, shape `(rows, K)`; by default, for ratings and approvals, every
                item in turn.
            outcome: Feedback of each row as in `FeedbackGroup`: shape `(rows,)`, or `(rows, depth)` for rankings.
            kind: `"choice"`, `"ranking"`, `"rating"` or `"approval"`.
            prompt_index: Prompt of each item, shape `(items,)`; by default items that rows connect share one.
            annotator: Name of each row's annotator.
            weight: Weight of each row, shape `(rows,)`; 1 by default.
            margin: Handicap of candidate 0 against candidate 1, shape `(rows,)`, NaN for none; pairs only.
            words: Length of each response in words, shape `(items,)`.
            num_levels: Number of levels of a rating; by default the highest in the data plus one.
            ids: Names of the items.

        Raises:
            ArgumentError: An array has a wrong shape or type.
            DataError: An entry cannot be used; the message names the row or item.

        Example:
            >>> data = Comparisons.from_arrays([[0.0], [1.0]], candidates=[[1, 0], [0, 1]], outcome=[0, 2])
            >>> len(data), data.num_items, data.num_prompts
            (2, 2, 1)
        """
        matrix = _arrays.check_features(features)
        rows = _arrays.make_rows(
            len(matrix),
            candidates,
            outcome,
            kind,
            annotator=annotator,
            weight=weight,
            margin=margin,
            num_levels=num_levels,
        )
        prompt_of_item = _arrays.check_prompts(len(matrix), rows, prompt_index)
        return cls(
            TextTable(None, int(prompt_of_item.max()) + 1),
            TextTable(None, len(matrix)),
            prompt_of_item,
            _arrays.check_words(len(matrix), words),
            rows,
            Report("arrays", f"{kind} over features"),
            matrix,
            _arrays.check_ids(len(matrix), ids),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Comparisons"]) -> "Comparisons":
        """Puts the rows of several sets one after another; kinds may differ, and equal prompts and items are merged.

        Items without texts are never merged. Annotators are pooled by name.

        Args:
            parts: At least one set; all or none with features, of equal width.

        Raises:
            ArgumentError: There is no part, or some have features (or texts) and others not.
            DataError: Two parts have different features for one item, or ratings with different numbers of levels.

        Example:
            >>> pairs = Comparisons.from_pairs(["Hi"], ["Hello!"], ["What?"])
            >>> labels = Comparisons.load([{"prompt": "Hi", "completion": "Hello!", "label": True}])
            >>> both = Comparisons.concatenate([pairs, labels])
            >>> both.kinds, both.num_items
            (('choice', 'approval'), 2)
        """
        return cls(*_load.concatenate([vars(part) for part in parts]))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_items(self) -> int:
        """Number of unique (prompt, response) items."""
        return len(self._items)

    @property
    def num_prompts(self) -> int:
        """Number of unique prompts."""
        return len(self._prompts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of feedback present, in the order choice, ranking, rating, approval."""
        return tuple(KINDS[code] for code in np.unique(self._rows.kind))

    @property
    def annotators(self) -> tuple[str, ...]:
        """Sorted names of the annotators; a part of a set keeps all names of the whole, so that codes agree."""
        return self._rows.names

    @property
    def refused(self) -> tuple[tuple[int, str], ...]:
        """Index and reason of each row of the source that was left out."""
        return self._report.refused

    @property
    def features(self) -> np.ndarray | None:
        """Features of each item, shape `(items, D)`, or `None`."""
        return self._features

    @property
    def prompt_of_item(self) -> Int64[np.ndarray, " items"]:
        """Prompt of each item, shape `(items,)`."""
        return self._prompt_of_item

    @property
    def prompt_of_row(self) -> Int64[np.ndarray, " rows"]:
        """Prompt of each row, shape `(rows,)`: all candidates of a row answer the same one."""
        candidates = self._rows.candidates
        owners: np.ndarray = self._prompt_of_item[candidates.values[candidates.starts[:-1]]]
        return owners

    @property
    def words(self) -> Int32[np.ndarray, " items"] | None:
        """Length of each response in whitespace-separated words, shape `(items,)`, or `None` if unknown."""
        return self._words

    @property
    def ids(self) -> tuple[str, ...] | None:
        """Names of the items, or `None`."""
        return self._ids

    def groups(self) -> list[FeedbackGroup]:
        """Returns the rows as torch tensors, grouped by kind, number of candidates and depth, so that none is padded.

        Groups come in the order of kind (choice, ranking, rating, approval), K and depth; rows keep their order. Rows
        of weight 0 are included. A row without annotator in data that name some has the code -1, and one without margin
        in a group where others have one has the margin 0.

        Returns:
            Groups with int64 and float64 tensors on the CPU.
        """
        return _groups.make_groups(self._rows, self._words)

    def text(self, item: int) -> tuple[Any, Any]:
        """Returns the prompt and the response of an item: strings, or lists of messages. Items without text have `""`.

        Args:
            item: Index of the item.

        Raises:
            ArgumentError: There is no such item.
        """
        if not 0 <= item < self.num_items:
            raise ArgumentError(f"`item` is {item}; accepted are 0 to {self.num_items - 1}")
        return self._prompts[int(self._prompt_of_item[item])].decode(), self._items[item].decode()

    def describe_row(self, row: int) -> str:
        """Returns one line that tells a person what was compared in a row and what was answered.

        Args:
            row: Index of the row.

        Raises:
            ArgumentError: There is no such row.
        """
        if not 0 <= row < len(self):
            raise ArgumentError(f"`row` is {row}; accepted are 0 to {len(self) - 1}")
        return _groups.describe(self._rows, row, self._shown_prompt, self._shown_response)

    @property
    def prompts(self) -> "datasets.Dataset":
        """The unique prompts: columns `prompt` (a string, or messages as JSON) and `is_messages`."""
        import datasets

        return datasets.Dataset(self._prompts.to_arrow().rename_columns(["prompt", "is_messages"]))

    @property
    def items(self) -> "datasets.Dataset":
        """The unique items: columns `prompt_index`, `response`, `is_messages`, and `words` and `id` where known."""
        import datasets

        return datasets.Dataset(_canonical.items_table(self._items, self._prompt_of_item, self._words, self._ids))

    @property
    def rows(self) -> "datasets.Dataset":
        """The rows: `kind`, `candidates`, `outcome`, `annotator`, `weight`, `margin`, `num_levels`."""
        import datasets

        return datasets.Dataset(self._rows.to_arrow())

    def with_features(self, array: Any) -> "Comparisons":
        """Returns the same data with features.

        Args:
            array: Features of each item, shape `(items, D)`, finite.

        Raises:
            DataError: An entry is not finite; the message names the first such item.
            ArgumentError: The shape does not fit.
        """
        return dataclasses.replace(self, _features=_arrays.check_features(array, num_items=self.num_items))

    def with_outcomes(self, outcomes: Sequence[Any]) -> "Comparisons":
        """Returns the same rows with other outcomes, as a simulation needs.

        Args:
            outcomes: The outcome of each group, aligned with `groups()` and encoded as there.

        Raises:
            ArgumentError: The number of groups or a shape differs.
            DataError: An outcome is out of range; the message names the row.
        """
        return dataclasses.replace(self, _rows=_groups.replace_outcomes(self._rows, outcomes))

    def select(self, row_indices: Any) -> "Comparisons":
        """Returns the selected rows, with the items and prompts that they use and the features of those items.

        Args:
            row_indices: Indices of rows in the order wanted, shape `(selected,)`, or a mask, shape `(rows,)`.

        Raises:
            ArgumentError: An index is out of range, or nothing is selected.

        Example:
            >>> data = Comparisons.from_pairs(["a", "b"], ["yes", "one"], ["no", "two"])
            >>> data.select([1]).text(0)
            ('b', 'one')
        """
        indices = _arrays.check_row_indices(row_indices, len(self))
        rows = self._rows.select(indices)
        prompts, items, prompt_of_item, rows, used = compact(self._prompts, self._items, self._prompt_of_item, rows)
        return dataclasses.replace(
            self,
            _prompts=prompts,
            _items=items,
            _prompt_of_item=prompt_of_item,
            _words=None if self._words is None else self._words[used],
            _rows=rows,
            _report=self._report.part(),
            _features=None if self._features is None else self._features[used],
            _ids=None if self._ids is None else tuple(self._ids[item] for item in used),
        )

    def split_by_prompt(self, test_fraction: float, *, seed: int) -> "tuple[Comparisons, Comparisons]":
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

    def to_parquet(self, path: str | Path) -> None:
        """Writes everything, features included, to one Parquet file that `load` reads back.

        Args:
            path: File to write; it must end in `.parquet`.

        Raises:
            ArgumentError: The path does not end in `.parquet`.
        """
        _canonical.write(
            Path(path),
            self._prompts,
            self._items,
            self._prompt_of_item,
            self._words,
            self._ids,
            self._rows,
            self._features,
        )

    def summary(self) -> str:
        """What was read: source and format, kinds and ties, annotators, merged duplicates, refused rows."""
        return "\n".join([repr(self), *self._report.lines(), *_groups.summarise(self._rows, self._report)])

    def __repr__(self) -> str:
        features = "" if self._features is None else f", features of width {self._features.shape[1]}"
        return (
            f"Comparisons({len(self)} rows, {self.num_items} items, {self.num_prompts} prompts, "
            f"kinds {', '.join(self.kinds)}{features})"
        )

    def __str__(self) -> str:
        return self.summary()

    def _shown_prompt(self, item: int) -> Text:
        return self._prompts[int(self._prompt_of_item[item])]

    def _shown_response(self, item: int) -> Text:
        return self._items[item] if self._items.has_texts else Text(f"item {item}")

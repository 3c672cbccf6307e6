"""Checks arrays that a user hands over."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from ..errors import ArgumentError, DataError
from ._groups import check_outcomes
from ._rows import FEEDBACK_KINDS, KINDS, Ragged, RowTable


def check_features(features: Any, num_items: int | None = None) -> np.ndarray:
    """Returns features as a finite floating-point matrix, shape `(items, D)`; a float32 array is not copied.

    Raises:
        ArgumentError: The shape or type is wrong.
        DataError: An item has an entry that is not finite.
    """
    array = _to_numpy(features, "features")
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] == 0 or num_items not in (None, array.shape[0]):
        wanted = "(items, D)" if num_items is None else f"({num_items}, D), one row an item"
        raise ArgumentError(f"`features` has shape {array.shape}; give a non-empty matrix of shape {wanted}")
    if array.dtype not in (np.float32, np.float64):
        if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
            raise ArgumentError(f"`features` has type {array.dtype}; give real numbers")
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        item = int(np.argmin(finite))
        column = int(np.argmin(np.isfinite(array[item])))
        raise DataError(
            f"item {item} has the feature {array[item, column]} in column {column}; features must be finite, and "
            f"{int((~finite).sum())} items have some that are not"
        )
    return array


def make_rows(
    num_items: int,
    candidates: Any,
    outcome: Any,
    kind: str,
    *,
    annotator: Sequence[str | int | None] | None,
    weight: Any,
    margin: Any,
    num_levels: int | None,
) -> RowTable:
    """Makes the row table from arrays; `Comparisons.from_arrays` documents them."""
    if kind not in FEEDBACK_KINDS:
        raise ArgumentError(f"`kind` is {kind!r}; accepted are {', '.join(map(repr, FEEDBACK_KINDS))}")
    single = kind in ("rating", "approval")
    if candidates is None:
        if not single:
            raise ArgumentError(f"`candidates` is missing; a {kind} needs an integer array of shape (rows, K)")
        candidates = np.arange(num_items)[:, None]
    items = _integers(candidates, "candidates")
    if single and items.ndim == 1:
        items = items[:, None]
    if items.ndim != 2 or len(items) == 0 or (items.shape[1] != 1 if single else items.shape[1] < 2):
        wanted = "(rows,) or (rows, 1)" if single else "(rows, K) with K of at least 2"
        raise ArgumentError(f"`candidates` has shape {items.shape}; a {kind} needs shape {wanted}")
    _check_candidates(items, num_items)
    outcomes = _integers(outcome, "outcome")
    if kind == "ranking":
        if outcomes.ndim != 2 or len(outcomes) != len(items) or not 1 <= outcomes.shape[1] <= items.shape[1]:
            raise ArgumentError(
                f"`outcome` has shape {outcomes.shape}; {len(items)} rankings of {items.shape[1]} need shape "
                f"({len(items)}, depth) with depth from 1 to {items.shape[1]}"
            )
    elif outcomes.shape != (len(items),):
        raise ArgumentError(f"`outcome` has shape {outcomes.shape}; {len(items)} rows need shape ({len(items)},)")
    names, codes = _annotators(annotator, len(items))
    margins = np.full(len(items), np.nan) if margin is None else _column(margin, "margin", len(items))
    if margin is not None:
        if items.shape[1] != 2 or kind != "choice":
            raise ArgumentError(f"`margin` is given for a {kind} of {items.shape[1]}; only a choice of 2 has a margin")
        if np.isinf(margins).any():
            raise DataError("`margin` is infinite; give a finite number", row=int(np.argmax(np.isinf(margins))))
    weights = np.ones(len(items)) if weight is None else _column(weight, "weight", len(items))
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"`weight` is {weights[row]}; give a finite number of at least 0 (0 masks the row)", row=row)
    rows = RowTable(
        kind=np.full(len(items), KINDS.index(kind), np.int8),
        candidates=Ragged.from_matrix(items),
        outcomes=Ragged.from_matrix(outcomes.reshape(len(items), -1)),
        annotator=codes,
        weight=weights,
        margin=margins,
        num_levels=np.full(len(items), _levels(kind, outcomes, num_levels), np.int32),
        names=names,
    )
    check_outcomes(rows, None)
    return rows


def check_prompts(num_items: int, rows: RowTable, prompt_index: Any) -> Int64[np.ndarray, " items"]:
    """Returns the prompt of each item, shape `(items,)`: what is given, or the items that rows connect as one prompt.

    Raises:
        ArgumentError: The shape or type is wrong.
        DataError: A row compares answers to different prompts.
    """
    starts, lengths = rows.candidates.starts[:-1], rows.candidates.lengths
    first = np.repeat(rows.candidates.values[starts], lengths)
    if prompt_index is None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        links = coo_array((np.ones(len(first), bool), (first, rows.candidates.values)), shape=(num_items, num_items))
        return np.asarray(connected_components(links, directed=False)[1], np.int64)
    prompts = _integers(prompt_index, "prompt_index")
    if prompts.shape != (num_items,) or (prompts < 0).any():
        raise ArgumentError(
            f"`prompt_index` has shape {prompts.shape} and minimum {prompts.min(initial=0)}; give one index of at "
            f"least 0 an item, shape ({num_items},)"
        )
    other = prompts[first] != prompts[rows.candidates.values]
    if other.any():
        place = int(np.argmax(other))
        row = int(np.searchsorted(starts, place, side="right")) - 1
        raise DataError(
            f"its candidates answer the prompts {np.unique(prompts[rows.candidates[row]]).tolist()}; "
            "compare answers to one prompt only",
            row=row,
        )
    return prompts


def check_words(num_items: int, words: Any) -> Int32[np.ndarray, " items"] | None:
    """Returns lengths in words, shape `(items,)`."""
    if words is None:
        return None
    counts = _integers(words, "words")
    if counts.shape != (num_items,) or (counts < 0).any():
        raise ArgumentError(
            f"`words` has shape {counts.shape}; give a count of at least 0 an item, shape ({num_items},)"
        )
    return counts.astype(np.int32)


def check_ids(num_items: int, ids: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the names of the items."""
    if ids is None:
        return None
    if len(ids) != num_items:
        raise ArgumentError(f"`ids` has {len(ids)} entries; give one for each of the {num_items} items")
    return tuple(str(name) for name in ids)


def check_row_indices(indices: Any, num_rows: int) -> Int64[np.ndarray, " selected"]:
    """Returns indices of rows, from indices or a mask; a negative one is refused rather than counted from the end."""
    array = _to_numpy(indices, "row_indices")
    if array.dtype == bool:
        if array.shape != (num_rows,):
            raise ArgumentError(f"`row_indices` is a mask of shape {array.shape}; give shape ({num_rows},)")
        array = np.flatnonzero(array)
    if array.ndim != 1 or array.size == 0:
        raise ArgumentError(f"`row_indices` has shape {array.shape}; select at least one row, shape (selected,)")
    array = _integers(array, "row_indices")
    if array.min() < 0 or array.max() >= num_rows:
        raise ArgumentError(f"`row_indices` spans {array.min()} to {array.max()}; accepted are 0 to {num_rows - 1}")
    return array


def _check_candidates(items: np.ndarray, num_items: int) -> None:
    outside = ((items < 0) | (items >= num_items)).any(axis=1)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(f"its candidates are {items[row].tolist()}; accepted are items 0 to {num_items - 1}", row=row)
    ordered = np.sort(items, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if twice.any():
        row = int(np.argmax(twice))
        raise DataError(f"its candidates {items[row].tolist()} name an item twice; compare different items", row=row)


def _levels(kind: str, outcomes: np.ndarray, num_levels: int | None) -> int:
    if kind != "rating":
        if num_levels is not None:
            raise ArgumentError(f"`num_levels` is {num_levels} for a {kind}; only ratings have levels")
        return 0
    levels = max(int(outcomes.max()) + 1, 2) if num_levels is None else num_levels
    if levels < 2:
        raise ArgumentError(f"`num_levels` is {num_levels}; a rating needs at least 2")
    return levels


def _annotators(
    annotator: Sequence[str | int | None] | None, num_rows: int
) -> tuple[tuple[str, ...], Int32[np.ndarray, " rows"]]:
    if annotator is None:
        return (), np.full(num_rows, -1, np.int32)
    if len(annotator) != num_rows:
        raise ArgumentError(f"`annotator` has {len(annotator)} entries; give one for each of the {num_rows} rows")
    shown = [None if value is None else str(value) for value in annotator]
    names = tuple(sorted({name for name in shown if name is not None}))
    codes = {name: code for code, name in enumerate(names)}
    return names, np.array([-1 if name is None else codes[name] for name in shown], np.int32)


def _column(values: Any, name: str, num_rows: int) -> np.ndarray:
    array = _to_numpy(values, name)
    if array.shape != (num_rows,) or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ArgumentError(
            f"`{name}` has shape {array.shape} and type {array.dtype}; give one number a row, shape ({num_rows},)"
        )
    return array.astype(np.float64)


def _integers(values: Any, name: str) -> Int64[np.ndarray, "..."]:
    array = _to_numpy(values, name)
    if np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ArgumentError(f"`{name}` has type {array.dtype} or entries that are no whole numbers; give integers")
    return array.astype(np.int64)


def _to_numpy(values: Any, name: str) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ArgumentError(f"`{name}` cannot be made an array ({error}); give lists of equal length") from None

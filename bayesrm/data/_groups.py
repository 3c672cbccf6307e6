"""Rows of one shape as tensors, and rows in words."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64

from ..errors import ArgumentError, DataError
from ._report import Report
from ._rows import FEEDBACK_KINDS, KINDS, Ragged, RowTable
from ._texts import Text
from .groups import Comparison, FeedbackGroup

_CHOICE, _RANKING, _RATING, _APPROVAL = range(len(FEEDBACK_KINDS))


def group_rows(rows: RowTable) -> list[Int64[np.ndarray, " group"]]:
    """Returns the rows of each group, groups in the order of kind, number of candidates and depth."""
    depth = np.where(rows.kind == _RANKING, rows.outcomes.lengths, 0)
    keys = np.stack([rows.kind.astype(np.int64), rows.candidates.lengths, depth], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    counts = np.bincount(group.reshape(-1))
    return np.split(order, np.cumsum(counts)[:-1]) if len(rows) else []


def make_groups(rows: RowTable, words: Int32[np.ndarray, " items"] | None) -> list[FeedbackGroup]:
    """Turns rows into groups of tensors; `Comparisons.groups` documents them."""
    return [_make_group(rows, members, words) for members in group_rows(rows)]


def _make_group(
    rows: RowTable, members: Int64[np.ndarray, " group"], words: Int32[np.ndarray, " items"] | None
) -> FeedbackGroup:
    code = int(rows.kind[members[0]])
    items = _matrix(rows.candidates, members)
    outcome = _matrix(rows.outcomes, members)
    margin = rows.margin[members]
    comparison = Comparison(
        kind=KINDS[code],
        num_rows=len(members),
        num_candidates=items.shape[1],
        depth=outcome.shape[1] if code == _RANKING else None,
        num_levels=int(rows.num_levels[members[0]]) if code == _RATING else None,
        annotator=_tensor(rows.annotator[members], np.int64) if rows.names else None,
        num_annotators=len(rows.names),
        margin=None if np.isnan(margin).all() else _tensor(np.nan_to_num(margin, nan=0.0), np.float64),
        lengths=None if words is None else _tensor(words[items], np.float64),
    )
    return FeedbackGroup(
        comparison=comparison,
        items=_tensor(items, np.int64),
        outcome=_tensor(outcome if code == _RANKING else outcome[:, 0], np.int64),
        weight=_tensor(rows.weight[members], np.float64),
        rows=_tensor(members, np.int64),
    )


def replace_outcomes(rows: RowTable, outcomes: Sequence[Any]) -> RowTable:
    """Replaces the outcomes group by group; `Comparisons.with_outcomes` documents it."""
    groups = group_rows(rows)
    if len(outcomes) != len(groups):
        raise ArgumentError(f"`outcomes` has {len(outcomes)} entries; give one for each of the {len(groups)} groups")
    values = rows.outcomes.values.copy()
    for place, (members, outcome) in enumerate(zip(groups, outcomes, strict=True)):
        code = int(rows.kind[members[0]])
        shape: tuple[int, ...] = (len(members),)
        if code == _RANKING:
            shape += (int(rows.outcomes.lengths[members[0]]),)
        array = np.asarray(outcome)
        if array.shape != shape or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
            raise ArgumentError(
                f"`outcomes`[{place}] has shape {array.shape} and type {array.dtype}; give integers of shape {shape}"
            )
        values[rows.outcomes.positions(members)] = array.reshape(-1)
    replaced = dataclasses.replace(rows, outcomes=Ragged(values, rows.outcomes.starts))
    check_outcomes(replaced, None)
    return replaced


def check_outcomes(rows: RowTable, source: str | None) -> None:
    """Raises a `DataError` that names the first row whose outcome its kind and candidates do not allow."""
    for members in group_rows(rows):
        code = int(rows.kind[members[0]])
        if code != _RANKING and (rows.outcomes.lengths[members] != 1).any():
            row = int(members[np.argmax(rows.outcomes.lengths[members] != 1)])
            raise DataError(
                f"a {KINDS[code]} has one outcome, not {rows.outcomes[row].tolist()}", source=source, row=row
            )
        outcome = _matrix(rows.outcomes, members)
        width = int(rows.candidates.lengths[members[0]])
        if code == _CHOICE:
            above, accepted = np.full(len(members), width), f"0 to {width - 1} for a candidate, {width} for a tie"
        elif code == _RANKING:
            above, accepted = np.full(len(members), width - 1), f"distinct candidates from 0 to {width - 1}"
        elif code == _RATING:
            above = rows.num_levels[members].astype(np.int64) - 1
            accepted = f"levels from 0 to {above.max()}"
        else:
            above, accepted = np.ones(len(members), np.int64), "0 and 1"
        bad = ((outcome < 0) | (outcome > above[:, None])).any(axis=1)
        if code == _RANKING:
            ordered = np.sort(outcome, axis=1)
            bad |= (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if bad.any():
            first = int(np.argmax(bad))
            found = outcome[first].tolist() if code == _RANKING else int(outcome[first, 0])
            raise DataError(
                f"the outcome of the {KINDS[code]} is {found}; accepted are {accepted}",
                source=source,
                row=int(members[first]),
            )


def describe(rows: RowTable, row: int, prompt: Callable[[int], Text], response: Callable[[int], Text]) -> str:
    """Returns one line about a row."""
    items = rows.candidates[row].tolist()
    outcome = rows.outcomes[row].tolist()
    code = int(rows.kind[row])
    shown = [_shown(response(item)) for item in items]
    if code == _CHOICE:
        answer = "a tie among" if outcome[0] == len(items) else f"{shown[outcome[0]]} chosen among"
        said = f"{answer} {' | '.join(shown)}"
    elif code == _RANKING:
        said = " > ".join(shown[place] for place in outcome)
        rest = [text for place, text in enumerate(shown) if place not in outcome]
        said += f" > the rest ({' | '.join(rest)})" if rest else ""
    elif code == _RATING:
        said = f"level {outcome[0]} of 0..{rows.num_levels[row] - 1} for {shown[0]}"
    else:
        said = f"{'approved' if outcome[0] else 'disapproved'} {shown[0]}"
    notes = []
    if rows.annotator[row] >= 0:
        notes.append(f"by {rows.names[rows.annotator[row]]}")
    if rows.weight[row] != 1:
        notes.append(f"weight {rows.weight[row]:g}")
    if not np.isnan(rows.margin[row]):
        notes.append(f"margin {rows.margin[row]:g}")
    return f"{KINDS[code]} on {_shown(prompt(items[0]))}: {said}" + (f" ({', '.join(notes)})" if notes else "")


def summarise(rows: RowTable, report: Report) -> list[str]:
    """Returns lines on kinds, ties, annotators and merged duplicates."""
    lines = []
    for members in group_rows(rows):
        code = int(rows.kind[members[0]])
        width = int(rows.candidates.lengths[members[0]])
        line = f"{KINDS[code]} of {width}: {len(members)} rows" if width > 1 else f"{KINDS[code]}: {len(members)} rows"
        outcome = _matrix(rows.outcomes, members)
        if code == _CHOICE:
            line += f", {int((outcome[:, 0] == width).sum())} ties"
        elif code == _RANKING:
            line += f", {outcome.shape[1]} places ranked"
        elif code == _RATING:
            line += f", {int(rows.num_levels[members[0]])} levels"
        else:
            line += f", {int(outcome.sum())} approved"
        lines.append(line)
    if rows.names:
        missing = int((rows.annotator < 0).sum())
        lines.append(f"annotators: {len(rows.names)}" + (f", {missing} rows name none" if missing else ""))
    masked = int((rows.weight == 0).sum())
    if masked:
        lines.append(f"masked by weight 0: {masked} rows")
    if report.num_mentions is not None:
        lines.append(f"responses named: {report.num_mentions}, repeats of an item merged: {report.num_repeats}")
    return lines


def _matrix(lists: Ragged, members: Int64[np.ndarray, " group"]) -> Int32[np.ndarray, "group length"]:
    matrix: np.ndarray = lists.values[lists.positions(members)].reshape(len(members), -1)
    return matrix


def _tensor(array: np.ndarray, dtype: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=dtype))


def _shown(text: Text, width: int = 50) -> str:
    value = text.value
    if text.is_messages:
        value = " / ".join(f"{message['role']}: {message['content']}" for message in json.loads(value))
    value = " ".join(value.split())
    return repr(value if len(value) <= width else value[: width - 3] + "...")

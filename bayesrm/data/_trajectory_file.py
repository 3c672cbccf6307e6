"""Reads trajectories from rows, one a row, and writes them as Parquet."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, DataError
from ._fields import BadRowError, Row, present, read_flag, read_list, shorten_repr
from ._report import Report
from .base import Batch, OnBadRow, Source, describe_source, parse_batches, read_batches

if TYPE_CHECKING:
    from .trajectories import Trajectories

_USED = {"id", "group", "states", "actions", "ended", "demonstrated", "preferred_to"}


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """A row that can be used.

    Attributes:
        row: Its index in the source.
        name: Its id, or the index.
        states: Its states.
        actions: Its actions.
        ended: Whether it ended.
        demonstrated: Whether it is a demonstration, `None` where the row does not say.
        group: The name of its group, if it has one.
        worse: Names of the trajectories it was preferred to.
    """

    row: int
    name: str
    states: NDArray[Any]
    actions: NDArray[np.int64]
    ended: bool
    demonstrated: bool | None
    group: str | None
    worse: list[str]


class _Reader:
    """Parses rows one after another, and checks each against those before it."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.columns: set[str] = set()
        self._rows: dict[str, int] = {}
        self._first: _Parsed | None = None

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on, after a look at the columns of each source."""
        for batch in batches:
            columns = set().union(*batch.rows)
            if batch.start == 0 and not {"states", "actions"} <= columns:
                raise DataError(
                    f"the columns {sorted(columns)} hold no trajectories; accepted are `states` and `actions` (lists), "
                    "with `id`, `ended`, `demonstrated`, `preferred_to` and `group` if you like",
                    source=batch.source,
                )
            self.columns |= columns
            yield batch

    def parse(self, row: Row) -> Iterator[_Parsed]:
        """Parses one row."""
        index, self.num_rows = self.num_rows, self.num_rows + 1
        states, actions = _states(row), _actions(row)
        if len(states) != len(actions):
            hint = "; leave out the state after the last action" if len(states) == len(actions) + 1 else ""
            raise BadRowError(
                f"`states` has {len(states)} entries and `actions` {len(actions)}; give the action of each state{hint}"
            )
        name, group = _name(row.get("id"), "`id`"), _name(row.get("group"), "`group`")
        known = str(index) if name is None else name
        if known in self._rows:
            raise BadRowError(f"`id` is {known!r}, which row {self._rows[known]} has too; give each its own")
        worse = _names(row.get("preferred_to"))
        if known in worse:
            raise BadRowError(f"`preferred_to` names {known!r}, the trajectory itself; name others")
        ended, demonstrated = (None if row.get(n) in (None, "") else read_flag(row[n], f"`{n}`")
                               for n in ("ended", "demonstrated"))  # fmt: skip
        parsed = _Parsed(index, known, states, actions, ended is not False, demonstrated, group, worse)
        self._check_like_first(parsed)
        self._first = self._first or parsed
        self._rows[known] = index
        yield parsed

    def _check_like_first(self, parsed: _Parsed) -> None:
        first = self._first
        if first is None:
            return
        if parsed.states.shape[1:] != first.states.shape[1:]:
            raise BadRowError(f"`states` holds {_kind(parsed.states)}, row {first.row} {_kind(first.states)}")
        if (parsed.group is None) != (first.group is None):
            here, there = ("a", "none") if parsed.group is not None else ("none", "one")
            raise BadRowError(f"`group` has {here} name here and {there} in row {first.row}; give all rows one or none")


def load(source: Source, columns: Mapping[str, str] | None, split: str | None, on_bad_row: OnBadRow) -> dict[str, Any]:
    """Reads a source; returns the arguments of `Trajectories.from_arrays` and the report."""
    reader = _Reader()
    refused: list[tuple[int, str]] = []
    batches = reader.watch(read_batches(source, columns=columns, split=split))
    rows = [entry for part in parse_batches(batches, reader.parse, on_bad_row, refused) for entry in part]
    name = describe_source(source)
    if not rows:
        first = f"row {refused[0][0]}: {refused[0][1]}"
        raise DataError(f"none of its {reader.num_rows} rows can be used; the first is {first}", source=name)
    pairs = _preferences(rows, name, on_bad_row, refused)
    # A trajectory that was judged was not given as an example, whether or not the judgement can be used.
    judged = {n for r in rows for n in (*r.worse, *([r.name] if r.worse else []))}
    return {
        "states": [r.states for r in rows],
        "actions": [r.actions for r in rows],
        "ended": [r.ended for r in rows],
        "demonstrated": [r.name not in judged if r.demonstrated is None else r.demonstrated for r in rows],
        "preferences": pairs,
        "ids": [r.name for r in rows],
        "group": None if rows[0].group is None else [str(r.group) for r in rows],
        "report": Report(
            name, "trajectories", reader.num_rows, refused=tuple(sorted(refused)),
            ignored=tuple(sorted(reader.columns - _USED)),
        ),
    }  # fmt: skip


def write(data: "Trajectories", path: Path) -> None:
    """Writes one Parquet file; it appears under its name only once it is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix != ".parquet":
        raise ArgumentError(f"`path` is {str(path)!r}; it must end in .parquet")
    starts = pa.array(np.concatenate([[0], np.cumsum(data.lengths)]).astype(np.int32))
    steps = pa.array(data.states.reshape(-1))
    if data.states.ndim == 2:
        steps = pa.FixedSizeListArray.from_arrays(steps, data.states.shape[1]).cast(pa.list_(steps.type))
    names = [str(i) for i in range(len(data))] if data.ids is None else list(data.ids)
    worse: list[list[str]] = [[] for _ in names]
    for better, other in data.preferences.tolist():
        worse[better].append(names[other])
    columns: dict[str, Any] = {} if data.ids is None else {"id": pa.array(names, pa.string())}
    if data.group is not None:
        columns["group"] = pa.array(data.group, pa.string())
    columns |= {
        "states": pa.ListArray.from_arrays(starts, steps),
        "actions": pa.ListArray.from_arrays(starts, pa.array(data.actions)),
        "ended": pa.array(data.ended),
        "demonstrated": pa.array(data.demonstrated),
        "preferred_to": pa.array(worse, pa.list_(pa.string())),
    }
    unfinished = path.with_name(path.name + ".part")
    try:
        pq.write_table(pa.table(columns), unfinished, compression="zstd")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _preferences(
    rows: Sequence[_Parsed], source: str, on_bad_row: OnBadRow, refused: list[tuple[int, str]]
) -> list[tuple[int, int]]:
    """Pairs of places, the better first; names that no row has are refused like rows."""
    place = {r.name: i for i, r in enumerate(rows)}
    pairs = []
    for i, r in enumerate(rows):
        for name in r.worse:
            if name in place:
                pairs.append((i, place[name]))
                continue
            reason = f"`preferred_to` names {name!r}, which is the id of no row that can be used"
            if on_bad_row == "raise":
                raise DataError(f"{reason}; repair the row", source=source, row=r.row)
            refused.append((r.row, f"{reason}; this preference alone is left out"))
    return pairs


def _states(row: Row) -> NDArray[Any]:
    values = read_list(row[present(row, "states")], "`states`")
    if not values:
        raise BadRowError("`states` is empty; give at least one step")
    try:
        states = np.asarray(values)
    except ValueError:
        raise BadRowError("`states` has states of different lengths; give each the same features") from None
    if states.ndim == 1 and np.issubdtype(states.dtype, np.integer):
        if states.min() < 0:
            raise BadRowError(f"`states` has {states.min()}; states are counted from 0")
        return states.astype(np.int64)
    if states.ndim == 2 and states.shape[1] and np.issubdtype(states.dtype, np.number):
        if not np.isfinite(states).all():
            step = int(np.argmin(np.isfinite(states).all(1)))
            raise BadRowError(f"`states`[{step}] is {shorten_repr(values[step])}; features are finite numbers")
        return states.astype(np.float64)
    wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, int)), values[0])
    raise BadRowError(f"`states` has {shorten_repr(wrong)}; a state is a whole number, or a list of numbers (features)")


def _actions(row: Row) -> NDArray[np.int64]:
    values = read_list(row[present(row, "actions")], "`actions`")
    for step, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise BadRowError(f"`actions`[{step}] is {shorten_repr(value)}; actions are whole numbers from 0")
    return np.array(values, dtype=np.int64)


def _name(value: Any, what: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRowError(f"{what} is {shorten_repr(value)}; give a name or a whole number")
    return str(value)


def _names(value: Any) -> list[str]:
    """The field `preferred_to`: an id or a list of ids."""
    listed = [value] if isinstance(value, int) or (isinstance(value, str) and not value.startswith("[")) else value
    names = [] if listed is None else [_name(v, "`preferred_to`") for v in read_list(listed, "`preferred_to`")]
    return [name for name in names if name is not None]


def _kind(states: NDArray[Any]) -> str:
    return "numbers" if states.ndim == 1 else f"features of width {states.shape[1]}"

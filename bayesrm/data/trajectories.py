"""Trajectories of an agent: states, actions, and who is thought to have acted better."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..errors import ArgumentError, DataError
from . import _trajectory_file
from ._report import Report
from .base import OnBadRow, Source
from .groups import Comparison, FeedbackGroup


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trajectories:
    """N trajectories, their steps one after another.

    Attributes:
        states: State in which each step's action was taken: numbers, shape `(M,)`, or features, shape `(M, D)`.
        actions: Actions, shape `(M,)`, from 0.
        lengths: Steps of each trajectory, shape `(N,)`.
        ended: Whether the last action of each ended the episode; otherwise the trajectory was cut. Shape `(N,)`.
        demonstrated: Whether each is a demonstration, whose actions are to be imitated; shape `(N,)`.
        preferences: Pairs of trajectories, the first preferred to the second, shape `(P, 2)`.
        ids: Names of the trajectories, all different, or `None`.
        group: Name of the set that each belongs to, whose members may stand in for each other: of candidates to choose
            from, like the responses to one prompt. Or `None`.

    Raises:
        DataError: Shapes disagree, or a value is out of range; the message names the trajectory.

    Example:
        >>> data = Trajectories.from_arrays([[0, 1, 2], [0, 0]], [[1, 1, 0], [0, 0]], ended=[True, False])
        >>> data
        <Trajectories: 2 trajectories of 2 to 3 steps, 5 steps in all, 3 states, 2 actions>
    """

    states: NDArray[Any]
    actions: Int[np.ndarray, "steps"]
    lengths: Int[np.ndarray, "trajectories"]
    ended: Bool[np.ndarray, "trajectories"]
    demonstrated: Bool[np.ndarray, "trajectories"]
    preferences: Int[np.ndarray, "pairs 2"]
    ids: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    _report: Report | None = None

    def __post_init__(self) -> None:
        count = len(self.lengths)
        if self.states.dtype == np.bool_:
            raise DataError("the states are True and False; give numbers from 0 on, or features")
        if np.issubdtype(self.states.dtype, np.integer) and self.states.ndim == 1:
            # Small integers would index as a mask, or not at all.
            object.__setattr__(self, "states", self.states.astype(np.int64, copy=False))
        if bool((self.lengths < 1).any()):
            raise DataError(f"trajectory {int(np.argmin(self.lengths))} has no step; leave it out")
        total = int(self.lengths.sum())
        if len(self.states) != total or self.actions.shape != (total,):
            raise DataError(
                f"the lengths sum to {total} steps, with {len(self.states)} states and {len(self.actions)} actions"
            )
        _check_flags(count, ended=self.ended, demonstrated=self.demonstrated)
        self._check_steps()
        self._check_names()
        if self.preferences.ndim != 2 or self.preferences.shape[1] != 2:
            raise DataError(f"`preferences` has shape {self.preferences.shape}; it is (pairs, 2)")
        beyond = ((self.preferences < 0) | (self.preferences >= count)).any(1)
        wrong = np.flatnonzero(beyond | (self.preferences[:, 0] == self.preferences[:, 1]))
        if len(wrong):
            raise DataError(
                f"preference {wrong[0]} is between trajectories {self.preferences[wrong[0]].tolist()}; it names two "
                f"different ones of {count}"
            )

    def _check_steps(self) -> None:
        numbered = self.states.ndim == 1
        if self.states.ndim not in (1, 2) or np.issubdtype(self.states.dtype, np.floating) == numbered:
            raise DataError(
                f"`states` has shape {self.states.shape} and dtype {self.states.dtype}; states are whole numbers, "
                "shape (steps,), or features that are floating, shape (steps, D)"
            )
        bad = self.states < 0 if numbered else ~np.isfinite(self.states).all(1)
        reason = "a state below 0" if numbered else "a feature that is not finite"
        for wrong, what in ((bad, reason), (self.actions < 0, "an action below 0")):
            if bool(wrong.any()):
                raise DataError(f"trajectory {int(self.owners[np.argmax(wrong)])} has {what}")

    def _check_names(self) -> None:
        for name, values in (("ids", self.ids), ("group", self.group)):
            if values is not None and len(values) != len(self):
                raise DataError(f"`{name}` has {len(values)} entries; there are {len(self)} trajectories")
        if self.ids is not None and len(set(self.ids)) < len(self):
            twice = collections.Counter(self.ids).most_common(1)[0][0]
            raise DataError(f"`ids` names {twice!r} more than once; give each trajectory its own")

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        split: str | None = None,
        on_bad_row: OnBadRow = "raise",
    ) -> "Trajectories":
        """Reads trajectories, one a row.

        | column | holds |
        |---|---|
        | `states` | state of each step: whole numbers from 0, or lists of numbers (features) |
        | `actions` | action taken in each, whole numbers from 0 |
        | `ended` | optional: whether the last action ended the episode (true by default); otherwise it was cut |
        | `demonstrated` | optional: whether its actions are to be imitated; by default where nobody judged it |
        | `preferred_to` | optional: id, or list of ids, of the trajectories that this one was preferred to |
        | `id` | optional: its name; without one, the index of its row |
        | `group` | optional: name of the set of candidates that it belongs to, for `select` |

        A trajectory named twice in `preferred_to` was preferred twice. One that is in a preference, on either side, is
        no demonstration unless its row says so: what was rejected is never imitated by accident.

        Args:
            source: Path (`.parquet`, `.jsonl`, `.json`, `.csv`) or list of paths, list of dicts, `datasets.Dataset`, or
                hub id.
            columns: Renames columns: our name to the source's name.
            split: Split to read, for a data set with several.
            on_bad_row: `"raise"` stops at the first row that cannot be used; `"skip"` leaves such rows, and preferences
                that name them, out and lists them in `refused`.

        Raises:
            DataError: The source or a row cannot be used; the message names the file, the row and the reason.
            ArgumentError: An argument has a value that is not accepted.

        Example:
            >>> rows = [
            ...     {"id": "short", "states": [0, 2], "actions": [1, 0], "preferred_to": ["long"]},
            ...     {"id": "long", "states": [0, 1, 2], "actions": [0, 1, 0]},
            ... ]
            >>> data = Trajectories.load(rows)
            >>> data.preferences.tolist(), data.demonstrated.tolist()
            ([[0, 1]], [False, False])
        """
        found = _trajectory_file.load(source, columns, split, on_bad_row)
        report = found.pop("report")
        return dataclasses.replace(cls.from_arrays(**found), _report=report)

    @classmethod
    def from_arrays(
        cls,
        states: Sequence[Any] | NDArray[Any],
        actions: Sequence[Any] | NDArray[Any],
        *,
        ended: bool | Sequence[bool] | NDArray[np.bool_] = True,
        demonstrated: bool | Sequence[bool] | NDArray[np.bool_] | None = None,
        preferences: Sequence[Sequence[int]] | NDArray[np.integer] = (),
        ids: Sequence[str] | None = None,
        group: Sequence[str] | None = None,
    ) -> "Trajectories":
        """Puts trajectories together.

        Args:
            states: States of each trajectory: numbers, shape `(T,)`, or features, shape `(T, D)`.
            actions: Actions taken there, shape `(T,)` each.
            ended: Whether the last action of each ended the episode; otherwise the trajectory was cut.
            demonstrated: Whether each is a demonstration; by default those in no preference are.
            preferences: Pairs of trajectories, the first preferred to the second.
            ids: Names of the trajectories, all different.
            group: Name of the set of candidates that each belongs to.

        Raises:
            DataError: Shapes disagree, or a value is out of range; the message names the trajectory.
        """
        if len(states) != len(actions) or not len(states):
            raise DataError(
                f"states of {len(states)} trajectories, actions of {len(actions)}; give as many, at least 1"
            )
        own_states = [np.asarray(s) for s in states]
        own_actions = [np.asarray(a) for a in actions]
        for i, (s, a) in enumerate(zip(own_states, own_actions, strict=True)):
            if a.ndim != 1 or len(a) == 0 or len(s) != len(a) or not np.issubdtype(a.dtype, np.integer):
                raise DataError(
                    f"trajectory {i} has states of shape {s.shape} and {a.dtype} actions of shape {a.shape}; actions "
                    "are whole numbers, one for each state, at least one"
                )
            if s.shape[1:] != own_states[0].shape[1:]:
                raise DataError(f"trajectory {i} has states of shape {s.shape}, the first {own_states[0].shape}")
        count = len(states)
        pairs = np.asarray(preferences, dtype=np.int64) if len(preferences) else np.zeros((0, 2), dtype=np.int64)
        if demonstrated is None:
            demonstrated = ~np.isin(np.arange(count), pairs)
        for name, flag in (("ended", ended), ("demonstrated", demonstrated)):
            if np.asarray(flag).dtype != np.bool_:
                raise DataError(f"`{name}` is {flag!r}; it is True or False, or one of these for each trajectory")
        both = [np.asarray(flag, dtype=bool) for flag in (ended, demonstrated)]
        all_ended, all_demonstrated = (np.full(count, flag) if flag.ndim == 0 else flag for flag in both)
        _check_flags(count, ended=all_ended, demonstrated=all_demonstrated)
        return cls(
            np.concatenate(own_states),
            np.concatenate(own_actions).astype(np.int64),
            np.array([len(a) for a in own_actions]),
            all_ended,
            all_demonstrated,
            pairs,
            None if ids is None else tuple(ids),
            None if group is None else tuple(group),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def refused(self) -> tuple[tuple[int, str], ...]:
        """Index and reason of each row of the source that was left out, or whose preference was."""
        return () if self._report is None else self._report.refused

    @property
    def owners(self) -> Int[np.ndarray, "steps"]:
        """Trajectory of each step, shape `(M,)`."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def last(self) -> Bool[np.ndarray, "steps"]:
        """Whether each step is the last of its trajectory, shape `(M,)`."""
        last = np.zeros(len(self.actions), dtype=bool)
        last[np.cumsum(self.lengths) - 1] = True
        return last

    @property
    def clusters(self) -> Int[np.ndarray, "trajectories"]:
        """What is not independent has one number: trajectories of a `group` or joined by preferences, shape `(N,)`."""
        pairs = [self.preferences]
        if self.group is not None:
            first: dict[str, int] = {}
            pairs.append(np.array([[first.setdefault(name, i), i] for i, name in enumerate(self.group)]))
        edges = np.concatenate(pairs)
        graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(self), len(self)))
        labels: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
        return labels

    def groups(self) -> list[FeedbackGroup]:
        """The preferences as rows that index the trajectories, in one group; none where there are no preferences."""
        count = len(self.preferences)
        if not count:
            return []
        return [
            FeedbackGroup(
                comparison=Comparison(kind="choice", num_rows=count, num_candidates=2),
                items=torch.as_tensor(self.preferences),
                outcome=torch.zeros(count, dtype=torch.int64),
                weight=torch.ones(count, dtype=torch.float64),
                rows=torch.arange(count),
            )
        ]

    def select(self, trajectories: Sequence[int] | NDArray[np.integer]) -> "Trajectories":
        """Some of the trajectories, in the order given, with the preferences between them; other preferences go.

        Raises:
            ArgumentError: There is no such trajectory, one is named twice, or none is named.
        """
        if np.asarray(trajectories).dtype == np.bool_:
            raise ArgumentError("`trajectories` is True and False; name trajectories, such as np.flatnonzero(mask)")
        chosen = np.asarray(trajectories, dtype=np.int64)
        if not len(chosen) or len(np.unique(chosen)) < len(chosen) or chosen.min() < 0 or chosen.max() >= len(self):
            raise ArgumentError(
                f"`trajectories` is {chosen.tolist()}; name different ones from 0 to {len(self) - 1}, at least one"
            )
        stops = np.cumsum(self.lengths)
        steps = np.concatenate([np.arange(stops[i] - self.lengths[i], stops[i]) for i in chosen])
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        pairs = place[self.preferences]
        return Trajectories(
            self.states[steps], self.actions[steps], self.lengths[chosen], self.ended[chosen],
            self.demonstrated[chosen], pairs[(pairs >= 0).all(1)],
            None if self.ids is None else tuple(self.ids[i] for i in chosen),
            None if self.group is None else tuple(self.group[i] for i in chosen),
            None if self._report is None else self._report.part(),
        )  # fmt: skip

    def candidates(self) -> "dict[str, Trajectories]":
        """The trajectories of each `group` by its name, in the order of first mention; without groups all, as `all`.

        Example:
            >>> data = Trajectories.from_arrays([[0], [1], [2]], [[0], [0], [0]], group=["a", "b", "a"])
            >>> [(name, part.states.tolist()) for name, part in data.candidates().items()]
            [('a', [0, 2]), ('b', [1])]
        """
        if self.group is None:
            return {"all": self}
        places: dict[str, list[int]] = {}
        for i, name in enumerate(self.group):
            places.setdefault(name, []).append(i)
        return {name: self.select(chosen) for name, chosen in places.items()}

    def split(self, test_fraction: float, *, seed: int) -> tuple["Trajectories", "Trajectories"]:
        """Training and test trajectories, those of a `group` on one side; preferences between the two sides go.

        Raises:
            ArgumentError: The fraction is not between 0 and 1, or there is one trajectory (or group) alone.
        """
        unit = np.arange(len(self)) if self.group is None else np.unique(self.group, return_inverse=True)[1]
        units = int(unit.max()) + 1
        if not 0.0 < test_fraction < 1.0 or units < 2:
            raise ArgumentError(
                f"`test_fraction` is {test_fraction} of {units} {'trajectories' if self.group is None else 'groups'}; "
                "give a number between 0 and 1, and at least 2 of them"
            )
        count = min(max(round(test_fraction * units), 1), units - 1)
        test = np.isin(unit, np.random.default_rng(seed).permutation(units)[:count])
        return self.select(np.flatnonzero(~test)), self.select(np.flatnonzero(test))

    def to_parquet(self, path: str | Path) -> None:
        """Writes one Parquet file that `load` reads back.

        Args:
            path: File to write; it must end in `.parquet`.

        Raises:
            ArgumentError: The path does not end in `.parquet`.
        """
        _trajectory_file.write(self, Path(path))

    def summary(self) -> str:
        """Numbers of trajectories, steps, states, actions, demonstrations and preferences."""
        kind = f"{self.states.shape[1]} features" if self.states.ndim == 2 else f"{int(self.states.max()) + 1} states"
        return "\n".join(
            [
                f"{len(self)} trajectories of {self.lengths.min()} to {self.lengths.max()} steps, "
                f"{len(self.actions)} steps in all, {kind}, {int(self.actions.max()) + 1} actions",
                f"  ended          {int(self.ended.sum())}, cut {int((~self.ended).sum())}",
                f"  demonstrations {int(self.demonstrated.sum())}",
                f"  preferences    {len(self.preferences)}",
                *([] if self.group is None else [f"  groups         {len(set(self.group))}"]),
                *(f"  {line}" for line in ([] if self._report is None else self._report.lines())),
            ]
        )

    def __repr__(self) -> str:
        return f"<Trajectories: {self.summary().splitlines()[0]}>"


def _check_flags(count: int, **flags: NDArray[np.bool_]) -> None:
    for name, flag in flags.items():
        if flag.shape != (count,):
            raise DataError(f"`{name}` has shape {flag.shape}; there are {count} trajectories")

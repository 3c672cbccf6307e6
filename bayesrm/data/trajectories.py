"""Trajectories of an agent: states, actions, and who is thought to have acted better."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from ..errors import ArgumentError, DataError
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

    def __post_init__(self) -> None:
        count = len(self.lengths)
        if bool((self.lengths < 1).any()):
            raise DataError(f"trajectory {int(np.argmin(self.lengths))} has no step; leave it out")
        total = int(self.lengths.sum())
        if len(self.states) != total or self.actions.shape != (total,):
            raise DataError(
                f"the lengths sum to {total} steps, with {len(self.states)} states and {len(self.actions)} actions"
            )
        _check_flags(count, ended=self.ended, demonstrated=self.demonstrated)
        self._check_steps()
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

    @classmethod
    def from_arrays(
        cls,
        states: Sequence[Any] | NDArray[Any],
        actions: Sequence[Any] | NDArray[Any],
        *,
        ended: bool | Sequence[bool] | NDArray[np.bool_] = True,
        demonstrated: bool | Sequence[bool] | NDArray[np.bool_] = True,
        preferences: Sequence[Sequence[int]] | NDArray[np.integer] = (),
    ) -> "Trajectories":
        """Puts trajectories together.

        Args:
            states: States of each trajectory: numbers, shape `(T,)`, or features, shape `(T, D)`.
            actions: Actions taken there, shape `(T,)` each.
            ended: Whether the last action of each ended the episode; otherwise the trajectory was cut.
            demonstrated: Whether each is a demonstration.
            preferences: Pairs of trajectories, the first preferred to the second.

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
            np.asarray(preferences, dtype=np.int64) if len(preferences) else np.zeros((0, 2), dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.lengths)

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
        )  # fmt: skip

    def split(self, test_fraction: float, *, seed: int) -> tuple["Trajectories", "Trajectories"]:
        """Training and test trajectories; preferences between the two sides go.

        Raises:
            ArgumentError: The fraction is not between 0 and 1, or there is one trajectory alone.
        """
        if not 0.0 < test_fraction < 1.0 or len(self) < 2:
            raise ArgumentError(
                f"`test_fraction` is {test_fraction} of {len(self)} trajectories; give a number between 0 and 1, and "
                "at least 2 trajectories"
            )
        count = min(max(round(test_fraction * len(self)), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

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
            ]
        )

    def __repr__(self) -> str:
        return f"<Trajectories: {self.summary().splitlines()[0]}>"


def _check_flags(count: int, **flags: NDArray[np.bool_]) -> None:
    for name, flag in flags.items():
        if flag.shape != (count,):
            raise DataError(f"`{name}` has shape {flag.shape}; there are {count} trajectories")

"""Rewards and action values of states, for trajectories of an agent."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from .._typing import Array, Tensor
from ..data import Trajectories
from ..errors import ArgumentError, DataError
from ._checks import check_integer
from ._state_network import StateNetwork


@runtime_checkable
class Dynamics(Protocol):
    """Known dynamics of an environment with numbered states, for instance `programs.TabularMDP`.

    Attributes:
        num_states: Number of states, S.
        num_actions: Number of actions, A.
    """

    @property
    def num_states(self) -> int:
        """Number of states."""
        ...

    @property
    def num_actions(self) -> int:
        """Number of actions."""
        ...

    def soft_values(self, rewards: Array, *, discount: float, rationality: float) -> Array:
        """Action values of the soft-optimal policy, shape `(..., S, A)`, for rewards of shape `(..., S, 1 or A)`."""
        ...


@dataclasses.dataclass(frozen=True)
class StateReward:
    """Networks from a state to the reward of a step and to action values.

    The reward's network gives the mean and the log standard deviation of a normal distribution, another one the action
    values; both with the hidden layers and the ELU of AVRIL's released code (2102.06483).

    Attributes:
        num_actions: Number of actions, A.
        num_states: Number of states, where they are numbers; `None` for states that are features. Numbers enter as
            one-hot vectors, features standardised over the training steps.
        hidden: Widths of the hidden layers; none for a table (or a linear model of features). A table starts at the
            prior and with action values of 0.
        by_action: Whether the reward depends on the action, or on the state alone.
        dynamics: The dynamics, where they are known: then `NUTS` gives the exact posterior. `AVRIL` does without.

    Raises:
        ArgumentError: A setting is out of range, or the dynamics are of other states or actions.

    Example:
        >>> StateReward(num_actions=2, num_states=3, hidden=()).hidden
        ()
    """

    num_actions: int
    num_states: int | None = None
    hidden: tuple[int, ...] = (64, 64)
    by_action: bool = False
    dynamics: Dynamics | None = None

    def __post_init__(self) -> None:
        check_integer("num_actions", self.num_actions, 2)
        if self.num_states is not None:
            check_integer("num_states", self.num_states, 1)
        if not isinstance(self.hidden, Sequence) or isinstance(self.hidden, str):
            raise ArgumentError(f"`hidden` is {self.hidden!r}; give the widths of the layers, such as (64, 64)")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for width in self.hidden:
            check_integer("hidden", width, 1)
        if self.dynamics is None:
            return
        if not isinstance(self.dynamics, Dynamics):
            raise ArgumentError(f"`dynamics` is {self.dynamics!r}; it is a programs.TabularMDP(...) or None")
        if (self.dynamics.num_states, self.dynamics.num_actions) != (self.num_states, self.num_actions):
            raise ArgumentError(
                f"`dynamics` has {self.dynamics.num_states} states and {self.dynamics.num_actions} actions; "
                f"`num_states` is {self.num_states}, `num_actions` {self.num_actions}"
            )

    def check(self, data: Trajectories) -> None:
        """Raises `DataError` unless the states and actions of `data` are those of the reward."""
        wrong = np.flatnonzero(data.actions >= self.num_actions)
        if len(wrong):
            raise DataError(
                f"trajectory {data.owners[wrong[0]]} has action {data.actions[wrong[0]]}; `num_actions` is "
                f"{self.num_actions}"
            )
        if (self.num_states is None) == (data.states.ndim == 1):
            kinds = ("numbers", "features") if data.states.ndim == 1 else ("features", "numbers")
            hint = "give its `num_states`" if data.states.ndim == 1 else "leave out its `num_states`"
            raise DataError(
                f"the states of the trajectories are {kinds[0]}, those of the StateReward are {kinds[1]}; {hint}"
            )
        if self.num_states is not None and int(data.states.max()) >= self.num_states:
            step = int(np.argmax(data.states))
            raise DataError(
                f"trajectory {data.owners[step]} has state {data.states[step]}; `num_states` is {self.num_states}"
            )

    def inputs(self, states: np.ndarray) -> Float[Tensor, "states features"]:
        """What the networks take, float64: one-hot vectors of numbered states, or the features."""
        if self.num_states is None:
            return torch.as_tensor(np.asarray(states, dtype=np.float64))
        return torch.nn.functional.one_hot(
            torch.as_tensor(np.asarray(states, dtype=np.int64)), self.num_states
        ).double()

    def network(self, num_features: int) -> StateNetwork:
        """New networks in float64, from torch's generator."""
        return StateNetwork(
            num_features, self.num_actions, self.hidden, by_action=self.by_action, one_hot=self.num_states is not None
        )

"""What is believed about rewards and action values of states: normal rewards from networks, or draws."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from numpy.typing import NDArray

from .._typing import Tensor
from ..errors import DataError
from ..programs import InverseRL
from ..rewards import StateReward
from ..rewards._state_network import StateNetwork


@runtime_checkable
class StateRewards(Protocol):
    """What is believed about rewards and action values of P states, and of A actions there where they count."""

    @property
    def num_chains(self) -> int:
        """Number of Markov chains that draws come from."""
        ...

    def moments(self, states: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rewards, each `(P,)` or `(P, A)`."""
        ...

    def draws(self, states: NDArray[Any]) -> Tensor | None:
        """Draws of the rewards, `(S, P)` or `(S, P, A)`; `None` where they are independent normal variables."""
        ...

    def action_values(self, states: NDArray[Any]) -> Tensor:
        """Expected action values, `(P, A)`."""
        ...

    def policy(self, states: NDArray[Any]) -> Tensor:
        """Probabilities of the actions, `(P, A)`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkRewards:
    """AVRIL's belief: independent normal rewards, and action values that are a point.

    Attributes:
        program: The program.
        network: The networks.
        min_std: The floor of the standard deviations, in units of the prior's.
    """

    program: InverseRL
    network: StateNetwork
    min_std: float

    @property
    def num_chains(self) -> int:
        """One: draws are independent."""
        return 1

    def moments(self, states: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rewards."""
        from ._avril_states import scaled_moments

        with torch.no_grad():
            mean, log_std = scaled_moments(
                self.network, self._inputs(states), self.program.reward_precision, self.min_std
            )
        return mean, log_std.exp()

    def draws(self, states: NDArray[Any]) -> Tensor | None:
        """None: the rewards are independent."""
        return None

    def action_values(self, states: NDArray[Any]) -> Tensor:
        """Action values."""
        with torch.no_grad():
            return self.network.action_values(self._inputs(states))

    def policy(self, states: NDArray[Any]) -> Tensor:
        """The Boltzmann policy of the action values."""
        return torch.softmax(self.program.rationality * self.action_values(states), 1)

    def _inputs(self, states: NDArray[Any]) -> Tensor:
        assert isinstance(self.program.reward, StateReward)
        inputs, width = self.program.reward.inputs(states), len(self.network.center)
        if inputs.shape[1] != width:
            raise DataError(
                f"the states have {inputs.shape[1]} features; the posterior was fitted on states of {width}"
            )
        return inputs


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnRewards:
    """Draws of the rewards of all states, with known dynamics.

    Attributes:
        program: The program.
        values: Draws, shape `(S, states, 1)`, or `(S, states, A)` where the action counts.
        num_chains: Chains that they come from, one after another.
        sample_stats: What the sampler recorded for each draw, each of shape `(S,)`.
    """

    program: InverseRL
    values: Float[Tensor, "draws states width"]
    num_chains: int = 1
    sample_stats: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def draws(self, states: NDArray[Any]) -> Tensor:
        """The draws at the states."""
        values = self.values[:, torch.as_tensor(states)]
        return values if self._reward.by_action else values[..., 0]

    def moments(self, states: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the draws."""
        drawn = self.draws(states)
        return drawn.mean(0), drawn.std(0)

    def action_values(self, states: NDArray[Any]) -> Tensor:
        """Action values, averaged over the draws."""
        return self._action_values[:, torch.as_tensor(states)].mean(0)

    def policy(self, states: NDArray[Any]) -> Tensor:
        """Probabilities of the actions, averaged over the draws: the posterior predictive of an action."""
        return self.log_policies(states).exp().mean(0)

    def log_policies(self, states: NDArray[Any]) -> Float[Tensor, "draws states actions"]:
        """Log probabilities of the actions under each draw, shape `(S, P, A)`."""
        return torch.log_softmax(self.program.rationality * self._action_values[:, torch.as_tensor(states)], 2)

    @functools.cached_property
    def _action_values(self) -> Tensor:
        """Action values of all states under each draw: the solution of a fixed point, found once."""
        dynamics = self._reward.dynamics
        assert dynamics is not None
        values: Tensor = dynamics.soft_values(
            self.values, discount=self.program.discount, rationality=self.program.rationality
        )
        return values

    @property
    def _reward(self) -> StateReward:
        assert isinstance(self.program.reward, StateReward)
        return self.program.reward

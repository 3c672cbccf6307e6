"""The posterior of inverse reinforcement learning on states and actions."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Trajectories
from ..errors import ArgumentError
from ..programs import InverseRL
from ..rewards import PreferenceBelief, StateReward
from ..rewards._state_network import StateNetwork
from .report import FitReport


@runtime_checkable
class StateRewards(Protocol):
    """What is believed about rewards and action values of states: normal rewards from networks, or draws."""

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
        return self.program.reward.inputs(states)


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnRewards:
    """Draws of the rewards of all states, with known dynamics.

    Attributes:
        program: The program.
        values: Draws, shape `(S, states, 1)`, or `(S, states, A)` where the action counts.
        num_chains: Chains that they come from, one after another.
    """

    program: InverseRL
    values: Float[Tensor, "draws states width"]
    num_chains: int = 1

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
        return self._values()[:, torch.as_tensor(states)].mean(0)

    def policy(self, states: NDArray[Any]) -> Tensor:
        """Probabilities of the actions, averaged over the draws: the posterior predictive of an action."""
        chosen = self._values()[:, torch.as_tensor(states)]
        return torch.softmax(self.program.rationality * chosen, 2).mean(0)

    def _values(self) -> Tensor:
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


class TrajectoryPosterior:
    """A posterior over the reward of each state (or state and action), with the action values that go with it.

    Like a `Posterior` it predicts beliefs that selection takes, has a report, and is saved. Its candidates are
    trajectories; what a `Posterior` says about `Comparisons` it cannot say, and it is none.

    Attributes:
        program: The program.
        report: How it was fitted.
        rewards: What is believed about rewards and action values.
        latents: Draws of the latents of the likelihood of preferences, by site, shape `(S, *site)`; a single one where
            they are points.

    Example:
        >>> import bayesrm as brm
        >>> data = brm.data.Trajectories.from_arrays(states=[[0, 1]] * 5, actions=[[1, 1]] * 5)
        >>> program = brm.programs.InverseRL(brm.rewards.StateReward(num_actions=2, num_states=2, hidden=()))
        >>> posterior = brm.fit(program, data, inference=brm.engines.AVRIL(num_steps=200, learning_rate=0.05))
        >>> posterior.policy([0, 1]).argmax(1)
        tensor([1, 1])
    """

    def __init__(
        self, program: InverseRL, report: FitReport, rewards: StateRewards, latents: Mapping[str, Tensor] | None = None
    ) -> None:
        self.program = program
        self.report = report
        self.rewards = rewards
        self.latents = dict(latents or {})

    @property
    def _reward(self) -> StateReward:
        assert isinstance(self.program.reward, StateReward)
        return self.program.reward

    def reward(self, states: ArrayLike, actions: ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the reward, each of shape `(P,)`.

        Args:
            states: States, numbers `(P,)` or features `(P, D)`.
            actions: Actions, shape `(P,)`; they may be left out where the reward depends on the state alone.

        Raises:
            ArgumentError: The reward depends on the action and there is none.
            DataError: A state or an action is not one of the program's.
        """
        checked, taken = self._checked(states, actions)
        mean, std = self.rewards.moments(checked)
        if not self._reward.by_action:
            return mean, std
        if actions is None:
            raise ArgumentError("`actions` is missing; this reward depends on the action")
        column = torch.as_tensor(taken)[:, None]
        return mean.gather(1, column)[:, 0], std.gather(1, column)[:, 0]

    def action_values(self, states: ArrayLike) -> Float[Tensor, "states actions"]:
        """Q(s, .) of each state, shape `(P, A)`; averaged over draws where there are draws."""
        return self.rewards.action_values(self._checked(states)[0])

    def policy(self, states: ArrayLike) -> Float[Tensor, "states actions"]:
        """Probabilities of the demonstrator's next action in each state, shape `(P, A)`."""
        return self.rewards.policy(self._checked(states)[0])

    def predict(
        self, prompts: Sequence[Any] | None = None, candidates: Sequence[Trajectories] | None = None
    ) -> RewardBelief:
        """Joint belief about the sums of rewards of candidate trajectories.

        Candidates that go through the same state (and action) share its reward.

        Args:
            prompts: What each set of candidates is for; only their number counts, and they may be left out.
            candidates: For each prompt its candidates.

        Raises:
            ArgumentError: The arguments do not fit together.
            DataError: A state or an action is not one of the program's.

        Example:
            >>> import bayesrm as brm
            >>> data = brm.data.Trajectories.from_arrays(states=[[0, 1]] * 5, actions=[[1, 1]] * 5)
            >>> program = brm.programs.InverseRL(brm.rewards.StateReward(num_actions=2, num_states=2, hidden=()))
            >>> posterior = brm.fit(program, data, inference=brm.engines.AVRIL(num_steps=200, learning_rate=0.05))
            >>> brm.select(posterior.predict(candidates=[data, data.select([0, 1])])).shape
            torch.Size([2])
        """
        if isinstance(candidates, Trajectories):
            raise ArgumentError("`candidates` is one Trajectories; give a list with one for each prompt")
        if candidates is None or not len(candidates) or not all(isinstance(c, Trajectories) for c in candidates):
            raise ArgumentError("`candidates` must be a list with the candidate Trajectories of each prompt")
        if prompts is not None and len(prompts) != len(candidates):
            raise ArgumentError(f"{len(prompts)} prompts but candidates for {len(candidates)}")
        beliefs = [self._belief(c) for c in candidates]
        return beliefs[0] if len(beliefs) == 1 else RewardBelief.concatenate(beliefs)

    def _belief(self, candidates: Trajectories) -> RewardBelief:
        self._reward.check(candidates)
        distinct, states = np.unique(candidates.states, axis=0, return_inverse=True)
        cells, width = states.reshape(-1), 1
        if self._reward.by_action:
            width = self._reward.num_actions
            cells = cells * width + candidates.actions
        counts = torch.zeros(len(candidates), len(distinct) * width, dtype=torch.float64)
        counts.index_put_(
            (torch.as_tensor(candidates.owners), torch.as_tensor(cells)), counts.new_ones(()), accumulate=True
        )
        drawn = self.rewards.draws(distinct)
        if drawn is not None:
            return RewardBelief.from_draws((drawn.flatten(1) @ counts.T)[:, None])
        mean, std = (m.reshape(-1) for m in self.rewards.moments(distinct))
        used = counts.sum(0) > 0
        return RewardBelief((counts @ mean)[None], (counts * std)[None][..., used])

    def predict_stream(
        self, prompts: Iterable[tuple[Any, Trajectories]], *, chunk_size: int = 256
    ) -> Iterator[RewardBelief]:
        """Beliefs about one prompt's candidates after another; `chunk_size` is there for other posteriors' sake."""
        for _, candidates in prompts:
            yield self.predict(candidates=[candidates])

    def predict_preferences(
        self, prompts: Sequence[Any] | None = None, candidates: Sequence[Trajectories] | None = None
    ) -> PreferenceBelief:
        """Joint belief about which of two candidates is preferred, see `predict`."""
        return PreferenceBelief.from_rewards(self.predict(prompts, candidates))

    def _checked(self, states: ArrayLike, actions: ArrayLike | None = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        given = np.asarray(states)
        taken = np.zeros(len(given), dtype=np.int64) if actions is None else np.asarray(actions)
        rows = Trajectories.from_arrays(list(given[:, None]), list(taken[:, None]))
        self._reward.check(rows)
        return rows.states, rows.actions

    def summary(self) -> str:
        """What was fitted, and how it went."""
        r, reward = self.report, self._reward
        about = f"{reward.num_states} states" if reward.num_states is not None else f"{reward.num_actions} actions"
        on = " and action" if reward.by_action else ""
        lines = [
            f"reward of a state{on} ({about}), {r.engine['name']} ({r.seconds:.1f} s)",
            f"  data        {r.num_rows} steps of {r.num_prompts} trajectories, {r.num_items} distinct states",
            f"  parameters  {r.num_parameters}",
            f"  converged   {'yes' if r.converged else 'NO'}",
        ]
        lines += [f"  {name:<12}{value:.4g}" for name, value in r.diagnostics.items() if isinstance(value, float | int)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary().splitlines()[0]}>"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the posterior to a folder (JSON and safetensors), all or nothing.

        Raises:
            PersistenceError: The folder cannot be written.
        """
        from ._trajectory_persistence import save

        save(self, path)

    @staticmethod
    def from_pretrained(path: str | Path, *, likelihood: Any = None) -> "TrajectoryPosterior":
        """Reads a posterior that `save_pretrained` wrote.

        Args:
            path: The folder.
            likelihood: The likelihood of preferences, when it was saved unregistered.

        Raises:
            PersistenceError: A file is missing, damaged or of another format version; the message names it.
            LikelihoodError: The likelihood is not registered here and not given.
        """
        from ._trajectory_persistence import load

        return load(path, likelihood)

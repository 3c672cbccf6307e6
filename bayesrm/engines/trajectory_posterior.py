"""The posterior of inverse reinforcement learning on states and actions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Trajectories
from ..errors import ArgumentError, DataError
from ..programs import InverseRL
from ..rewards import PreferenceBelief, StateReward
from ._schema import FeedbackSchema
from ._state_rewards import DrawnRewards, NetworkRewards, StateRewards
from ._trajectory_draws import feedback_density, predict_feedback, reward_draws, spread_evenly, unconstrained
from .draws import JointDraws
from .posterior import Posterior
from .prediction import FeedbackPrediction
from .report import FitReport

__all__ = ["DrawnRewards", "NetworkRewards", "StateRewards", "TrajectoryPosterior"]


@Posterior.register
class TrajectoryPosterior:
    """A posterior over the reward of each state (or state and action), with the action values that go with it.

    It has what every `Posterior` has, with `Trajectories` in place of `Comparisons`: a trajectory is an item, whose
    reward is the sum over its steps, and its candidates are those of a `group`. So it predicts beliefs that selection
    takes, draws, goes to ArviZ, has a report, and is saved; of rewards of steps and of policies it tells beside.

    Attributes:
        program: The program.
        schema: The kind of feedback that its likelihood describes: choices between two.
        report: How it was fitted.
        rewards: What is believed about rewards and action values.

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
        """Makes the posterior; `latents` are draws by site, `(S, *site)`, a single one where they are points."""
        self.program = program
        self.schema = FeedbackSchema.unseen()
        self.report = report
        self.rewards = rewards
        self._latents = dict(latents or {})

    @property
    def state_reward(self) -> StateReward:
        """What the rewards are functions of."""
        assert isinstance(self.program.reward, StateReward)
        return self.program.reward

    @property
    def num_chains(self) -> int:
        """Number of Markov chains that the draws come from."""
        return self.rewards.num_chains

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """What the sampler recorded for each draw, each of shape `(S,)`; nothing where none sampled."""
        return dict(self.rewards.sample_stats) if isinstance(self.rewards, DrawnRewards) else {}

    # The names that diagnostics read of any posterior.
    @property
    def _num_chains(self) -> int:
        return self.num_chains

    @property
    def _default_draws(self) -> int:
        return len(self.rewards.values) if isinstance(self.rewards, DrawnRewards) else 1000

    def reward(self, states: ArrayLike, actions: ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the reward, each of shape `(P,)`.

        Args:
            states: States, numbers `(P,)` or features `(P, D)`.
            actions: Actions, shape `(P,)`; they may be left out where the reward depends on the state alone.

        Raises:
            ArgumentError: The states are no list, or the reward depends on the action and there is none.
            DataError: A state or an action is not one of the program's.
        """
        checked, taken = self._checked(states, actions)
        mean, std = self.rewards.moments(checked)
        if not self.state_reward.by_action:
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
        self,
        prompts: Sequence[Any] | None = None,
        candidates: Sequence[Trajectories] | None = None,
        *,
        progress: bool = False,
    ) -> RewardBelief:
        """Joint belief about the sums of rewards of candidate trajectories.

        Candidates that go through the same state (and action) share its reward.

        Args:
            prompts: What each set of candidates is for; only their number counts, and they may be left out.
            candidates: For each prompt its candidates.
            progress: There for other posteriors' sake.

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

    def predict_items(self, data: Trajectories) -> RewardBelief:
        """Joint belief about the trajectories of `data`, those of a `group` as candidates; see `predict`."""
        return self.predict(candidates=list(self._trajectories(data).candidates().values()))

    def predict_stream(
        self, prompts: Iterable[tuple[Any, Trajectories]], *, chunk_size: int = 256
    ) -> Iterator[RewardBelief]:
        """Beliefs about one prompt's candidates after another; `chunk_size` is there for other posteriors' sake."""
        for _, candidates in prompts:
            yield self.predict(candidates=[candidates])

    def predict_preferences(
        self,
        prompts: Sequence[Any] | None = None,
        candidates: Sequence[Trajectories] | None = None,
        *,
        progress: bool = False,
    ) -> PreferenceBelief:
        """Joint belief about which of two candidates is preferred, see `predict`."""
        return PreferenceBelief.from_rewards(self.predict(prompts, candidates))

    def predict_feedback(self, data: Trajectories, *, num_samples: int = 1024, seed: int = 0) -> FeedbackPrediction:
        """Posterior predictive of each preference of `data`: what NLL and calibration are computed from.

        Args:
            data: Trajectories with preferences.
            num_samples: Draws to average over.
            seed: Their seed.

        Raises:
            DataError: There is no preference.
            LikelihoodError: The likelihood does not list its outcomes.
        """
        count = len(self._trajectories(data).preferences)
        if not count:
            raise DataError("the trajectories hold no preferences; what is predicted of actions is `policy(states)`")
        draws = self.draw(data, num_samples=num_samples, seed=seed)
        density, weight = feedback_density(self.program, data), torch.ones(count, dtype=torch.float64)
        return predict_feedback(density, draws, weight, count)

    def draw(self, data: Trajectories, *, num_samples: int | None = None, seed: int = 0) -> JointDraws:
        """Joint posterior draws of the sums of rewards of all trajectories of `data` and of the likelihood's latents.

        Args:
            data: Trajectories, those of the fit or others.
            num_samples: Number of draws; a posterior that is made of draws gives at most those it has, spread evenly
                over its chains. By default all of them, and 1,000 of a normal posterior.
            seed: Seed of what is drawn anew.

        Example:
            >>> import bayesrm as brm
            >>> data = brm.data.Trajectories.from_arrays(states=[[0, 1]] * 5, actions=[[1, 1]] * 5)
            >>> program = brm.programs.InverseRL(brm.rewards.StateReward(num_actions=2, num_states=2, hidden=()))
            >>> posterior = brm.fit(program, data, inference=brm.engines.AVRIL(num_steps=200, learning_rate=0.05))
            >>> posterior.draw(data, num_samples=7).rewards.shape
            torch.Size([7, 5])
        """
        distinct, counts = self._visits(self._trajectories(data))
        rewards, chosen = reward_draws(self, distinct, self._count(num_samples), seed)
        latents = unconstrained(feedback_density(self.program), self._latents_at(chosen, len(rewards)), len(rewards))
        stats = {} if chosen is None else {name: value[chosen] for name, value in self.sample_stats.items()}
        return JointDraws(rewards.flatten(1) @ counts.T, latents, None, self.num_chains, stats)

    def weighted_draws(self, data: Trajectories, *, num_samples: int | None = None, seed: int = 0) -> JointDraws:
        """Those of `draw`: none of them is resampled, and no weights are known."""
        return self.draw(data, num_samples=num_samples, seed=seed)

    def draw_reward(
        self, states: ArrayLike, actions: ArrayLike | None = None, *, num_samples: int | None = None, seed: int = 0
    ) -> Float[Tensor, "draws states"]:
        """Joint draws of the reward, shape `(S, P)`; arguments as for `reward` and `draw`.

        Equal states (and actions) have equal rewards in each draw.

        Raises:
            ArgumentError: As for `reward`.
            DataError: As for `reward`.
        """
        checked, taken = self._checked(states, actions)
        if self.state_reward.by_action and actions is None:
            raise ArgumentError("`actions` is missing; this reward depends on the action")
        distinct, places = np.unique(checked, axis=0, return_inverse=True)
        drawn = reward_draws(self, distinct, self._count(num_samples), seed)[0][:, places.reshape(-1)]
        return drawn[:, torch.arange(len(taken)), torch.as_tensor(taken)] if self.state_reward.by_action else drawn

    def latents(self, num_samples: int = 1000, *, seed: int = 0) -> dict[str, Tensor]:
        """Posterior draws of the latents of the likelihood of preferences, each of shape `(num_samples, *site)`.

        Of a posterior that is made of draws, at most those it has, and the same ones as `draw`; where an engine makes
        them points (`AVRIL`), that point each time.
        """
        count, drawn = self._count(num_samples), isinstance(self.rewards, DrawnRewards)
        chosen = spread_evenly(self._default_draws, self.num_chains, count) if drawn else None
        return self._latents_at(chosen, count if chosen is None else len(chosen))

    def to_arviz(
        self,
        data: Trajectories,
        *,
        num_samples: int = 1000,
        seed: int = 0,
        predictive: bool = True,
        by: str = "comparison",
    ) -> Any:
        """The posterior on `data` for ArviZ: draws of rewards and latents, never the weights of a network.

        Dimensions are `state` (all numbered states, or the distinct ones of the data), `action`, `trajectory`,
        `demonstration`, `comparison` and `step`; groups as for a `Posterior`.

        Args:
            data: Trajectories, usually those of the fit.
            num_samples: Number of draws, see `draw`.
            seed: Seed.
            predictive: Whether to draw preferences and actions from the posterior predictive.
            by: `"comparison"`: log likelihoods are of each preference and of each demonstration.

        Raises:
            ArgumentError: `by` is something else; trajectories have no prompts.

        Returns:
            `arviz.InferenceData`, or with ArviZ 1.x an `xarray.DataTree`.
        """
        from ._trajectory_arviz import export

        if by != "comparison":
            raise ArgumentError(f"`by` is {by!r}; trajectories have no prompts, so that it is 'comparison'")
        return export(self, self._trajectories(data), num_samples=num_samples, seed=seed, predictive=predictive)

    def summary(self) -> str:
        """What was fitted, and how it went."""
        from ._trajectory_summary import summarise

        return summarise(self)

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
        """Reads a posterior that `save_pretrained` wrote; `Posterior.from_pretrained` reads it as well.

        Args:
            path: The folder.
            likelihood: The likelihood of preferences, when it was saved unregistered.

        Raises:
            PersistenceError: A file is missing, damaged or of another format version; the message names it.
            LikelihoodError: The likelihood is not registered here and not given.
        """
        from ._trajectory_persistence import load

        return load(path, likelihood)

    def _belief(self, candidates: Trajectories) -> RewardBelief:
        distinct, counts = self._visits(candidates)
        drawn = self.rewards.draws(distinct)
        if drawn is not None:
            return RewardBelief.from_draws((drawn.flatten(1) @ counts.T)[:, None])
        mean, std = (m.reshape(-1) for m in self.rewards.moments(distinct))
        used = counts.sum(0) > 0
        return RewardBelief((counts @ mean)[None], (counts * std)[None][..., used])

    def _visits(self, data: Trajectories) -> tuple[NDArray[Any], Float[Tensor, "trajectories rewards"]]:
        """The distinct states, and how often each trajectory gets the reward of each (and of each action there)."""
        self.state_reward.check(data)
        distinct, states = np.unique(data.states, axis=0, return_inverse=True)
        cells, width = states.reshape(-1), 1
        if self.state_reward.by_action:
            width = self.state_reward.num_actions
            cells = cells * width + data.actions
        counts = torch.zeros(len(data), len(distinct) * width, dtype=torch.float64)
        place = (torch.as_tensor(data.owners), torch.as_tensor(cells))
        return distinct, counts.index_put_(place, counts.new_ones(()), accumulate=True)

    def _latents_at(self, chosen: Tensor | None, count: int) -> dict[str, Tensor]:
        """Latents of chosen draws, or `count` times the point that they are held at."""
        return {
            name: value.expand(count, *value.shape[1:]) if chosen is None or len(value) == 1 else value[chosen]
            for name, value in self._latents.items()
        }

    def _count(self, num_samples: int | None) -> int:
        num_samples = self._default_draws if num_samples is None else num_samples
        if num_samples < 1:
            raise ArgumentError(f"`num_samples` is {num_samples}; at least 1 draw is needed")
        return num_samples

    def _trajectories(self, data: Any) -> Trajectories:
        if not isinstance(data, Trajectories):
            raise ArgumentError(f"`data` is of type {type(data).__name__}; this posterior is about Trajectories")
        return data

    def _checked(self, states: Any, actions: Any = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        given = _listed("states", states, "numbers, shape (P,), or features, shape (P, D)")
        taken = np.zeros(len(given), dtype=np.int64) if actions is None else _listed("actions", actions, "shape (P,)")
        if len(taken) != len(given):
            raise ArgumentError(f"`states` has {len(given)} entries and `actions` {len(taken)}; give as many")
        rows = Trajectories.from_arrays(list(given[:, None]), list(taken[:, None]))
        self.state_reward.check(rows)
        return rows.states, rows.actions


def _listed(name: str, values: Any, accepted: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ArgumentError(f"`{name}` cannot be read as an array ({error}); give a list of {accepted}") from None
    if array.ndim == 0 or not len(array):
        raise ArgumentError(f"`{name}` is {values!r}; give a list of at least one: {accepted}")
    return array

"""Inverse reinforcement learning as a probabilistic program: rewards of steps that explain actions and preferences."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from .._typing import Array, Tensor
from ..backend import convert, dist, following, plate, sample, scale
from ..data import Comparisons, Demonstrations, Trajectories
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError
from ..likelihoods import BradleyTerry, Likelihood
from ..priors import Gaussian
from ..rewards import Linear, StateReward, TokenReward
from ..rewards._checks import is_real
from .reward_model import RewardModel


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """M distinct steps of N trajectories, with the action values in their states.

    Attributes:
        action_values: Q(s, .) in the state of each step, shape `(M, A)`.
        actions: Action taken there, shape `(M,)`.
        demonstrated: Times that a demonstration took this step, shape `(M,)`; 0 for steps that were not demonstrated.
        visits: How often each trajectory goes through each step, shape `(N, M)`.
    """

    action_values: Float[Tensor, "steps actions"]
    actions: Int[Tensor, "steps"]
    demonstrated: Float[Tensor, "steps"]
    visits: Float[Tensor, "trajectories steps"]


@dataclasses.dataclass(frozen=True)
class InverseRL:
    """What is believed to generate demonstrations, and preferences between trajectories.

    A reward for each step comes from the prior; whoever demonstrates acts by a Boltzmann policy,
    `p(a | s) = softmax_a(rationality * Q(s, a))`, with Q the action values that belong to the rewards (Ramachandran and
    Amir, 2007); whoever prefers judges the sum of the rewards along a trajectory (Christiano et al., 1706.03741) by any
    preference likelihood.

    Text is a trajectory too: the state is the prompt with the tokens so far, the action the next token (AVA, Cai et
    al., 2411.09341). AVA-d is this program on `Demonstrations`, AVA-p on `Comparisons`; what the paper leaves open
    (its terms are not published in code) is settled here: see `engines.AVRIL`.

    The object is a Pyro program, given action values: `program(steps, groups)`, sites `reward`, `action`, the
    likelihood's latents and `feedback`.

    Attributes:
        reward: What rewards and action values are functions of: `rewards.StateReward` or `rewards.TokenReward`.
        likelihood: Likelihood of preferences between trajectories.
        prior: Prior over the reward of each step, site `reward`, with mean 0.
        discount: What the reward of the next step is worth now, above 0, up to 1.
        rationality: Inverse temperature of the Boltzmann policy.

    Raises:
        ArgumentError: A setting is of the wrong type or out of range.

    Example:
        >>> import bayesrm as brm
        >>> InverseRL(brm.rewards.StateReward(num_actions=4), discount=0.9).prior.precision
        1.0
    """

    reward: StateReward | TokenReward
    likelihood: Likelihood | Mapping[str, Likelihood] = dataclasses.field(default_factory=BradleyTerry)
    prior: Gaussian = dataclasses.field(default_factory=Gaussian)
    discount: float = 1.0
    rationality: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.reward, type) or not isinstance(self.reward, StateReward | TokenReward):
            raise ArgumentError(
                f"`reward` is {self.reward!r}; it is rewards.StateReward(...) for states and actions, or "
                "rewards.TokenReward(...) for text"
            )
        if not (is_real(self.discount) and 0.0 < self.discount <= 1.0):
            raise ArgumentError(f"`discount` is {self.discount!r}; it lies above 0, up to 1")
        if not (is_real(self.rationality) and self.rationality > 0.0):
            raise ArgumentError(f"`rationality` is {self.rationality!r}; it is a positive number")
        self.prior.check(("reward",))
        # It checks the likelihood.
        _ = self.feedback_model

    @property
    def data_type(self) -> tuple[type, ...]:
        """Types of data the program explains; `fit` checks it."""
        return (Comparisons, Demonstrations) if isinstance(self.reward, TokenReward) else (Trajectories,)

    @property
    def feedback_model(self) -> RewardModel:
        """The program of the preferences alone, given the sums of rewards; its reward function is a stand-in."""
        return RewardModel(Linear(), self.likelihood)

    @property
    def reward_precision(self) -> float:
        """Prior precision of the reward of a step."""
        return self.prior.of("reward")

    @property
    def has_dynamics(self) -> bool:
        """Whether the dynamics are known, so that action values follow from rewards."""
        return isinstance(self.reward, StateReward) and self.reward.dynamics is not None

    def __call__(self, steps: Steps, groups: Sequence[FeedbackGroup] = ()) -> Any:
        """Runs the program.

        Args:
            steps: The steps, with action values.
            groups: Preferences that index the trajectories.

        Returns:
            The sum of rewards of each trajectory, shape `(N,)`.
        """
        with following(steps.action_values):
            with plate("steps", len(steps.actions)):
                rewards = sample("reward", dist.Normal(steps.action_values.new_zeros(()), self.reward_precision**-0.5))
                with scale(steps.demonstrated):
                    sample("action", dist.Categorical(logits=self.rationality * steps.action_values), obs=steps.actions)
            returns = steps.visits @ rewards
            if groups:
                self.feedback_model.observe(returns, groups)
        return returns

    def with_dynamics(self, counts: Array, visits: Array, groups: Sequence[FeedbackGroup] = ()) -> Array:
        """Runs the program where the dynamics are known: action values are those of the soft-optimal policy.

        Then nothing is left to a network, and the posterior of the rewards is exact up to the sampler's error. Under
        JAX it is a NumPyro program.

        Args:
            counts: How often demonstrations took each action in each state, shape `(S, A)`, floating, torch or JAX.
            visits: How often each trajectory did, shape `(N, S, A)`.
            groups: Preferences that index the trajectories.

        Returns:
            The sum of rewards of each trajectory, shape `(N,)`.

        Raises:
            ArgumentError: The dynamics are not known.
        """
        if not isinstance(self.reward, StateReward) or self.reward.dynamics is None:
            raise ArgumentError(
                "the dynamics are not known; give `StateReward(dynamics=TabularMDP(...))`, or fit with AVRIL, which "
                "does without"
            )
        num_states, num_actions = counts.shape
        width = num_actions if self.reward.by_action else 1
        with following(counts):
            zero = 0.0 * counts[0, 0]
            with plate("states", num_states * width):
                flat = sample("reward", dist.Normal(zero, self.reward_precision**-0.5))
            rewards = flat.reshape(num_states, width)
            values = self.reward.dynamics.soft_values(rewards, discount=self.discount, rationality=self.rationality)
            logits = self.rationality * values[:, None, :] + 0.0 * counts[:, :, None]
            taken = convert(np.tile(np.arange(num_actions), num_states), counts)
            with plate("actions", num_states * num_actions), scale(counts.reshape(-1)):
                sample("action", dist.Categorical(logits=logits.reshape(-1, num_actions)), obs=taken)
            returns = (visits * rewards).sum((1, 2))
            if groups:
                self.feedback_model.observe(returns, [g.map_arrays(lambda a: convert(a, counts)) for g in groups])
        return returns

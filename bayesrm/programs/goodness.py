"""How probable it is that a response is good, given its reward: p(G = 1 | x, y)."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..beliefs import RewardBelief, optimistic
from ..errors import ArgumentError
from ._log_expected_sigmoid import log_expected_sigmoid


@runtime_checkable
class Goodness(Protocol):
    """A monotone link from rewards to probabilities of being good."""

    def log_prob(self, rewards: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Log p(G = 1) of responses with these rewards, less than which `offset` says what counts as good."""
        ...

    def marginal_log_prob(
        self, belief: RewardBelief, offset: Float[Tensor, "prompts 1"]
    ) -> Float[Tensor, "prompts candidates"]:
        """Log E[p(G = 1)] over the believed rewards."""
        ...

    def offset(
        self, utility: Float[Tensor, "prompts candidates"], log_weights: Float[Tensor, "prompts candidates"]
    ) -> Float[Tensor, "prompts 1"]:
        """What rewards are measured from, in units of reward, given weights that average over the reference."""
        ...


def _check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not 0.0 < temperature < math.inf:
        raise ArgumentError(f"`temperature` is {temperature}; it is a positive number, in units of reward")


@dataclasses.dataclass(frozen=True)
class ExponentialTilt:
    """p(G = 1) proportional to `exp(r / temperature)`: being good is rare, so that no reward is ever enough.

    The posterior of responses is then `p0(y | x) exp(r / temperature) / Z`, the optimum of RLHF with that KL
    coefficient (Pandey et al., BRAIn, 2402.02479). The probability is 1 at the largest reward; which that is cancels in
    the posterior, but not in soft Q-learning, whose values are those of one reward on every set of candidates.

    Attributes:
        temperature: In units of reward; BRAIn's beta.
        maximum: The largest reward; by default that of the candidates at hand.

    Raises:
        ArgumentError: `temperature` is not positive.

    Example:
        >>> ExponentialTilt(temperature=2.0).log_prob(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0]))
        tensor([-1.,  0.])
    """

    temperature: float = 1.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if self.maximum is not None and not math.isfinite(self.maximum):
            raise ArgumentError(f"`maximum` is {self.maximum}; it is a finite number, in units of reward")

    def log_prob(self, rewards: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Log p(G = 1)."""
        return (rewards - offset) / self.temperature

    def marginal_log_prob(
        self, belief: RewardBelief, offset: Float[Tensor, "prompts 1"]
    ) -> Float[Tensor, "prompts candidates"]:
        """Log E[p(G = 1)], which rises with the variance; above 0 where a believed reward exceeds the offset."""
        return (optimistic(belief, self.temperature, deviation=False) - offset) / self.temperature

    def offset(
        self, utility: Float[Tensor, "prompts candidates"], log_weights: Float[Tensor, "prompts candidates"]
    ) -> Float[Tensor, "prompts 1"]:
        """The largest reward of each prompt."""
        if self.maximum is not None:
            return torch.full_like(utility[:, :1], self.maximum)
        return utility.masked_fill(log_weights == -math.inf, -math.inf).amax(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class LogisticGoodness:
    """p(G = 1) = sigmoid((r - c) / temperature): rewards far above c are all good, which guards against hacking.

    "Exactly one of two responses is good, and it is this one" is then the Bradley-Terry probability, whatever c is.

    Attributes:
        temperature: In units of reward.
        threshold: c above the mean reward of the reference policy, in units of reward; that mean is estimated from
            the candidates, so that an offset which all rewards of a prompt share changes nothing.

    Raises:
        ArgumentError: `temperature` is not positive, or `threshold` not finite.

    Example:
        >>> LogisticGoodness().log_prob(torch.tensor([0.0]), torch.tensor([0.0])).exp()
        tensor([0.5000])
    """

    temperature: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not math.isfinite(self.threshold):
            raise ArgumentError(f"`threshold` is {self.threshold}; it is a finite number, in units of reward")

    def log_prob(self, rewards: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Log p(G = 1)."""
        return torch.nn.functional.logsigmoid((rewards - offset) / self.temperature)

    def marginal_log_prob(
        self, belief: RewardBelief, offset: Float[Tensor, "prompts 1"]
    ) -> Float[Tensor, "prompts candidates"]:
        """Log E[p(G = 1)]."""
        if belief.draws is not None:
            draws = self.log_prob(belief.draws, offset.expand_as(belief.draws))
            return torch.logsumexp(draws, 0) - math.log(len(draws))
        return log_expected_sigmoid((belief.mean - offset) / self.temperature, belief.std / self.temperature)

    def offset(
        self, utility: Float[Tensor, "prompts candidates"], log_weights: Float[Tensor, "prompts candidates"]
    ) -> Float[Tensor, "prompts 1"]:
        """The reference's mean reward and `threshold`."""
        return (log_weights.exp() * utility).sum(1, keepdim=True) + self.threshold

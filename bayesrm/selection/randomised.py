"""Rules that draw the pick: Thompson sampling, soft best-of-n and inference-time pessimism.

Each is a function of its seed: the same seed gives the same pick.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ..beliefs import RewardBelief, thompson
from ..errors import ArgumentError
from ._rule import Rule
from .expectation import Mean


@dataclasses.dataclass(frozen=True)
class Thompson:
    """One joint draw of the rewards for each prompt: picks a candidate with the probability that it is the best.

    Attributes:
        seed: Seed of the draw.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.zeros(1, 2), torch.ones(1, 2, 1))
        >>> bool((Thompson(seed=1)(belief) == Thompson(seed=1)(belief)).all())
        True
    """

    seed: int = 0

    def __call__(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """Scores, shape `(B, K)`."""
        return thompson(belief, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class SoftBestOfN:
    """Picks candidate i with probability proportional to `exp(utility_i / temperature)` (Verdun et al., 2505.03156).

    Its pick follows the reference policy tilted by `exp(r / temperature)` as the number of candidates grows, so that
    the temperature, not n, says how far from the reference it goes; best-of-n is its limit at temperature 0.

    Attributes:
        temperature: In units of reward.
        utility: Scores that take the place of the reward.
        seed: Seed of the pick.

    Raises:
        ArgumentError: `temperature` is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, 1))
        >>> SoftBestOfN(temperature=0.5).probabilities(belief)
        tensor([[0.1192, 0.8808]])
    """

    temperature: float
    utility: Rule = dataclasses.field(default_factory=Mean)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ArgumentError(
                f"`temperature` is {self.temperature}; it is positive (use `Mean()` for its limit at 0)"
            )

    def probabilities(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """Probability of each pick, shape `(B, K)`; rows sum to 1."""
        chances: Tensor = self._logits(belief).softmax(1).to(belief.mean)
        return chances

    def __call__(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """Scores whose maximum is the pick (Gumbel 1954), shape `(B, K)`."""
        logits = self._logits(belief)
        gumbel = -_uniform(logits, self.seed, 1)[0].log().neg().log()
        scores: Tensor = logits + gumbel
        return scores

    def _logits(self, belief: RewardBelief) -> Tensor:
        # A uniform number of float32 may be 1, whose Gumbel number is infinite.
        return (self.utility(belief).double() / self.temperature).masked_fill(~belief.valid, -torch.inf)


@dataclasses.dataclass(frozen=True)
class InferenceTimePessimism:
    """Rejection sampling from the chi-squared regularised policy (Huang et al., 2503.21878).

    Candidates are accepted with probability proportional to `relu(utility - threshold)`. The threshold solves
    `mean relu((utility - threshold) / b) = 1` over half of the candidates, drawn at random; the other half is fresh and
    is gone through in random order until one is accepted, but for its last, which is taken if none is. With one set for
    both, the rule would be biased. More candidates do not make it greedier.

    Attributes:
        b: Regularisation, in units of reward; large b picks almost at random.
        utility: Scores that take the place of the reward.
        bound: Upper bound of the utility, by default the largest among the prompt's candidates.
        seed: Seed of halves, order and acceptance.

    Raises:
        ArgumentError: `b` is not positive, or a candidate's utility exceeds `bound`.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[0.0, 0.0, 3.0, 4.0]]), torch.zeros(1, 4, 1))
        >>> InferenceTimePessimism(b=1.0).probabilities(belief)
        tensor([[0.0000, 0.0000, 0.3750, 0.6250]])
    """

    b: float
    utility: Rule = dataclasses.field(default_factory=Mean)
    bound: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.b > 0:
            raise ArgumentError(f"`b` is {self.b}; a regularisation strength is positive")

    def probabilities(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """The chi-squared regularised policy on the candidates, all of them used for the threshold; shape `(B, K)`."""
        utility = self._utility(belief)
        weight = _excess(utility, _threshold(utility, belief.valid, self.b), belief.valid)
        return (weight / weight.sum(1, keepdim=True)).to(belief.mean)

    def __call__(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """1 for the pick and 0 for the others, shape `(B, K)`."""
        utility, valid = self._utility(belief), belief.valid
        top = torch.zeros_like(utility[:, :1])
        if self.bound is not None:
            highest = self.utility(belief).double().masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
            if bool((highest > self.bound).any()):
                raise ArgumentError(f"`bound` is {self.bound}, but a utility is {float(highest.max()):.4g}, above it")
            top = self.bound - highest
        order, acceptance = _uniform(utility, self.seed, 2)
        place = order.masked_fill(~valid, torch.inf).argsort(1).argsort(1)
        half = valid & (place < valid.sum(1, keepdim=True) // 2)
        # A single candidate leaves no half to set the threshold with, nor is there anything to choose.
        threshold = _threshold(utility, torch.where(half.any(1, keepdim=True), half, valid), self.b)
        chance = _excess(utility, threshold, valid) / (top - threshold)
        fresh = valid & ~half
        # Places are taken by valid candidates first, so that the last fresh one has the highest place of all.
        last = fresh & (place == valid.sum(1, keepdim=True) - 1)
        accepted = fresh & (acceptance < chance) & ~last
        never = torch.full_like(place, 2 * place.shape[1])
        rank = torch.where(accepted | last, place, never)
        return torch.nn.functional.one_hot(rank.argmin(1), rank.shape[1]).to(belief.mean)

    def _utility(self, belief: RewardBelief) -> Tensor:
        """In float64 and less its maximum, so that a small `b` is not lost beside a large offset."""
        utility = self.utility(belief).double().masked_fill(~belief.valid, -torch.inf)
        return (utility - utility.amax(1, keepdim=True)).masked_fill(~belief.valid, 0.0)


def _threshold(utility: Tensor, among: Tensor, b: float) -> Tensor:
    """The t with `mean relu((utility - t) / b) = 1` over some candidates of each prompt, shape `(B, 1)`."""
    ordered = utility.masked_fill(~among, -torch.inf).sort(1, descending=True).values
    count = among.sum(1, keepdim=True)
    place = torch.arange(1, ordered.shape[1] + 1, device=utility.device)
    sums = ordered.masked_fill(place > count, 0.0).cumsum(1)
    # With the m largest above it, t = (their sum - count * b) / m; m is the last for which that holds.
    solution = (sums - count.to(sums) * b) / place
    active = ((ordered > solution) & (place <= count)).sum(1, keepdim=True).clamp_min(1)
    return solution.gather(1, active - 1)


def _excess(utility: Tensor, threshold: Tensor, valid: Tensor) -> Tensor:
    return (utility - threshold).clamp_min(0.0).masked_fill(~valid, 0.0)


def _uniform(like: Tensor, seed: int, count: int) -> Tensor:
    """Uniform numbers in float64, shape `(count, B, K)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *like.shape), generator=generator, dtype=torch.float64).to(like.device)

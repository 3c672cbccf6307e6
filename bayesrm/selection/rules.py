"""Selection rules: a score for each candidate, computed from the belief alone."""

import dataclasses
import enum

from jaxtyping import Float
from torch import Tensor

from ..beliefs import RewardBelief, lower_bound, thompson
from ..errors import ArgumentError


class Spread(enum.StrEnum):
    """Whose standard deviation a penalty uses."""

    DEVIATION = "deviation"
    """The candidate's deviation from the mean of its prompt's candidates: what preferences identify."""
    POINTWISE = "pointwise"
    """The candidate's own reward, with the offset that all candidates share (Yang et al., 2402.13210)."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """The expected reward: plain best-of-n.

    Example:
        >>> import torch, bayesrm as brm
        >>> Mean()(brm.RewardBelief(torch.tensor([[0.1, 0.3]]), torch.ones(1, 2, 1)))
        tensor([[0.1000, 0.3000]])
    """

    def __call__(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """Scores, shape `(B, K)`."""
        return belief.mean


@dataclasses.dataclass(frozen=True)
class LowerConfidenceBound:
    """`mean - k * std`: prefers the candidate whose reward is high and known (Yang et al., 2402.13210).

    Attributes:
        k: Standard deviations to subtract.
        spread: Which standard deviation; on real candidates the pointwise one did nothing and the deviation's helped.

    Raises:
        ArgumentError: `k` is negative or `spread` unknown.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.9]]), torch.tensor([[[2.0], [0.0]]]))
        >>> LowerConfidenceBound(k=1.0, spread="pointwise")(belief)
        tensor([[-1.0000,  0.9000]])
    """

    k: float = 1.0
    spread: str = "deviation"

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise ArgumentError(
                f"`k` is {self.k}; a lower bound subtracts a non-negative number of standard deviations"
            )
        known = [s.value for s in Spread]
        if self.spread not in known:
            raise ArgumentError(f"`spread` is {self.spread!r}; it is one of {known}")

    def __call__(self, belief: RewardBelief) -> Float[Tensor, "prompts candidates"]:
        """Scores, shape `(B, K)`."""
        return lower_bound(belief, self.k, deviation=Spread(self.spread) is Spread.DEVIATION)


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

"""The distribution of the best of n responses (Sessa et al., BOND, 2407.14622)."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...beliefs import expected
from ...errors import ArgumentError
from ...programs import ScoredCandidates
from ._utility import Utility, check_utility, utilities

#: Least weight of a response, far above what float64 cannot hold.
_TINY = 1e-290


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """`pi*(y) = P(the best of n draws from the reference policy is y)`, exact with ties.

    With `p_<` and `p_<=` the probabilities that a draw of the reference has a lower, or no higher, utility,
    `pi*(y) = p0(y) p_<=(y)^(n - 1) sum_{i=1}^{n} (p_<(y) / p_<=(y))^(i - 1)` (theorem 1 of the paper): responses that
    are equally good share the win in proportion to p0. It depends on the order of the utilities alone, and n is the
    strength of the tilt. Where candidates were drawn, the probabilities are estimated from them, weighted towards the
    reference.

    Attributes:
        n: Number of draws of which the best counts.
        utility: What stands for the reward.

    Raises:
        ArgumentError: `n` is below 1.

    Example:
        >>> import bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> candidates = brm.programs.ScoredCandidates(belief, reference=torch.tensor([[0.25, 0.75]]).log())
        >>> BestOfN(n=2).log_density(candidates).exp()
        tensor([[0.4375, 0.5625]])
    """

    n: int
    utility: Utility = expected

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ArgumentError(f"`n` is {self.n!r}; it is a whole number of draws, at least 1")
        check_utility(self.utility)

    def log_density(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log pi*(y | x); normalised where the candidates are exhaustive."""
        scores = utilities(self.utility, candidates)
        # In float64, and above 0, so that responses of the reference's far tail keep an order.
        weights = candidates.log_weights_of(candidates.reference.double()).exp().clamp_min(_TINY)
        lower, tied = self._quantiles(scores.masked_fill(~candidates.mask, math.inf), weights)
        # p_<=^n - p_<^n over p_= is the closed form of the sum; in logarithms, with p_</p_<= = exp(log_ratio).
        up_to = (lower + tied).clamp_max(1.0)
        log_ratio = torch.log1p(-(tied / up_to).clamp_max(1.0))
        log_tilt = self.n * up_to.log() + torch.log(-torch.expm1(self.n * log_ratio)) - tied.log()
        log_density = candidates.reference + log_tilt.to(candidates.reference)
        return log_density.masked_fill(~candidates.mask, -math.inf)

    @staticmethod
    def _quantiles(scores: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of a lower utility, and of an equal one, for every candidate, both `(B, n)`."""
        order = scores.argsort(1)
        ranked = scores.gather(1, order)
        before = torch.cat([torch.zeros_like(weights[:, :1]), weights.gather(1, order).cumsum(1)], 1)
        first = torch.searchsorted(ranked.contiguous(), scores.contiguous(), side="left")
        last = torch.searchsorted(ranked.contiguous(), scores.contiguous(), side="right")
        lower = before.gather(1, first)
        # The difference of cumulated weights would lose an own weight that is tiny beside what lies below it.
        return lower, torch.maximum(before.gather(1, last) - lower, weights)

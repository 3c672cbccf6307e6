"""The policy that pessimism at inference time samples from (Huang et al., 2503.21878)."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...beliefs import expected
from ...errors import ArgumentError
from ...programs import ScoredCandidates
from ._utility import Utility, check_utility, utilities


@dataclasses.dataclass(frozen=True)
class ChiSquaredPessimism:
    """`pi*(y) = p0(y) max(0, (u(y) - lambda) / strength)`, lambda such that it sums to 1.

    The maximiser of `E[u] - strength / 2 * chi-squared(pi || p0)`: no response becomes more than
    `(max u - lambda) / strength` times as probable, so that the coverage of the reference bounds what errors of the
    reward can do (Huang et al., "Is best-of-N the best of them?", 2503.21878).

    Attributes:
        strength: In units of reward; the paper's beta. The larger, the nearer to the reference.
        utility: What stands for the reward.

    Raises:
        ArgumentError: `strength` is not positive.

    Example:
        >>> import bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> candidates = brm.programs.ScoredCandidates(belief, reference=torch.tensor([[0.5, 0.5]]).log())
        >>> ChiSquaredPessimism(strength=2.0).log_density(candidates).exp()
        tensor([[0.6250, 0.3750]])
    """

    strength: float
    utility: Utility = expected

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not 0.0 < self.strength < math.inf:
            raise ArgumentError(f"`strength` is {self.strength}; it is a positive number, in units of reward")
        check_utility(self.utility)

    def log_density(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log pi*(y | x), minus infinity where it is zero; normalised where the candidates are exhaustive."""
        scores = utilities(self.utility, candidates).double()
        # From the best one, so that a small strength is not lost beside a large offset.
        scores = scores - scores.masked_fill(~candidates.mask, -math.inf).amax(1, keepdim=True)
        weights = candidates.log_weights_of(candidates.reference.double()).exp()
        excess = scores - self._threshold(scores, weights, candidates.mask)
        density = torch.where(candidates.mask, excess.clamp_min(0.0) / self.strength, 0.0)
        log_density = candidates.reference + density.log().to(candidates.reference)
        return log_density.masked_fill(~candidates.mask, -math.inf)

    def _threshold(self, scores: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """The lambda with `sum_i w_i max(0, s_i - lambda) = strength`, shape `(B, 1)`."""
        ranked, order = scores.masked_fill(~mask, -math.inf).sort(1, descending=True)
        ranked = ranked.masked_fill(ranked == -math.inf, 0.0)
        w = weights.gather(1, order)
        mass, total = w.cumsum(1), (w * ranked).cumsum(1)
        # lambda if exactly the k best are above it; the right k is the largest whose k-th best still is.
        each = (total - self.strength) / mass
        above = (ranked > each) & mask.gather(1, order)
        # The best response is always above, also where its own weight is lost in rounding.
        place = (above.to(torch.int64) * torch.arange(1, above.shape[1] + 1, device=above.device)).amax(1)
        return each.gather(1, (place - 1).clamp_min(0)[:, None])

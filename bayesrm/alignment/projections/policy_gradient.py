"""The score-function gradient of KL(policy || target), with a leave-one-out baseline (Ahmadian et al., 2402.14740)."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._projection import importance_ratio, inside, mean_over


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """`- 1/n sum_i w_i A_i log q(y_i)` with the return `log pi*(y_i) - log q(y_i)`, less the others' mean, as A.

    With the posterior of the exponential tilt as target the return is `(r - beta log(q / p0)) / beta`: RLHF with
    REINFORCE leave-one-out. With a mirror-descent target and the policy itself as anchor it is Nash-MD's gradient.

    The candidates should come from the policy. Where it has moved since they were drawn, importance weights
    w = q / p' keep the gradient unbiased; `clip` bounds them, at the price of a bias.

    Attributes:
        clip: Largest importance weight.

    Raises:
        ArgumentError: `clip` is below 1; or, when called, a prompt has a single draw, which leaves no baseline.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_q = torch.tensor([[-3.0, -4.0]], requires_grad=True)
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_q.detach(), proposal=log_q.detach())
        >>> PolicyGradient()(log_q, brm.fit(brm.GoodnessPosterior(), drawn)).sum().backward()
        >>> log_q.grad
        tensor([[-0.5000,  0.5000]])
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not 1.0 <= self.clip < math.inf:
            raise ArgumentError(f"`clip` is {self.clip}; the largest importance weight is at least 1")

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """The baseline needs another candidate."""
        return 2, None

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        candidates = posterior.candidates
        returns = torch.where(candidates.mask, posterior.log_density - log_probs.detach(), 0.0)
        if not bool(torch.isfinite(returns).all()):
            raise ArgumentError("the target gives a candidate density zero; the reverse KL divergence is infinite")
        ratio = importance_ratio(log_probs, posterior)
        if self.clip is not None:
            ratio = ratio.clamp_max(self.clip)
        advantages = returns - self._baseline(returns, ratio, posterior)
        return -mean_over(ratio * advantages * inside(log_probs, posterior), candidates.mask)

    @staticmethod
    def _baseline(returns: Tensor, ratio: Tensor, posterior: ResponsePosterior) -> Tensor:
        mask = posterior.candidates.mask
        if posterior.candidates.exhaustive:
            return mean_over(ratio * returns, mask)[:, None]
        counts = mask.sum(1, keepdim=True)
        if bool((counts < 2).any()):
            raise ArgumentError("a leave-one-out baseline needs at least 2 candidates of every prompt")
        total = returns.sum(1, keepdim=True)
        return (total - returns) / (counts - 1)

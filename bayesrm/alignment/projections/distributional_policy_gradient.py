"""Importance-weighted gradients of the forward KL divergence: DPG (1912.08517) and GDC++ (2206.00761)."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ._projection import importance_ratio, inside, mean_over


@dataclasses.dataclass(frozen=True)
class DistributionalPolicyGradient:
    """`- 1/n sum_i (p_i / p'_i) log q_i`: an unbiased gradient of KL(target || policy) if the target is normalised.

    Parshakova et al., "Distributional reinforcement learning for energy-based sequential models" (1912.08517). With
    `baseline` the weights are `(p_i - q_i) / p'_i` (GDC++, Korbak et al., 2206.00761).

    The target's normalising constant is `posterior.log_evidence`; where that was estimated from these very candidates
    the weights are self-normalised, and without a baseline it is `ForwardKL`. Put a known or a running estimate there
    by `dataclasses.replace(posterior, log_evidence=...)`.

    Attributes:
        baseline: Subtract the policy's importance weights.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[0.5, 0.5]]).log()
        >>> all_there_are = brm.programs.ScoredCandidates(belief, reference=log_p0)
        >>> posterior = brm.fit(brm.GoodnessPosterior(), all_there_are)
        >>> DistributionalPolicyGradient(baseline=False)(log_p0, posterior)
        tensor([0.6931])
    """

    baseline: bool = True

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        candidates = posterior.candidates
        log_ratio = posterior.log_density - posterior.log_evidence[:, None] - candidates.log_proposal
        weights = torch.where(candidates.mask, log_ratio.exp(), 0.0)
        if self.baseline:
            weights = weights - importance_ratio(log_probs, posterior)
        return -mean_over(weights * inside(log_probs, posterior), candidates.mask)

"""KL(policy || target) between self-normalised importance weights (Ji et al., EXO, 2402.00856)."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._projection import log_policy_weights


@dataclasses.dataclass(frozen=True)
class ReverseKL:
    """`sum_i b_i log(b_i / a_i)`, b the policy's and a the target's self-normalised weights on the candidates.

    The mode-seeking counterpart of `ListwiseCrossEntropy`; the loss of EXO (2402.00856). Exactly KL(policy || target)
    where the candidates are exhaustive. The target must not be zero where the policy is not.

    Raises:
        ArgumentError: When called: the target gives a candidate density zero.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[0.5, 0.5]]).log()
        >>> posterior = brm.fit(brm.GoodnessPosterior(), brm.programs.ScoredCandidates(belief, reference=log_p0))
        >>> ReverseKL()(log_p0, posterior)
        tensor([0.1201])
    """

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        log_policy = log_policy_weights(log_probs, posterior)
        if bool((posterior.log_weights[posterior.candidates.mask] == -math.inf).any()):
            raise ArgumentError("the target gives a candidate density zero; the reverse KL divergence is infinite")
        gap = torch.where(posterior.candidates.mask, log_policy - posterior.log_weights, 0.0)
        return torch.where(posterior.candidates.mask, log_policy.exp() * gap, 0.0).sum(1)

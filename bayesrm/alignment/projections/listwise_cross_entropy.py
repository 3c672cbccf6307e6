"""BRAIn's projection: cross-entropy between self-normalised importance weights (Pandey et al., 2402.02479)."""

import dataclasses

from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ._projection import log_policy_weights, weighted_sum


@dataclasses.dataclass(frozen=True)
class ListwiseCrossEntropy:
    """`- sum_i a_i log b_i`, a the target's and b the policy's self-normalised importance weights on the candidates.

    Its gradient is BRAIn's estimator `sum_i (b_i - a_i) grad log q(y_i)`: the self-normalised baseline comes out of the
    softmax. It is unbiased for the self-normalised divergence `E KL(a || b)`, which is zero where and only where the
    policy is the target, and biased for `KL(target || policy)`: with 8 candidates the step is about a fifth shorter, so
    that the number of candidates is also a factor on the learning rate. On pairs drawn from the reference, with a
    target that is certain of the better one, it is the loss of DPO.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -4.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> posterior = brm.fit(brm.GoodnessPosterior(), drawn)
        >>> ListwiseCrossEntropy()(log_p0, posterior)
        tensor([0.6931])
    """

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        return -weighted_sum(posterior.weights, log_policy_weights(log_probs, posterior))

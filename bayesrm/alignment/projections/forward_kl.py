"""KL(target || policy) by self-normalised importance sampling."""

import dataclasses

from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ._projection import inside, weighted_sum


@dataclasses.dataclass(frozen=True)
class ForwardKL:
    """`- sum_i a_i log q(y_i)`: weighted maximum likelihood, a the target's self-normalised importance weights.

    Up to the target's entropy the forward KL divergence, which covers all modes of the target. On the candidates of the
    reference with a target that gives the best one all weight it is fine-tuning on the best of n.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -4.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> ForwardKL()(log_p0, brm.fit(brm.GoodnessPosterior(), drawn))
        tensor([3.2689])
    """

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        return -weighted_sum(posterior.weights, inside(log_probs, posterior))

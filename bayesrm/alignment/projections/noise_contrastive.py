"""Noise-contrastive estimation of a target (Gutmann & Hyvaerinen 2010), one of WIND's losses (2410.20727)."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ._projection import inside, mean_over, weighted_sum


@dataclasses.dataclass(frozen=True)
class NoiseContrastive:
    """`- sum_i a_i log s(h_i) - 1/n sum_i log s(-h_i)` with `h = log(q / p')`: tells the target from the proposal.

    a are the target's self-normalised importance weights and s is the logistic function. A policy is normalised, so
    that no constant has to be learnt beside it; the minimum is the target.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -3.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> NoiseContrastive()(log_p0, brm.fit(brm.GoodnessPosterior(), drawn))
        tensor([1.3863])
    """

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        candidates = posterior.candidates
        log_proposal = torch.where(candidates.mask, candidates.log_proposal, 0.0)
        log_ratio = inside(log_probs, posterior) - log_proposal
        log_sigmoid = torch.nn.functional.logsigmoid
        return -weighted_sum(posterior.weights, log_sigmoid(log_ratio)) - mean_over(
            log_sigmoid(-log_ratio), candidates.mask
        )

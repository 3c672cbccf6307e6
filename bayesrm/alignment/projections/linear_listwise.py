"""LIRE's linear listwise loss (Zhu et al., ACL Findings 2024)."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._projection import inside, weighted_sum


@dataclasses.dataclass(frozen=True)
class LinearListwise:
    """`- sum_i P_i R_i` with `P = softmax(log q / temperature)` over the candidates, and R the softmax of the rewards.

    The linear cousin of `ListwiseCrossEntropy`: nothing is gained by shares for other candidates, so that its minimum
    puts all weight on the set's best response. No reference policy enters, and only the policy's relative
    probabilities of the candidates do. The rewards are those of the target, `log_density - reference`, so that an
    exponential tilt's temperature is that of their softmax.

    Attributes:
        temperature: Of the policy's log-probabilities, in nats.
        normalise: Take the softmax of the rewards, as the released code does; else the rewards as they are.

    Raises:
        ArgumentError: `temperature` is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -3.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> LinearListwise()(log_p0, brm.fit(brm.GoodnessPosterior(), drawn))
        tensor([-0.5000])
    """

    temperature: float = 2.0
    normalise: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ArgumentError(f"`temperature` is {self.temperature}; it is a positive number of nats")

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        mask = posterior.candidates.mask
        rewards = (posterior.log_density - posterior.candidates.reference).masked_fill(~mask, -math.inf)
        worth = torch.softmax(rewards, 1) if self.normalise else torch.where(mask, rewards, 0.0)
        shares = torch.softmax((inside(log_probs, posterior) / self.temperature).masked_fill(~mask, -math.inf), 1)
        return -weighted_sum(worth, shares)

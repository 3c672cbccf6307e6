"""Davidson: choices with ties, likelier the closer the rewards are."""

import dataclasses
import math

from .._typing import Array
from ..backend import dist, ops, sample
from ..data.groups import Comparison
from .base import register, require_pairs
from .bradley_terry import advantage


@register("davidson")
@dataclasses.dataclass(frozen=True)
class Davidson:
    """P(i) proportional to exp(r_i), P(tie) to nu exp((r_0 + r_1)/2), nu learnt (Davidson, JASA 1970, eq. 2.2).

    At equal rewards ties have probability nu / (2 + nu). Evalica's `newman` writes 2v for nu.

    Attributes:
        log_tie_weight_mean: Prior mean of log nu; the default puts the tie rate of equal responses near 0.2.
        log_tie_weight_scale: Prior standard deviation of log nu.

    Latents:
        tie_weight: nu, shape `()`, LogNormal prior.

    Example:
        >>> import torch, bayesrm as brm
        >>> pair = brm.data.Comparison(kind="choice", num_rows=1, num_candidates=2)
        >>> with brm.backend.Recorder({"tie_weight": torch.tensor(2.0)}):
        ...     Davidson()(torch.tensor([[1.0, 1.0]]), pair).probs
        tensor([[0.2500, 0.2500, 0.5000]])
    """

    log_tie_weight_mean: float = math.log(0.5)
    log_tie_weight_scale: float = 1.0

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over {0: first chosen, 1: second chosen, 2: tie}."""
        require_pairs("Davidson", comparison)
        tie_weight = sample("tie_weight", dist.LogNormal(self.log_tie_weight_mean, self.log_tie_weight_scale))
        half = 0.5 * advantage(rewards, comparison)
        return dist.Categorical(logits=ops.stack([half, -half, ops.log(tie_weight) + 0.0 * half], axis=-1))

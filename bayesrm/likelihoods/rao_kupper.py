"""Rao-Kupper: choices with ties, a tie being a difference too small to notice."""

import dataclasses
import math

from .._typing import Array
from ..backend import dist, ops, sample
from ..data.groups import Comparison
from .base import register, require_pairs
from .bradley_terry import advantage


@register("rao_kupper")
@dataclasses.dataclass(frozen=True)
class RaoKupper:
    """P(first) = sigmoid(d - eta), P(second) = sigmoid(-d - eta), else a tie; eta learnt (Rao & Kupper, JASA 1967).

    With theta = exp(eta) this is the usual form exp(r_i) / (exp(r_i) + theta exp(r_j)); d = r_0 - r_1 - margin.

    Attributes:
        log_threshold_mean: Prior mean of log eta; by default the tie rate of equal responses, tanh(eta / 2), is
            near 0.24.
        log_threshold_scale: Prior standard deviation of log eta.

    Latents:
        tie_threshold: eta in units of reward, shape `()`, LogNormal prior.

    Example:
        >>> import torch, bayesrm as brm
        >>> pair = brm.data.Comparison(kind="choice", num_rows=1, num_candidates=2)
        >>> with brm.backend.Recorder({"tie_threshold": torch.tensor(1.0)}):
        ...     RaoKupper()(torch.tensor([[0.0, 0.0]]), pair).probs
        tensor([[0.2689, 0.2689, 0.4621]])
    """

    log_threshold_mean: float = math.log(0.5)
    log_threshold_scale: float = 1.0

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over {0: first chosen, 1: second chosen, 2: tie}."""
        require_pairs("RaoKupper", comparison)
        threshold = sample("tie_threshold", dist.LogNormal(self.log_threshold_mean, self.log_threshold_scale))
        d = advantage(rewards, comparison)
        first, second = ops.log_sigmoid(d - threshold), ops.log_sigmoid(-d - threshold)
        # 1 - s(d - eta) - s(-d - eta) = (exp(2 eta) - 1) s(d - eta) s(-d - eta)
        tie = first + second + 2.0 * threshold + ops.log(-ops.expm1(-2.0 * threshold))
        return dist.Categorical(logits=ops.stack([first, second, tie], axis=-1))

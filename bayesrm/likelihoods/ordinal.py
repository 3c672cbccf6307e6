"""Cumulative ordinal ratings with learnt cut-points."""

import dataclasses
import math

from .._typing import Array
from ..backend import dist, ops, sample
from ..data.groups import Comparison
from ..errors import LikelihoodError
from .base import register, require_kind


@register("ordinal")
@dataclasses.dataclass(frozen=True)
class Ordinal:
    """P(rating <= l) = sigmoid(c_l - r): the proportional-odds model (McCullagh, JRSS B 1980).

    The cut-points c_0 < c_1 < ... are learnt: the first has a normal prior, the gaps between neighbours LogNormal ones.

    Attributes:
        first_mean: Prior mean of the lowest cut-point, in units of reward.
        first_scale: Its prior standard deviation.
        log_gap_mean: Prior mean of the log gap between neighbouring cut-points.
        log_gap_scale: Its prior standard deviation.

    Latents:
        first_cutpoint: c_0, shape `()`.
        cutpoint_gaps: c_{l+1} - c_l, shape `(num_levels - 2,)`; absent with two levels.

    Example:
        >>> import torch, bayesrm as brm
        >>> rows = brm.data.Comparison(kind="rating", num_rows=1, num_candidates=1, num_levels=3)
        >>> known = {"first_cutpoint": torch.tensor(-1.0), "cutpoint_gaps": torch.tensor([2.0])}
        >>> with brm.backend.Recorder(known):
        ...     Ordinal()(torch.zeros(1, 1), rows).probs
        tensor([[0.2689, 0.4621, 0.2689]])
    """

    first_mean: float = -2.0
    first_scale: float = 2.0
    log_gap_mean: float = math.log(1.5)
    log_gap_scale: float = 0.5

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over levels 0 .. num_levels - 1."""
        require_kind("Ordinal", comparison, "rating", hint="use BradleyTerry or PlackettLuce for comparisons")
        levels = comparison.num_levels or 0
        if levels < 2:
            raise LikelihoodError(f"Ordinal needs at least 2 rating levels, the data declare {levels}")
        first = sample("first_cutpoint", dist.Normal(self.first_mean, self.first_scale))
        r = rewards[..., 0]
        upper = [first - r]
        log_probs = [ops.log_sigmoid(upper[0])]
        if levels > 2:
            prior = dist.LogNormal(self.log_gap_mean, self.log_gap_scale).expand((levels - 2,)).to_event(1)
            gaps = sample("cutpoint_gaps", prior)
            for level in range(levels - 2):
                gap = gaps[level]
                upper.append(upper[-1] + gap)
                # s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), which holds in log space where both saturate
                log_probs.append(ops.log_sigmoid(upper[-1]) + ops.log_sigmoid(-upper[-2]) + ops.log(-ops.expm1(-gap)))
        log_probs.append(ops.log_sigmoid(-upper[-1]))
        return dist.Categorical(logits=ops.stack(log_probs, axis=-1))

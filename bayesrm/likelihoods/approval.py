"""Approvals: a response on its own is marked good or not."""

import dataclasses

from .._typing import Array
from ..backend import dist, ops, sample
from ..data.groups import Comparison
from .base import register, require_kind


@register("approval")
@dataclasses.dataclass(frozen=True)
class Approval:
    """P(approved) = sigmoid(r - offset), the offset learnt (logistic regression with a free intercept).

    Attributes:
        offset_mean: Prior mean of the offset, in units of reward.
        offset_scale: Its prior standard deviation.

    Latents:
        approval_offset: Reward at which half of the responses are approved, shape `()`.

    Example:
        >>> import torch, bayesrm as brm
        >>> rows = brm.data.Comparison(kind="approval", num_rows=1, num_candidates=1)
        >>> with brm.backend.Recorder({"approval_offset": torch.tensor(1.0)}):
        ...     Approval()(torch.tensor([[2.0]]), rows).probs
        tensor([[0.2689, 0.7311]])
    """

    offset_mean: float = 0.0
    offset_scale: float = 2.0

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over {0: not approved, 1: approved}."""
        require_kind("Approval", comparison, "approval", hint="use BradleyTerry or PlackettLuce for comparisons")
        offset = sample("approval_offset", dist.Normal(self.offset_mean, self.offset_scale))
        d = rewards[..., 0] - offset
        return dist.Categorical(logits=ops.stack([ops.log_sigmoid(-d), ops.log_sigmoid(d)], axis=-1))

"""Plackett-Luce: full, partial and top-1 rankings, and a choice among any number of candidates."""

import dataclasses

from .._typing import Array
from ..backend import Random, dist, ops
from ..data.groups import Comparison
from ..errors import ArgumentError
from .base import orderings, outcome, register, require_kind

_MAX_ENUMERATED = 1024


@register("plackett_luce")
@dataclasses.dataclass(frozen=True)
class PlackettLuce:
    """Candidates are picked one by one, each with probability softmax of the rewards left (Luce 1959; Plackett 1975).

    A ranking of depth m is the first m picks; the last pick of a full ranking is certain. A choice among K is the first
    pick, and for K = 2 the model is Bradley-Terry.

    Attributes:
        temperature: Scale of the noise in units of reward.

    Raises:
        ArgumentError: The temperature is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> rows = brm.data.Comparison(kind="ranking", num_rows=1, num_candidates=3, depth=3)
        >>> PlackettLuce()(torch.zeros(1, 3), rows).log_prob(torch.tensor([[2, 0, 1]])).exp()
        tensor([0.1667])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ArgumentError(f"`temperature` is {self.temperature}; it must be positive")

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over chosen indices `(rows,)`, or over orders from best to worst `(rows, depth)`."""
        require_kind(
            "PlackettLuce", comparison, "choice", "ranking", hint="use Ordinal for ratings, Approval for approvals"
        )
        rewards = rewards / self.temperature
        if comparison.kind == "choice":
            return dist.Categorical(logits=rewards)
        num_candidates, depth = comparison.num_candidates, comparison.depth or comparison.num_candidates

        def log_prob(order: Array) -> Array:
            picked = ops.take_along_axis(rewards, order, axis=-1)
            if depth < num_candidates:
                total = _log_total(rewards, order)
                return ops.sum(picked - total, axis=-1)
            remaining = [ops.logsumexp(picked[..., k:], axis=-1) for k in range(num_candidates - 1)]
            return ops.sum(picked[..., :-1], axis=-1) - ops.sum(ops.stack(remaining, axis=-1), axis=-1)

        def draw(random: Random) -> Array:
            # Sorting rewards plus Gumbel noise draws from Plackett-Luce (Yellott 1977).
            return ops.argsort(-(rewards + random.gumbel(tuple(rewards.shape))), axis=-1)[..., :depth]

        count = 1
        for k in range(depth):
            count *= num_candidates - k
        support = ops.asarray(orderings(num_candidates, depth), like=rewards) if count <= _MAX_ENUMERATED else None
        return outcome(
            log_prob=log_prob, sample=draw, support=support, batch_shape=(rewards.shape[0],), event_dim=1, like=rewards
        )


def _log_total(rewards: Array, order: Array) -> Array:
    """Log total weight of the candidates left before each pick of a partial ranking, shape `(..., rows, depth)`."""
    depth, num_candidates = order.shape[-1], rewards.shape[-1]
    candidates = ops.asarray(list(range(num_candidates)), like=rewards)
    totals = []
    for k in range(depth):
        gone = (order[..., :k, None] == candidates).any(-2) if k else None
        left = rewards if gone is None else ops.where(gone, 0.0 * rewards - float("inf"), rewards)
        totals.append(ops.logsumexp(left, axis=-1) + 0.0 * order[..., 0])
    return ops.stack(totals, axis=-1)

"""What a flipped answer is, for each kind of feedback, and the mixture of an answer with its flip."""

import math
from typing import Any

from .._typing import Array
from ..backend import Random, ops
from ..data.groups import Comparison
from .base import outcome, outcomes_of


def has_opposite(comparison: Comparison) -> bool:
    """Whether each answer has one opposite; a choice among more than two and a partial ranking have none."""
    if comparison.kind == "choice":
        return comparison.num_candidates == 2
    return comparison.kind != "ranking" or comparison.depth == comparison.num_candidates


def flip(value: Array, comparison: Comparison) -> Array:
    """The opposite answer, an involution on the outcomes.

    A pair's other response (a tie stays a tie), the reversed full ranking, the mirrored rating level, or the opposite
    of an approval.
    """
    if comparison.kind == "choice":
        return ops.where(value == 2, value, 1 - value)
    if comparison.kind == "ranking":
        return ops.flip(value, axis=-1)
    return (comparison.num_levels or 2) - 1 - value


def flipped_mixture(base: Any, comparison: Comparison, log_kept: Array, log_flipped: Array, *, like: Array) -> Any:
    """The mixture of `base` with its flip: with probability `exp(log_flipped)` the opposite answer is recorded.

    Where an answer has no single opposite, the recorded one is drawn from all answers, equally likely.

    Args:
        base: Distribution of the answer that was meant, batch shape `(rows,)`.
        comparison: The rows.
        log_kept: Log probability that the answer is recorded as meant, shape `()` or `(rows,)`.
        log_flipped: Log probability of the other case; the two sum to one.
        like: The rewards, for library, dtype and device.
    """
    support = outcomes_of(base)
    opposite = has_opposite(comparison)
    count = math.perm(comparison.num_candidates, comparison.depth or 1) if support is None else int(support.shape[0])

    def log_prob(value: Array) -> Array:
        other = base.log_prob(flip(value, comparison)) if opposite else -math.log(count)
        return ops.logaddexp(log_kept + base.log_prob(value), log_flipped + other)

    def draw(random: Random) -> Array:
        meant = random.draw(base)
        flipped = ops.log(random.uniform(tuple(base.batch_shape))) < log_flipped
        if opposite:
            other = flip(meant, comparison)
        else:
            noise = random.uniform((*base.batch_shape, comparison.num_candidates if support is None else count))
            order = ops.argsort(noise, axis=-1)
            other = order[..., : comparison.depth] if support is None else support[order[..., 0]]
        return ops.where(flipped[..., None] if base.event_shape else flipped, other, meant)

    return outcome(
        log_prob=log_prob,
        sample=draw,
        support=support,
        batch_shape=tuple(base.batch_shape),
        event_dim=len(base.event_shape),
        like=like,
    )

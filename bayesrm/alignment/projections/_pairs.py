"""Pairs of the candidates of a prompt."""

import enum
import math

import torch
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError


class Pairs(enum.StrEnum):
    """Which pairs of the candidates of a prompt count."""

    ALL = "all"
    """Every pair, with equal weight."""
    BEST_WORST = "best_worst"
    """The two with the largest and the smallest tilt, `log_density - reference`."""


def check_pairs(pairs: str) -> None:
    """Raises `ArgumentError` unless `pairs` is one of `Pairs`."""
    known = [str(member.value) for member in Pairs]
    if pairs not in known:
        raise ArgumentError(f"`pairs` is {pairs!r}; it is one of {known}")


def tilts(posterior: ResponsePosterior) -> Tensor:
    """`log_density - reference`, 0 outside the mask, shape `(B, n)`.

    Raises:
        ArgumentError: The target gives a candidate density zero.
    """
    candidates = posterior.candidates
    tilt = torch.where(candidates.mask, posterior.log_density - candidates.reference, 0.0)
    if not bool(torch.isfinite(tilt).all()):
        raise ArgumentError("the target gives a candidate density zero, so that no ratio to it can be matched")
    return tilt


def best_and_worst(posterior: ResponsePosterior) -> tuple[Tensor, Tensor]:
    """Places of the candidates with the largest and the smallest tilt, each `(B,)`.

    Raises:
        ArgumentError: A prompt has a single candidate.
    """
    tilt, mask = tilts(posterior), posterior.candidates.mask
    if bool((mask.sum(1) < 2).any()):
        raise ArgumentError("a prompt has a single candidate; pairs take at least 2")
    best = tilt.masked_fill(~mask, -math.inf).argmax(1)
    # Where all are equally good the best must not be its own opponent.
    own = torch.nn.functional.one_hot(best, mask.shape[1]).bool()
    worst = tilt.masked_fill(~mask | own, math.inf).argmin(1)
    return best, worst


def pair_weights(posterior: ResponsePosterior, pairs: str) -> Tensor:
    """Weights of the ordered pairs (i, j), shape `(B, n, n)`, which sum to 1 for each prompt."""
    mask = posterior.candidates.mask
    if pairs == Pairs.BEST_WORST.value:
        best, worst = best_and_worst(posterior)
        chosen = torch.zeros_like(mask[:, :, None] & mask[:, None, :], dtype=posterior.log_weights.dtype)
        rows = torch.arange(len(mask), device=mask.device)
        chosen[rows, best, worst] = 1.0
        return chosen
    different = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    allowed = (mask[:, :, None] & mask[:, None, :] & different).to(posterior.log_weights)
    total = allowed.sum((1, 2), keepdim=True)
    if bool((total == 0).any()):
        raise ArgumentError("a prompt has a single candidate; pairs take at least 2")
    return allowed / total

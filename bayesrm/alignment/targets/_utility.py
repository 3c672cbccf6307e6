"""What stands for an uncertain reward in a target."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ...beliefs import RewardBelief
from ...errors import ArgumentError
from ...programs import ScoredCandidates

#: From a belief about B prompts to scores of shape `(B, n)`: any rule of `bayesrm.selection`.
Utility: TypeAlias = Callable[[RewardBelief], Tensor]


def check_utility(utility: object) -> None:
    """Raises `ArgumentError` unless `utility` can be called on a belief."""
    if isinstance(utility, type) or not callable(utility):
        raise ArgumentError(f"`utility` is {utility!r}; it is a rule such as selection.RiskAverse(b=1.0)")


def utilities(utility: Utility, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
    """The scores of the candidates, 0 outside the mask.

    Raises:
        ArgumentError: The utility returned something else than a finite number for each candidate.
    """
    scores = utility(candidates.belief)
    if scores.shape != candidates.mask.shape or not bool(torch.isfinite(scores[candidates.mask]).all()):
        raise ArgumentError(
            f"`utility` returned scores of shape {tuple(scores.shape)}; it returns a finite number for each of the "
            f"candidates, shape {tuple(candidates.mask.shape)}"
        )
    return torch.where(candidates.mask, scores, 0.0)

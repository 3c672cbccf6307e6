"""Pooling of hidden states over the tokens of a sequence."""

import torch
from jaxtyping import Bool, Float

from ._checks import check_choice


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    kept = mask[:, :, None]
    # Set to zero, not multiplied: what a model computes for padding may be anything, NaN included.
    return hidden.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1)


def _cls(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)


#: One for each `Pooling`.
_POOLERS = {"mean": _mean, "cls": _cls, "last": _last, "max": _max}


def pool(
    hidden: Float[torch.Tensor, "batch tokens width"], mask: Bool[torch.Tensor, "batch tokens"], pooling: str
) -> Float[torch.Tensor, "batch width"]:
    """Pools hidden states over tokens.

    Args:
        hidden: Hidden states, shape `(batch, tokens, width)`, padded on the right.
        mask: True for tokens and False for padding, shape `(batch, tokens)`; at least one token a row.
        pooling: A `Pooling`.

    Returns:
        Shape `(batch, width)`.

    Raises:
        ArgumentError: `pooling` is not a `Pooling`.

    Example:
        >>> import torch
        >>> from bayesrm.rewards.features import pool
        >>> hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
        >>> [pool(hidden, mask, kind).item() for kind in ("mean", "cls", "last", "max")]
        [2.0, 1.0, 3.0, 3.0]
    """
    check_choice("pooling", pooling, _POOLERS)
    return _POOLERS[str(pooling)](hidden, mask)

"""Gradients of whole comparisons, as many as the rank of a row's curvature, from the derivatives of its items."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError, EngineError
from ._tangent import CHUNK, _sums_to_zero

#: Parameter sites, in the order of the flat vector of parameters, with their shapes.
Shapes = Mapping[str, tuple[int, ...]]


def num_parameters(shapes: Shapes) -> int:
    """Number of parameters of all sites, P."""
    return sum(map(prod, shapes.values()))


def pseudo_gradients(candidates: Tensor, blocks: Tensor) -> Tensor:
    """Vectors v with sum v v' = sum_n G_n' H_n G_n, float64, shape `(n * R, P)`, R being K or K - 1.

    Args:
        candidates: Derivatives G of each row's rewards, shape `(n, K, P)`.
        blocks: Curvature H, shape `(n, K, K)`.

    Raises:
        EngineError: A block is not positive semi-definite.
    """
    candidates, blocks = candidates.double(), blocks.double().to(candidates.device)
    # Differences first: what the candidates share, the gradient of a bias, then cancels to the last digit.
    if candidates.shape[1] > 1 and _sums_to_zero(blocks.sum(2), blocks):
        candidates, blocks = candidates[:, 1:] - candidates[:, :1], blocks[:, 1:, 1:]
    values, vectors = torch.linalg.eigh(blocks)
    if bool((values < -1e-9 * values.abs().amax()).any()):
        raise EngineError("the curvature of a row is not positive semi-definite; use curvature='auto' or 'fisher'")
    mixing = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
    gradients: Tensor = mixing.transpose(1, 2) @ candidates
    return gradients.flatten(0, 1)


def streamed_pseudo_gradients(
    jacobian: Tensor | Iterable[tuple[Tensor, Tensor]],
    shapes: Shapes,
    groups: Sequence[FeedbackGroup],
    blocks: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Pseudo-gradients of all rows, in pieces, as soon as their items are there."""
    if isinstance(jacobian, Tensor):
        jacobian = [(torch.arange(len(jacobian)), jacobian)]
    waiting = []
    for group, block in zip(groups, blocks, strict=True):
        counts = block.flatten(1).any(1)
        waiting.append((group.items.cpu()[counts.cpu()], block[counts]))
    size = 1 + max((int(items.max()) for items, _ in waiting if items.numel()), default=-1)
    uses = sum((torch.bincount(items.reshape(-1), minlength=size) for items, _ in waiting), torch.zeros(size).long())
    names, held = torch.zeros(0, dtype=torch.long), None
    for index, rows in jacobian:
        if rows.shape[1] != num_parameters(shapes):
            raise ArgumentError(
                f"`shapes` holds {num_parameters(shapes)} parameters, but `jacobian` has {rows.shape[1]} columns"
            )
        index = index.cpu()
        wanted = (index < size) & (uses[index.clamp_max(size - 1)] > 0) if size else torch.zeros_like(index).bool()
        names = torch.cat([names, index[wanted]])
        rows = rows[wanted.to(rows.device)]
        held = rows if held is None or not len(held) else torch.cat([held, rows])
        place = torch.full((size,), -1)
        place[names] = torch.arange(len(names))
        for g, (items, block) in enumerate(waiting):
            ready = (place[items] >= 0).all(1)
            now = items[ready]
            step = max(1, CHUNK // max(1, items.shape[1] * held.shape[1]))
            for part, h in zip(now.split(step), block[ready.to(block.device)].split(step), strict=True):
                if len(part):
                    yield pseudo_gradients(held[place[part].to(held.device)], h)
            uses -= torch.bincount(now.reshape(-1), minlength=size)
            waiting[g] = (items[~ready], block[~ready.to(block.device)])
        keep = uses[names] > 0
        names, held = names[keep], held[keep.to(held.device)]
    missing = sorted({int(i) for items, _ in waiting for i in items.unique()} - set(names.tolist()))
    if missing:
        raise ArgumentError(
            f"`jacobian` lacks {len(missing)} items that rows compare, the first being item {missing[0]}"
        )

"""The tangent model in whitened coordinates: rewards linear in z ~ N(0, I), and the subspace that the data inform.

With theta = center + scale * (basis z + complement), the posterior of z differs from its prior only inside the row
space of the training features (differences for comparisons, plain rows for ratings and approvals); the complement keeps
the prior exactly. In *primal* coordinates the basis is the identity; in *dual* coordinates it spans the row space,
found by a QR decomposition, which is cheaper when comparisons are fewer than parameters. Both give the same posterior.
"""

import dataclasses
import enum
from collections.abc import Sequence

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ._curvature import Curvature

#: Rows of a design are gathered in chunks of about this many numbers.
CHUNK = 2**25


class Coordinates(enum.StrEnum):
    """In which coordinates the posterior over parameters is computed."""

    AUTO = "auto"
    """The smaller of the two."""
    PRIMAL = "primal"
    """All P parameters."""
    DUAL = "dual"
    """The row space of the training features."""


@dataclasses.dataclass(frozen=True)
class Whitening:
    """theta = center + scale * (basis @ z + complement).

    Attributes:
        center: Prior mean, shape `(P,)`.
        scale: Prior standard deviation, shape `(P,)`.
        basis: Orthonormal columns, shape `(P, R)`; `None` is the identity.
    """

    center: Tensor
    scale: Tensor
    basis: Tensor | None

    @property
    def size(self) -> int:
        """Number of coordinates R."""
        return int(self.scale.shape[0] if self.basis is None else self.basis.shape[1])

    def design(self, jacobian: Tensor) -> Tensor:
        """Derivative of rewards in z, shape `(n, R)`, from their derivative in the parameters, shape `(n, P)`."""
        whitened = jacobian * self.scale
        return whitened if self.basis is None else whitened @ self.basis

    def complement(self, jacobian: Tensor) -> Tensor | None:
        """What the whitened derivative has outside the basis, shape `(n, P)`; `None` when there is no outside."""
        if self.basis is None:
            return None
        whitened = jacobian * self.scale
        return whitened - (whitened @ self.basis) @ self.basis.T

    def to_parameters(self, z: Tensor) -> Tensor:
        """Parameters at coordinates z, the complement at its prior mean."""
        return self.center + self.scale * (z if self.basis is None else self.basis @ z)

    def rescaled(self, factor: float) -> "Whitening":
        """The same coordinates for a prior whose precisions are `factor` times larger."""
        return dataclasses.replace(self, scale=self.scale * factor**-0.5)


def row_space(
    jacobian: Tensor,
    groups: Sequence[FeedbackGroup],
    center: Tensor,
    scale: Tensor,
    coordinates: Coordinates,
    differences: bool,
) -> Whitening:
    """Coordinates for training items with the given derivatives, shape `(items, P)`.

    Args:
        jacobian: Derivative of each training item's reward in the parameters.
        groups: The rows.
        center: Prior mean of the parameters.
        scale: Prior standard deviation of the parameters.
        coordinates: Primal, dual, or the smaller.
        differences: Whether the feedback depends on differences of rewards inside a row alone.
    """
    index = [_contrast_pairs(g, differences) for g in groups]
    pairs = torch.unique(torch.cat(index), dim=0)
    if coordinates is Coordinates.PRIMAL or (coordinates is Coordinates.AUTO and len(pairs) >= len(scale)):
        return Whitening(center, scale, None)
    rows = jacobian[pairs[:, 0]].clone()
    against = pairs[:, 1] >= 0
    rows[against] -= jacobian[pairs[against, 1]]
    # Householder QR keeps the basis orthonormal to rounding whatever the rank; the Gram matrix's square would not.
    basis, _ = torch.linalg.qr((rows * scale).T)
    return Whitening(center, scale, basis)


def _contrast_pairs(group: FeedbackGroup, differences: bool) -> Tensor:
    """Item pairs (a, b) standing for feature differences, b = -1 for plain features; shape `(n, 2)`."""
    items = group.items[group.weight > 0]
    if differences and group.comparison.num_candidates > 1:
        first = items[:, :1].expand(-1, items.shape[1] - 1)
        return torch.stack([items[:, 1:].reshape(-1), first.reshape(-1)], dim=1)
    flat = items.reshape(-1)
    return torch.stack([flat, torch.full_like(flat, -1)], dim=1)


def joint_precision(design: Tensor, groups: Sequence[FeedbackGroup], c: Curvature) -> Tensor:
    """Posterior precision of (z, latents), shape `(R + Q, R + Q)`: curvature of the data plus that of the priors.

    Args:
        design: Derivative of the items' rewards in z, shape `(items, R)`.
        groups: The rows.
        c: Curvature at the point.
    """
    size, q = design.shape[1], c.latents.shape[0]
    precision = torch.zeros(size + q, size + q, dtype=design.dtype, device=design.device)
    precision[:size, :size] = torch.eye(size, dtype=design.dtype, device=design.device)
    precision[size:, size:] = c.latents + c.prior
    for group, block, cross in zip(groups, c.rewards, c.cross, strict=True):
        k = block.shape[1]
        step = max(1, CHUNK // max(1, k * size))
        # Blocks whose rows sum to zero see differences only: K - 1 of them carry everything.
        contrast = k > 1 and _sums_to_zero(block.sum(2), block) and _sums_to_zero(cross.sum(1), cross)
        for start in range(0, len(block), step):
            part = slice(start, start + step)
            rows = design[group.items[part]]
            h, x = block[part], cross[part]
            if contrast:
                rows, h, x = rows[:, 1:] - rows[:, :1], h[:, 1:, 1:], x[:, 1:]
            flat = rows.flatten(0, 1)
            precision[:size, :size] += (h @ rows).flatten(0, 1).T @ flat
            if q:
                precision[:size, size:] += flat.T @ x.reshape(-1, q)
    precision[size:, :size] = precision[:size, size:].T
    return 0.5 * (precision + precision.T)


def _sums_to_zero(total: Tensor, terms: Tensor) -> bool:
    return total.numel() == 0 or bool(total.abs().max() <= 1e-12 * terms.abs().max())

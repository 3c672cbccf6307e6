"""Designs whose columns belong to prior groups: given by the columns, or by the Gram matrices of the groups."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError
from ._curvature import Curvature
from ._newton import Mode
from ._tangent import CHUNK

#: Eigenvalues of a Gram matrix below this part of the largest are rounding.
_RANK = 1e-14


@dataclasses.dataclass(frozen=True)
class EvidencePoint:
    """Laplace's approximation at one set of log factors.

    Attributes:
        log_factors: Log factors on the declared precisions, shape `(G,)`.
        design: Derivative of the items' rewards in z, shape `(items, R)`.
        mode: The mode in the coordinates of `design`.
        rewards: Rewards of the items there, shape `(items,)`.
        change: Their distance from the offset, shape `(items,)`.
        scores: Gradient of the log likelihood in the rewards, shape `(items,)`; at the mode z is `design.T @ scores`.
        curvature: Curvature of the feedback there.
        factor: Cholesky factor of the posterior precision, shape `(R + Q, R + Q)`.
        log_evidence: Laplace's approximation of log p(feedback).
    """

    log_factors: Tensor
    design: Tensor
    mode: Mode
    rewards: Tensor
    change: Tensor
    scores: Tensor
    curvature: Curvature
    factor: Tensor
    log_evidence: float


@runtime_checkable
class GroupedDesign(Protocol):
    """A design whose columns belong to prior groups, as a function of the groups' log factors l."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, in the order of l."""

    @property
    def num_groups(self) -> int:
        """Number of groups G."""

    def design(self, log_factors: Tensor) -> Tensor:
        """A factor of the rewards' prior covariance K(l) = design design', shape `(items, R)`."""

    def spread(self, log_factors: Tensor, scores: Tensor) -> Tensor:
        """exp(-l_g) Phi_g Phi_g' scores of every group, shape `(items, G)`."""

    def informed(self, point: EvidencePoint, groups: Sequence[FeedbackGroup], root: Tensor, inverse: Tensor) -> Tensor:
        """Number of directions of each group that the feedback determines (MacKay's gamma), shape `(G,)`.

        Args:
            point: Where.
            groups: The rows.
            root: A root of the posterior covariance of (rewards, latents), shape `(items + Q, R + Q)`.
            inverse: Inverse of the factor of the posterior precision, shape `(R + Q, R + Q)`.
        """

    def carried(self, point: EvidencePoint, log_factors: Tensor, design: Tensor) -> Tensor:
        """Coordinates in `design`, that of other log factors, with the rewards of `point`; shape `(R,)`."""


@dataclasses.dataclass(frozen=True)
class ColumnGroups:
    """The columns themselves: cheap where they are fewer than the items (a sketch, a last layer).

    Attributes:
        columns: Whitened design Phi under the declared precisions, shape `(items, R)`, float64.
        group_of_column: Group of each column, shape `(R,)`, integers from 0.
        names: Names of the groups; by default `"group 0"` and so on.

    Raises:
        ArgumentError: The shapes do not fit, or a group has no name.
    """

    columns: Tensor
    group_of_column: Tensor
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.columns.dim() != 2 or tuple(self.group_of_column.shape) != (self.columns.shape[1],):
            raise ArgumentError(
                f"`group_of_column` has shape {tuple(self.group_of_column.shape)} for columns of shape "
                f"{tuple(self.columns.shape)}; give one group for each of the R columns of (items, R)"
            )
        if self.group_of_column.numel() == 0 or int(self.group_of_column.min()) < 0:
            raise ArgumentError("`group_of_column` is empty or has a negative group; groups are integers from 0")
        if self.names is not None and len(self.names) <= int(self.group_of_column.max()):
            raise ArgumentError(
                f"`names` has {len(self.names)} names and `group_of_column` a group "
                f"{int(self.group_of_column.max())}; give one name for each group"
            )

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return _named(self.names, int(self.group_of_column.max()) + 1)

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return len(self.group_names)

    def design(self, log_factors: Tensor) -> Tensor:
        """The columns scaled by exp(-l_g / 2), shape `(items, R)`."""
        return self.columns * torch.exp(-0.5 * log_factors)[self.group_of_column]

    def spread(self, log_factors: Tensor, scores: Tensor) -> Tensor:
        """exp(-l_g) Phi_g Phi_g' scores of every group, shape `(items, G)`."""
        members = torch.nn.functional.one_hot(self.group_of_column, self.num_groups).to(self.columns.dtype)
        weights = torch.exp(-log_factors)[self.group_of_column] * (self.columns.T @ scores)
        return self.columns @ (weights[:, None] * members)

    def informed(self, point: EvidencePoint, groups: Sequence[FeedbackGroup], root: Tensor, inverse: Tensor) -> Tensor:
        """The columns of a group less their posterior variances, prior ones being 1."""
        known = 1.0 - inverse[:, : self.columns.shape[1]].square().sum(0)
        return known.new_zeros(self.num_groups).index_add_(0, self.group_of_column, known)

    def carried(self, point: EvidencePoint, log_factors: Tensor, design: Tensor) -> Tensor:
        """Every column's coordinate, its scale undone."""
        return point.mode.z * torch.exp(0.5 * (log_factors - point.log_factors))[self.group_of_column]


@dataclasses.dataclass(frozen=True)
class GramGroups:
    """The groups' Gram matrices K_g = Phi_g Phi_g': for designs of many more columns than items.

    The working design is any factor of K(l), its coordinates mix the groups.

    Attributes:
        grams: One Gram matrix a group under the declared precisions, G of shape `(items, items)`, float64.
        names: Names of the groups; by default `"group 0"` and so on.

    Raises:
        ArgumentError: The matrices are not square or symmetric, or the names do not fit.
    """

    grams: Sequence[Tensor]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.grams:
            raise ArgumentError("`grams` is empty; give one Gram matrix for each group")
        items = self.grams[0].shape[0]
        for g, gram in enumerate(self.grams):
            if tuple(gram.shape) != (items, items):
                raise ArgumentError(
                    f"`grams[{g}]` has shape {tuple(gram.shape)}; all are ({items}, {items}), items twice"
                )
            if bool((gram - gram.T).abs().max() > 1e-9 * gram.abs().max()):
                raise ArgumentError(f"`grams[{g}]` is not symmetric; a Gram matrix is Phi_g @ Phi_g.T")
        if self.names is not None and len(self.names) != len(self.grams):
            raise ArgumentError(f"`names` has {len(self.names)} names for {len(self.grams)} Gram matrices")

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups."""
        return _named(self.names, len(self.grams))

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return len(self.grams)

    def design(self, log_factors: Tensor) -> Tensor:
        """A factor of K(l), `(items, R)`: Cholesky's, or the eigenvectors' where the rank is below the items'."""
        total = torch.zeros_like(self.grams[0])
        for log_factor, gram in zip(log_factors, self.grams, strict=True):
            total += torch.exp(-log_factor) * gram
        live = self._live()
        total = total[live][:, live]
        factor, info = torch.linalg.cholesky_ex(total)
        if int(info):
            values, vectors = torch.linalg.eigh(total)
            kept = values > _RANK * values[-1]
            factor = vectors[:, kept] * values[kept].sqrt()
        design: Tensor = factor.new_zeros(len(live), factor.shape[1])
        design[live] = factor
        return design

    def spread(self, log_factors: Tensor, scores: Tensor) -> Tensor:
        """exp(-l_g) K_g scores of every group, shape `(items, G)`."""
        return torch.stack([gram @ scores for gram in self.grams], dim=1) * torch.exp(-log_factors)

    def informed(self, point: EvidencePoint, groups: Sequence[FeedbackGroup], root: Tensor, inverse: Tensor) -> Tensor:
        """tr(exp(-l_g) K_g (H - H S H)), H the curvature and S the posterior covariance of (rewards, latents)."""
        items = len(point.rewards)
        moved = curved(groups, point.curvature, root[:items], root[items:])
        shrunk = -moved @ moved.T
        for group, block in zip(groups, point.curvature.rewards, strict=True):
            rows, columns = torch.broadcast_tensors(group.items[:, :, None], group.items[:, None, :])
            shrunk.index_put_((rows, columns), block, accumulate=True)
        traces = torch.stack([torch.dot(gram.reshape(-1), shrunk.reshape(-1)) for gram in self.grams])
        return torch.exp(-point.log_factors) * traces

    def carried(self, point: EvidencePoint, log_factors: Tensor, design: Tensor) -> Tensor:
        """The pseudo-inverse of the design times the rewards."""
        live = self._live()
        factor, change = design[live], point.change[live]
        if factor.shape[0] == factor.shape[1]:
            z: Tensor = torch.linalg.solve(factor, change)
            return z
        # Scaled eigenvectors: orthogonal columns.
        return (factor.T @ change) / factor.square().sum(0)

    def _live(self) -> Tensor:
        """Items whose reward is uncertain at all: a reference item's row of zeros would spoil Cholesky's factor."""
        return torch.stack([gram.diagonal() for gram in self.grams]).amax(0) > 0


def _named(names: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    return tuple(f"group {g}" for g in range(count)) if names is None else names


def curved(groups: Sequence[FeedbackGroup], c: Curvature, v_r: Tensor, v_u: Tensor) -> Tensor:
    """The rewards' rows of the curvature in (rewards, latents) times vectors `(items, m)` and `(Q, m)`."""
    result = torch.zeros_like(v_r)
    for group, block, cross in zip(groups, c.rewards, c.cross, strict=True):
        step = max(1, CHUNK // max(1, block.shape[1] * v_r.shape[1]))
        for start in range(0, len(block), step):
            part = slice(start, start + step)
            items = group.items[part]
            product = block[part] @ v_r[items] + cross[part] @ v_u
            result.index_add_(0, items.reshape(-1), product.reshape(-1, v_r.shape[1]))
    return result

"""Where the data inform adapter weights: coordinates of whitened derivatives, and what lies outside.

Weights are theta = center + scale * (directions' z + rest). Inside, z has a posterior; the rest keeps the prior (or,
for `Covariance`, has a posterior of its own form). Every space turns whitened derivatives W = J * scale, of shape
`(n, P)` into coordinates of shape `(n, R)`, and says what of W is left.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from .._typing import Tensor


@runtime_checkable
class Covariance(Protocol):
    """A posterior covariance of whitened weights that has no coordinates (Kronecker factors, a diagonal)."""

    def covariance(self, whitened: Tensor) -> Tensor:
        """Covariance of rewards with whitened derivatives `(K, P)`, shape `(K, K)`, float64."""
        ...

    def root(self, whitened: Tensor) -> Tensor:
        """Rows `(..., K, P)` whose inner products are that covariance: derivatives times its symmetric square root."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        ...


@runtime_checkable
class Subspace(Protocol):
    """Directions with orthonormal columns in the space of whitened weights."""

    @property
    def size(self) -> int:
        """Number of coordinates, R."""
        ...

    def coordinates(self, whitened: Tensor) -> Tensor:
        """Coordinates of whitened derivatives, shape `(n, R)`."""
        ...

    def outside(self, whitened: Tensor, coordinates: Tensor) -> Tensor | None:
        """What is left of whitened derivatives, shape `(n, P)`; `None` where nothing can be left."""
        ...

    def directions(self, coordinates: Tensor) -> Tensor:
        """Whitened weights at coordinates `(..., R)`, shape `(..., P)`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class WholeSpace:
    """All directions: the coordinates are the whitened weights themselves."""

    size: int

    def coordinates(self, whitened: Tensor) -> Tensor:
        """The whitened derivatives."""
        return whitened

    def outside(self, whitened: Tensor, coordinates: Tensor) -> Tensor | None:
        """Nothing."""
        return None

    def directions(self, coordinates: Tensor) -> Tensor:
        """The coordinates."""
        return coordinates

    def state(self) -> dict[str, Tensor]:
        """Nothing but the size."""
        return {"whole.size": torch.tensor(self.size)}


@dataclasses.dataclass(frozen=True, eq=False)
class RowSpace:
    """The span of the training comparisons' derivatives: exact, whatever their number.

    Attributes:
        basis: Orthonormal rows, shape `(R, P)`.
    """

    basis: Tensor

    @property
    def size(self) -> int:
        """Number of rows, R."""
        return len(self.basis)

    def coordinates(self, whitened: Tensor) -> Tensor:
        """Inner products with the rows."""
        return whitened @ self.basis.T

    def outside(self, whitened: Tensor, coordinates: Tensor) -> Tensor | None:
        """The part orthogonal to all rows."""
        return torch.addmm(whitened, coordinates.to(whitened.dtype), self.basis, alpha=-1.0)

    def directions(self, coordinates: Tensor) -> Tensor:
        """Sums of the rows."""
        return coordinates.to(self.basis.dtype) @ self.basis

    def state(self) -> dict[str, Tensor]:
        """The basis."""
        return {"row.basis": self.basis}


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """For every weight matrix the span of u_i v_j', leading directions of the comparisons' derivatives on either side.

    Attributes:
        left: For each matrix orthonormal columns, shape `(m, a)`.
        right: For each matrix orthonormal columns, shape `(n, b)`.
    """

    left: Sequence[Tensor]
    right: Sequence[Tensor]

    @property
    def counts(self) -> list[int]:
        """Number of coordinates of each matrix, a * b."""
        return [u.shape[1] * v.shape[1] for u, v in zip(self.left, self.right, strict=True)]

    @property
    def size(self) -> int:
        """Number of coordinates of all matrices."""
        return sum(self.counts)

    def coordinates(self, whitened: Tensor) -> Tensor:
        """u_i' W v_j of each matrix."""
        parts = [
            (u.T.to(block.dtype) @ block @ v.to(block.dtype)).reshape(len(whitened), -1)
            for block, u, v in zip(self._blocks(whitened), self.left, self.right, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def outside(self, whitened: Tensor, coordinates: Tensor) -> Tensor | None:
        """The part of each matrix outside its span."""
        return whitened - self.directions(coordinates.to(whitened.dtype))

    def directions(self, coordinates: Tensor) -> Tensor:
        """Sums of the u_i v_j'."""
        batch = coordinates.shape[:-1]
        parts = [
            (u.to(c.dtype) @ c.reshape(*batch, u.shape[1], v.shape[1]) @ v.T.to(c.dtype)).flatten(-2)
            for c, u, v in zip(coordinates.split(self.counts, dim=-1), self.left, self.right, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def state(self) -> dict[str, Tensor]:
        """The directions of every matrix, numbered."""
        pairs = zip(self.left, self.right, strict=True)
        return {f"sketch.{i:04d}.{side}": m for i, p in enumerate(pairs) for side, m in zip(("u", "v"), p, strict=True)}

    def _blocks(self, whitened: Tensor) -> list[Tensor]:
        shapes = [(u.shape[0], v.shape[0]) for u, v in zip(self.left, self.right, strict=True)]
        split = whitened.split([m * n for m, n in shapes], dim=1)
        return [b.reshape(len(whitened), *shape) for b, shape in zip(split, shapes, strict=True)]


def subspace_from(state: Mapping[str, Tensor]) -> Subspace | None:
    """The space whose `state` this is, `None` for an empty one."""
    if "whole.size" in state:
        return WholeSpace(int(state["whole.size"]))
    if "row.basis" in state:
        return RowSpace(state["row.basis"])
    names = sorted(name for name in state if name.startswith("sketch."))
    if not names:
        return None
    return Sketch([state[n] for n in names if n.endswith("u")], [state[n] for n in names if n.endswith("v")])

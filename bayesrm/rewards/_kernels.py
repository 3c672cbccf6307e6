"""Covariance functions over features, and a root of their matrices that copes with repeated items."""

import dataclasses
import enum
import math

import torch

from .._typing import Tensor

#: A root leaves out at most this share of the variance that reward differences have.
TOLERANCE = 1e-10
#: Distances are looked at between this many items at most.
_LOOKED_AT = 2000


class Kernel(enum.StrEnum):
    """Prior covariance of the rewards of two items, for unit amplitude; d is the distance of their features."""

    RBF = "rbf"
    """exp(-d^2 / (2 lengthscale^2)): infinitely smooth."""
    MATERN52 = "matern52"
    """(1 + s + s^2 / 3) exp(-s) with s = sqrt(5) d / lengthscale: twice differentiable."""
    LINEAR = "linear"
    """The inner product of the features: the same model as `Linear`."""


def covariance(kernel: Kernel, lengthscale: float, x: Tensor, y: Tensor) -> Tensor:
    """Covariances of the items with features `(n, D)` and those with features `(m, D)`, shape `(n, m)`."""
    if kernel is Kernel.LINEAR:
        return x @ y.T
    squares = (_squares(x, y) / lengthscale**2).clamp_min(0.0)
    if kernel is Kernel.RBF:
        return torch.exp(-0.5 * squares)
    s = (5.0 * squares).sqrt()
    return (1.0 + s + s.square() / 3.0) * torch.exp(-s)


def variances(kernel: Kernel, x: Tensor) -> Tensor:
    """The diagonal of `covariance(kernel, ..., x, x)`, shape `(n,)`."""
    return x.square().sum(1) if kernel is Kernel.LINEAR else torch.ones_like(x[:, 0])


def median_distance(x: Tensor) -> float:
    """Median distance between different items with features `(n, D)`; 1 where all features are the same.

    Above 2,000 items it looks at 2,000, evenly spaced.
    """
    if len(x) > _LOOKED_AT:
        x = x[torch.linspace(0, len(x) - 1, _LOOKED_AT, dtype=torch.float64).round().long()]
    squares = _squares(x, x)[torch.ones(len(x), len(x), dtype=torch.bool).triu(1)]
    apart = squares[squares > 1e-12 * squares.amax()] if len(squares) else squares
    return math.sqrt(float(apart.median())) if len(apart) else 1.0


def _squares(x: Tensor, y: Tensor) -> Tensor:
    # Features are centred, so that the product loses no more than rounding of the kernel itself.
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2.0 * (x @ y.T)


@dataclasses.dataclass(frozen=True)
class Root:
    """A factor of the covariance of a few items that determine all.

    Attributes:
        pivots: Positions of these items, shape `(R,)`.
        factor: Lower Cholesky factor of their covariance, shape `(R, R)`.
        tolerance: No item has more variance than this once the pivots are known.
    """

    pivots: Tensor
    factor: Tensor
    tolerance: float


def pivoted_root(matrix: Tensor) -> Root:
    """Pivoted Cholesky decomposition of a covariance matrix, shape `(n, n)`.

    It stops when the variance of no item given the pivots is above `TOLERANCE` times that of reward differences (or
    rounding, if that is more), so that repeated items take one pivot, and a large variance that all items share costs
    no accuracy of differences. Harbrecht, Peters and Schneider, "On the low-rank approximation by the pivoted Cholesky
    decomposition", Applied Numerical Mathematics 2012.
    """
    from scipy.linalg.lapack import dpstrf

    diagonal = matrix.diagonal()
    first = int(diagonal.argmax())
    largest = float(diagonal[first])
    if not largest > 0.0:
        return Root(torch.zeros(0, dtype=torch.int64), matrix.new_zeros(0, 0), 0.0)
    rounding = len(matrix) * torch.finfo(torch.float64).eps * largest
    # Once one item is known, what varies is its differences from the others.
    apart = float((diagonal - matrix[first].square() / largest).amax())
    tolerance = max(TOLERANCE * apart, rounding)
    found, pivots, rank, _ = dpstrf(matrix.numpy(), tol=tolerance, lower=1)
    factor = torch.as_tensor(found[:rank, :rank].copy()).tril()
    return Root(torch.as_tensor(pivots[:rank].copy()).long() - 1, factor, tolerance)

"""Families of normal distributions over x = (z, unconstrained latents), with reparametrised draws."""

import abc
import dataclasses
import math
from collections.abc import Sequence

import torch

from .._typing import Tensor
from ._problem import Problem

#: Standard deviation at which dimensions start that Laplace's approximation says nothing about.
_START_STD = 0.1


class Guide(abc.ABC):
    """A normal distribution with parameters to optimise, and the step size of each in units of the common one."""

    parameters: Sequence[Tensor]
    step_sizes: Sequence[float]

    @abc.abstractmethod
    def _moments(self, stopped: bool) -> tuple[Tensor, "_Spread"]:
        """Mean, shape `(D,)`, and spread, without gradients if `stopped`."""

    def draw(
        self, num_samples: int, generator: torch.Generator, *, stop_density: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Reparametrised draws, shape `(S, D)`, and their log densities `(S,)`.

        With `stop_density` the log density depends on the parameters through the draws alone.
        """
        mean, spread = self._moments(stopped=False)
        x = mean + spread.noise(num_samples, generator)
        if stop_density:
            mean, spread = self._moments(stopped=True)
        return x, spread.log_prob(x - mean)

    def precision_factor(self) -> tuple[Tensor, Tensor]:
        """Mean, and the lower Cholesky factor of the precision or, for a diagonal, its square root."""
        with torch.no_grad():
            mean, spread = self._moments(stopped=True)
            return mean.clone(), spread.precision_factor()


@dataclasses.dataclass(frozen=True)
class _Spread:
    """A centred normal distribution with covariance diag(scale)^2 + columns columns^T, or tril tril^T.

    Attributes:
        scale: Standard deviations, shape `(D,)`.
        columns: Shape `(D, rank)`, or `None`.
        tril: Lower triangular, shape `(D, D)`, or `None`; then it is all that counts.
    """

    scale: Tensor
    columns: Tensor | None = None
    tril: Tensor | None = None

    def noise(self, num_samples: int, generator: torch.Generator) -> Tensor:
        eps = torch.randn(num_samples, len(self.scale), generator=generator, dtype=torch.float64)
        if self.tril is not None:
            return eps @ self.tril.T
        if self.columns is None:
            return eps * self.scale
        more = torch.randn(num_samples, self.columns.shape[1], generator=generator, dtype=torch.float64)
        return eps * self.scale + more @ self.columns.T

    def log_prob(self, x: Tensor) -> Tensor:
        if self.tril is not None:
            white = torch.linalg.solve_triangular(self.tril, x.T, upper=False).T
            log_det = self.tril.diagonal().log().sum()
            return _log_normal(white) - log_det
        if self.columns is None:
            return _log_normal(x / self.scale) - self.scale.log().sum()
        normal = torch.distributions.LowRankMultivariateNormal(
            torch.zeros_like(self.scale), self.columns, self.scale.square(), validate_args=False
        )
        result: Tensor = normal.log_prob(x)
        return result

    def precision_factor(self) -> Tensor:
        if self.tril is None and self.columns is None:
            return 1.0 / self.scale
        tril = self.tril
        if tril is None:
            assert self.columns is not None
            tril = torch.linalg.cholesky(torch.diag(self.scale.square()) + self.columns @ self.columns.T)
        # Of the triangular inverse itself: its square would lose half of the digits.
        inverse = torch.linalg.solve_triangular(tril, torch.eye(len(tril), dtype=tril.dtype), upper=False)
        upper = torch.linalg.qr(inverse, mode="r").R
        factor: Tensor = (upper * upper.diagonal().sign()[:, None]).T
        return factor


def _log_normal(x: Tensor) -> Tensor:
    """Log density of the standard normal distribution, shape `(S,)`, of x of shape `(S, D)`."""
    result: Tensor = -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
    return result


class _FullRank(Guide):
    """x = center + root (shift + T eps): preconditioned, so that one step size suits every direction.

    Adam moves all entries by about the same amount, and up to D of them make one coordinate: those below the diagonal
    take steps of 1 / sqrt(D), or their noise would drown the rest where D is large.
    """

    def __init__(self, center: Tensor, root: Tensor) -> None:
        size = len(center)
        self._center, self._root = center, root
        self._shift = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        self._log_diagonal = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        self._lower = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
        self.parameters = [self._shift, self._log_diagonal, self._lower]
        self.step_sizes = [1.0, 1.0, size**-0.5]

    def _moments(self, stopped: bool) -> tuple[Tensor, _Spread]:
        shift, log_diagonal, lower = (p.detach() if stopped else p for p in self.parameters)
        inner = torch.diag(log_diagonal.exp()) + torch.tril(lower, -1)
        tril = self._root @ inner
        return self._center + self._root @ shift, _Spread(log_diagonal, tril=tril)


class _Diagonal(Guide):
    """Mean field, with columns added for low rank."""

    def __init__(self, center: Tensor, scale: Tensor, columns: Tensor | None) -> None:
        self._mean = center.clone().requires_grad_(True)
        self._log_scale = scale.log().requires_grad_(True)
        self._columns = None if columns is None else columns.requires_grad_(True)
        self.parameters = [self._mean, self._log_scale, *([] if self._columns is None else [self._columns])]
        self.step_sizes = [1.0] * len(self.parameters)

    def _moments(self, stopped: bool) -> tuple[Tensor, _Spread]:
        found = [p.detach() if stopped else p for p in self.parameters]
        return found[0], _Spread(found[1].exp(), found[2] if len(found) > 2 else None)


def make_guide(family: str, problem: Problem, rank: int, generator: torch.Generator) -> Guide:
    """A guide of the family, started at the mode, with the spread of Laplace's approximation where there is one."""
    assert problem.mode is not None
    precision = problem.precision()
    size = problem.dimension
    if family == "full_rank":
        root = _START_STD * torch.eye(size, dtype=torch.float64)
        if precision is not None:
            root = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
        return _FullRank(problem.mode, root)
    scale = torch.full((size,), _START_STD, dtype=torch.float64)
    if precision is not None:
        # The best diagonal for a normal posterior: the precision's.
        scale = precision.diagonal().rsqrt()
    columns = None
    if family == "low_rank":
        columns = 0.01 * torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64) * scale[:, None]
    return _Diagonal(problem.mode, scale, columns)

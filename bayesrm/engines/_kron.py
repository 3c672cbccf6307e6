"""Kronecker-factored and diagonal posteriors of reward parameters, from the gradients of whole comparisons.

A row of feedback with curvature block H in its K rewards adds G' H G to the precision of the parameters, G being the
candidates' derivatives. With H = sum_r v_r v_r' it is a sum over pseudo-gradients D_r = sum_j v_rj G_j; a Bradley-Terry
pair has one, sqrt(w p (1 - p)) (G_1 - G_0). The factors of a weight matrix are taken from these D, as matrices:
curvature ~ (sum D D') (x) (sum D' D) / sum |D|^2 (Martens and Grosse, "Optimizing neural networks with
Kronecker-factored approximate curvature", 1503.05671, with one matrix a comparison in place of one a token). Factors
from single responses or tokens would lose the cancellation inside a pair. Latents are conditioned on, not integrated.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..errors import EngineError, PersistenceError
from ._pseudo_gradients import Shapes, num_parameters, streamed_pseudo_gradients


@dataclasses.dataclass(frozen=True)
class KronFactors:
    """Sums over pseudo-gradients, one or two matrices a site; they add up over data, batches and processes.

    Attributes:
        shapes: The sites in order.
        factors: For a site of shape `(a, b)`, sum D D' `(a, a)` and sum D' D `(b, b)`, their scale not yet divided out
            (trailing dimensions of a tensor count as one); for a vector of length n, sum D D' `(n, n)`. Float64.
    """

    shapes: Shapes
    factors: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def zeros(cls, shapes: Shapes, device: torch.device | str = "cpu") -> "KronFactors":
        """The factors of no data."""
        factors = {
            site: tuple(torch.zeros(n, n, dtype=torch.float64, device=device) for n in factor_sizes(shape))
            for site, shape in shapes.items()
        }
        return cls(dict(shapes), factors)

    def add_(self, gradients: Tensor) -> None:
        """Adds pseudo-gradients, shape `(n, P)`, in place."""
        n = len(gradients)
        parts = gradients.split([prod(shape) for shape in self.shapes.values()], dim=1)
        for factors, part in zip(self.factors.values(), parts, strict=True):
            if len(factors) == 1:
                factors[0].addmm_(part.T, part)
                continue
            left, right = factors
            a, b = len(left), len(right)
            rows = part.reshape(n * a, b)
            columns = part.reshape(n, a, b).transpose(0, 1).reshape(a, n * b)
            left.addmm_(columns, columns.T)
            right.addmm_(rows.T, rows)

    def normalised(self) -> list[list[Tensor]]:
        """For each site what `laplace.utils.Kron` holds: `[left, right / trace]` or `[block]`.

        The Kronecker product of a pair belongs to the site's tensor flattened row by row.
        """
        return [list(factors[:1]) + [unit_trace(f) for f in factors[1:]] for factors in self.factors.values()]

    def posterior(self, precision: Mapping[str, float]) -> "KronCovariance":
        """The posterior under independent normal priors with the given precision for each site.

        Raises:
            EngineError: A factor is not finite.
        """
        from laplace.utils.matrix import Kron

        for site, factors in self.factors.items():
            # laplace-torch would put zeros where numbers are not finite.
            if not all(bool(torch.isfinite(f).all()) for f in factors):
                raise EngineError(f"the curvature of parameter site '{site}' is not finite; look for infinite rewards")
        decomposed = Kron(self.normalised()).decompose()
        return KronCovariance(
            tuple(self.shapes),
            # As they will come back from a file: products in another memory layout differ in the last digit.
            tuple(tuple(v.contiguous() for v in vectors) for vectors in decomposed.eigenvectors),
            tuple(map(tuple, decomposed.eigenvalues)),
            torch.tensor([precision[site] for site in self.shapes], dtype=torch.float64),
        )


@dataclasses.dataclass(frozen=True)
class KronCovariance:
    """Posterior covariance of the parameters, the inverse of left (x) right + prior precision for each site.

    Attributes:
        sites: Parameter sites, in the order of the flat vector of parameters.
        eigenvectors: Of each site's one or two factors, in columns, float64.
        eigenvalues: Likewise, none negative.
        prior_precision: For each site, shape `(sites,)`.
    """

    sites: tuple[str, ...]
    eigenvectors: tuple[tuple[Tensor, ...], ...]
    eigenvalues: tuple[tuple[Tensor, ...], ...]
    prior_precision: Tensor

    @cached_property
    def precision(self) -> Any:
        """The posterior precision as a `laplace.utils.matrix.KronDecomposed`."""
        from laplace.utils.matrix import KronDecomposed

        vectors, values = ([list(site) for site in part] for part in (self.eigenvectors, self.eigenvalues))
        return KronDecomposed(vectors, values, self.prior_precision.to(vectors[0][0].device))

    def root(self, jacobian: Tensor) -> Tensor:
        """Rows whose inner products are the covariances of rewards, shape `(..., K, P)`, as that of `jacobian`."""
        rows = jacobian.double().reshape(-1, *jacobian.shape[-2:])
        result: Tensor = self.precision.bmm(rows, exponent=-0.5)
        return result.reshape(jacobian.shape)

    def covariance(self, jacobian: Tensor) -> Tensor:
        """Covariance of rewards with the given derivatives: `(..., K, P)` to `(..., K, K)`, float64."""
        root = self.root(jacobian)
        return root @ root.transpose(-1, -2)

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the posterior precision, prior included."""
        result: Tensor = self.precision.logdet()
        return result

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, from which `from_state` restores it."""
        tensors = {"prior_precision": self.prior_precision}
        for site, vectors, values in zip(self.sites, self.eigenvectors, self.eigenvalues, strict=True):
            tensors |= {f"{site}/vectors/{i}": v for i, v in enumerate(vectors)}
            tensors |= {f"{site}/values/{i}": v for i, v in enumerate(values)}
        return tensors

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], shapes: Shapes) -> "KronCovariance":
        """Restores what `state` returned, for the given sites.

        Raises:
            PersistenceError: A tensor is missing.
        """
        try:
            vectors, values = (
                tuple(
                    tuple(tensors[f"{site}/{kind}/{i}"] for i in range(len(factor_sizes(shape))))
                    for site, shape in shapes.items()
                )
                for kind in ("vectors", "values")
            )
            return cls(tuple(shapes), vectors, values, tensors["prior_precision"])
        except KeyError as error:
            raise PersistenceError(f"the Kronecker factors are incomplete: {error} is missing") from error


@dataclasses.dataclass(frozen=True)
class DiagCovariance:
    """Posterior covariance of independent parameters.

    Attributes:
        precision: Posterior precision of every parameter, prior included, shape `(P,)`, float64.
    """

    precision: Tensor

    @classmethod
    def of(cls, curvature: Tensor, shapes: Shapes, precision: Mapping[str, float]) -> "DiagCovariance":
        """The posterior for the curvature's diagonal `(P,)` under a prior precision for each site."""
        prior = [
            torch.full((prod(shape),), float(precision[site]), dtype=torch.float64) for site, shape in shapes.items()
        ]
        if not bool(torch.isfinite(curvature).all()):
            raise EngineError("the curvature of the parameters is not finite; look for infinite rewards")
        return cls(curvature.double() + torch.cat(prior).to(curvature.device))

    def root(self, jacobian: Tensor) -> Tensor:
        """Rows whose inner products are the covariances of rewards, shape `(..., K, P)`, as that of `jacobian`."""
        return jacobian.double() * self.precision.rsqrt()

    def covariance(self, jacobian: Tensor) -> Tensor:
        """Covariance of rewards with the given derivatives: `(..., K, P)` to `(..., K, K)`, float64."""
        root = self.root(jacobian)
        return root @ root.transpose(-1, -2)

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the posterior precision, prior included."""
        return self.precision.log().sum()

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, from which `from_state` restores it."""
        return {"precision": self.precision}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], shapes: Shapes) -> "DiagCovariance":
        """Restores what `state` returned, for the given sites; errors as for `KronCovariance`."""
        if "precision" not in tensors or tensors["precision"].shape != (num_parameters(shapes),):
            raise PersistenceError(
                f"the diagonal posterior is incomplete: 'precision' {(num_parameters(shapes),)} is missing"
            )
        return cls(tensors["precision"])


def factor_sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the square factors of a site: one for a vector or a number, two for matrices and beyond.

    Example:
        >>> factor_sizes((8, 384)), factor_sizes((2,))
        ((8, 384), (2,))
    """
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape),)


def kron_bytes(shapes: Shapes) -> int:
    """Memory of the factors and of their eigenvectors."""
    return 2 * 8 * sum(n * n for shape in shapes.values() for n in factor_sizes(shape))


def unit_trace(factor: Tensor) -> Tensor:
    """A positive semi-definite matrix over its trace; zero stays zero."""
    trace = factor.trace()
    return factor / torch.where(trace > 0, trace, torch.ones_like(trace))


def kron_factors(
    jacobian: Tensor | Iterable[tuple[Tensor, Tensor]],
    shapes: Shapes,
    groups: Sequence[FeedbackGroup],
    blocks: Sequence[Tensor],
) -> KronFactors:
    """Kronecker factors of the curvature of all rows.

    Args:
        jacobian: Derivatives of the items' rewards, shape `(items, P)`, or an iterable of (item indices `(n,)`,
            derivatives `(n, P)`) that gives every item once. An item is held until the last row that compares it is
            complete, so that chunks which follow the rows need little memory.
        shapes: The sites, in the order of the P columns.
        groups: The rows.
        blocks: For each group, the curvature in its rewards, weights included, shape `(rows, K, K)`.

    Raises:
        ArgumentError: An item is missing from `jacobian`, or the sites do not add up to its columns.
        EngineError: A block is not positive semi-definite.
    """
    factors = None
    for gradients in streamed_pseudo_gradients(jacobian, shapes, groups, blocks):
        factors = KronFactors.zeros(shapes, gradients.device) if factors is None else factors
        factors.add_(gradients)
    return KronFactors.zeros(shapes) if factors is None else factors


def diag_curvature(
    jacobian: Tensor | Iterable[tuple[Tensor, Tensor]],
    shapes: Shapes,
    groups: Sequence[FeedbackGroup],
    blocks: Sequence[Tensor],
) -> Tensor:
    """Diagonal of the curvature of all rows, shape `(P,)`, float64; arguments and errors as for `kron_factors`."""
    total = torch.zeros(num_parameters(shapes), dtype=torch.float64)
    for gradients in streamed_pseudo_gradients(jacobian, shapes, groups, blocks):
        total = total.to(gradients.device) + gradients.square().sum(0)
    return total

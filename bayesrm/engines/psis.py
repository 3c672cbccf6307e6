"""Pareto-smoothed importance sampling: can these importance weights be trusted?"""

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .._arviz import pareto_smoothed
from ..errors import ArgumentError

#: A fifth of the draws forms the tail, and a tail of fewer than 5 draws cannot be fitted.
MIN_DRAWS = 25
# Log weights that differ by less are equal up to rounding: their tail is noise of the arithmetic.
_EQUAL = 1e-9


def k_hat_threshold(num_draws: int) -> float:
    """The largest k-hat at which averages of `num_draws` weighted draws are reliable: min(1 - 1 / log10(S), 0.7).

    Vehtari, Simpson, Gelman, Yao & Gabry (2024, arXiv 1507.02646).

    Example:
        >>> k_hat_threshold(100), k_hat_threshold(4000)
        (0.5, 0.7)
    """
    if num_draws < MIN_DRAWS:
        raise ArgumentError(f"`num_draws` is {num_draws}; importance weights are judged from {MIN_DRAWS} draws on")
    return min(1.0 - 1.0 / math.log10(num_draws), 0.7)


@dataclasses.dataclass(frozen=True)
class PSIS:
    """Importance weights with a smoothed tail.

    Attributes:
        log_weights: Logarithms of the smoothed weights, which sum to 1, shape `(S,)`.
        k_hat: Shape of the generalised Pareto distribution fitted to the largest weights. Below 1/2 the weights have a
            finite variance; below `threshold` averages are reliable; above, more draws will not help much. Weights that
            equal at the top have no tail: 0. Infinite where no tail could be fitted.
        ess: Effective sample size 1 / sum(w^2) of independent draws with these weights.
    """

    log_weights: Tensor
    k_hat: float
    ess: float

    @property
    def threshold(self) -> float:
        """The largest reliable k-hat for this number of draws."""
        return k_hat_threshold(len(self.log_weights))

    @property
    def reliable(self) -> bool:
        """Whether k-hat is at most `threshold`."""
        return self.k_hat <= self.threshold


def pareto_smooth(log_weights: Float[Tensor, "draws"], *, relative_efficiency: float = 1.0) -> PSIS:
    """Replaces the largest importance weights by quantiles of a generalised Pareto distribution fitted to them.

    Vehtari, Simpson, Gelman, Yao & Gabry (2024, arXiv 1507.02646), algorithm 1, as ArviZ implements it.

    Args:
        log_weights: log p - log q of each draw from q, up to a constant; minus infinity is a weight of zero.
        relative_efficiency: Effective sample size over number of draws, below 1 for autocorrelated draws.

    Raises:
        ArgumentError: There are fewer than 25 draws, a weight is infinite or not a number, or all are zero.
        EngineError: ArviZ is not installed.

    Example:
        >>> x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> pareto_smooth(0.1 * x).reliable, pareto_smooth(4.0 * x).reliable
        (True, False)
    """
    values = torch.as_tensor(log_weights).detach().cpu().double().numpy()
    if len(values) < MIN_DRAWS:
        raise ArgumentError(f"`log_weights` has {len(values)} entries; a tail can be fitted from {MIN_DRAWS} draws on")
    if np.isnan(values).any() or np.isposinf(values).any():
        bad = int(np.flatnonzero(np.isnan(values) | np.isposinf(values))[0])
        raise ArgumentError(
            f"`log_weights`[{bad}] is {values[bad]}; log weights are finite, or minus infinity for zero"
        )
    if np.isneginf(values).all():
        raise ArgumentError("`log_weights` are all minus infinity: no draw has a positive density under the target")
    if not 0.0 < relative_efficiency < math.inf:
        raise ArgumentError(f"`relative_efficiency` is {relative_efficiency}; it is a positive number")
    tail = math.ceil(min(len(values) / 5, 3 * math.sqrt(len(values) / relative_efficiency)))
    ordered = np.sort(values)
    if ordered[-1] - ordered[-tail - 1] < _EQUAL:
        smoothed, k_hat = values - np.logaddexp.reduce(values), 0.0
    else:
        smoothed, k_hat = pareto_smoothed(values, relative_efficiency)
    result = torch.from_numpy(smoothed)
    # A tail that cannot be fitted (nearly all weights are zero) is no reason for trust.
    return PSIS(result, math.inf if math.isnan(k_hat) else k_hat, float(1.0 / (2.0 * result).exp().sum()))

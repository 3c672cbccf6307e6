"""The score of a subset as a sum of ratios of sums over prompts, and how it varies as prompts are redrawn."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..bootstrap import Estimate, redrawn


@dataclasses.dataclass(frozen=True)
class Table:
    """Sums over prompts; the score is `sum_j coefficient_j * sum(numerator_j) / sum(denominator_j)`.

    Attributes:
        numerator: Shape `(prompts, parts)`.
        denominator: Shape `(prompts, parts)`.
        coefficient: Shape `(parts,)`.
    """

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]
    coefficient: NDArray[np.float64]

    @property
    def value(self) -> float:
        """The score."""
        return float(self._score(np.ones((1, len(self.numerator))), self.numerator, self.denominator)[0])

    @property
    def contributions(self) -> NDArray[np.float64]:
        """What each prompt adds to the score, shape `(prompts,)`."""
        share: NDArray[np.float64] = (self.numerator / self.denominator.sum(0)) @ self.coefficient
        return share

    def redrawn(self, num_resamples: int, seed: int) -> NDArray[np.float64]:
        """The score as prompts are redrawn, shape `(num_resamples,)`; tables of equal length get the same prompts."""
        return redrawn(self._score, (self.numerator, self.denominator), num_resamples, seed)[1]

    def _score(
        self, copies: NDArray[np.float64], numerator: NDArray[np.float64], denominator: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            ratios = (copies @ numerator) / (copies @ denominator)
        score: NDArray[np.float64] = ratios @ self.coefficient
        return score


def stratum_seed(seed: int, stratum: int) -> int:
    """A seed for each subset, so that their prompts are redrawn independently."""
    return int(np.random.SeedSequence((seed, stratum)).generate_state(1, np.uint64)[0])


def percentiles(value: float, draws: NDArray[np.float64], level: float) -> Estimate:
    """A percentile interval; none where no draw is known."""
    if np.isnan(draws).all():
        return Estimate(value, float("nan"), float("nan"), level)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), level)

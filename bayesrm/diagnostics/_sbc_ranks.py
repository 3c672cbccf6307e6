"""Are ranks uniform? A test that looks at the whole empirical distribution, and what a departure looks like."""

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray

#: The distribution function is compared at no more points than this.
_POINTS = 100
#: Simulations of the statistic under uniformity; the smallest p-value is one in as many.
_SIMULATIONS = 20_000


def uniformity_p_values(ranks: NDArray[np.int64], num_draws: int) -> NDArray[np.float64]:
    """Probability that uniform ranks stray as far from the uniform distribution, for each column.

    The statistic is gamma of Saeilynoja, Buerkner & Vehtari (2022, 2103.10522): twice the smallest binomial tail
    probability of the empirical distribution function over all points. Its distribution under uniformity is simulated.

    Args:
        ranks: Ranks from 0 to `num_draws`, shape `(replicates, quantities)`.
        num_draws: Number of draws that truths were ranked among.
    """
    count = len(ranks)
    points = np.unique(np.linspace(0, num_draws - 1, min(num_draws, _POINTS)).round().astype(np.int64))
    share = (points + 1) / (num_draws + 1)
    below = np.arange(count + 1)[:, None]
    tails = np.minimum(scipy.stats.binom.cdf(below, count, share), scipy.stats.binom.sf(below - 1, count, share))
    where = np.arange(len(points))

    def gamma(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        smallest: NDArray[np.float64] = 2 * tails[counts, where].min(-1)
        return smallest

    rng = np.random.default_rng(0)
    cells = np.diff(share, prepend=0.0, append=1.0)
    uniform = np.sort(gamma(rng.multinomial(count, cells, _SIMULATIONS).cumsum(1)[:, :-1]))
    found = gamma((ranks[:, :, None] <= points).sum(0))
    # Rounding must not tell apart a statistic that takes few values.
    as_small = np.searchsorted(uniform, found * (1 + 1e-9), side="right")
    result: NDArray[np.float64] = (1 + as_small) / (1 + _SIMULATIONS)
    return result


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """P-values adjusted for looking at all of them (Holm 1979), valid however they depend on each other."""
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def normal_scores(ranks: NDArray[np.int64], num_draws: int) -> NDArray[np.float64]:
    """Ranks as quantiles of the standard normal distribution."""
    scores: NDArray[np.float64] = scipy.special.ndtri((ranks + 0.5) / (num_draws + 1))
    return scores

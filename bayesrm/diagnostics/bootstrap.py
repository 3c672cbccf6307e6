"""Bootstrap intervals over clusters: rows of one prompt are not independent, so whole prompts are redrawn."""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.special
from numpy.typing import NDArray

from ..errors import ArgumentError

#: Resamples whose multiplicities are held at once.
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval.

    Attributes:
        value: The statistic on all the data.
        low: Lower end of the interval.
        high: Upper end.
        level: Its coverage.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    clusters: NDArray[np.int64],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap over clusters (Efron 1979; Cameron et al. 2008 for clusters).

    Args:
        statistic: The number as a function of row indices (with repetitions), shape `(rows,)`.
        clusters: Cluster of each row, usually its prompt, shape `(rows,)`.
        num_resamples: Number of resamples, at least 1.
        level: Coverage of the interval, between 0 and 1.
        seed: Seed.

    Raises:
        ArgumentError: There are fewer than two clusters, or a setting is out of range.

    Example:
        >>> x = np.arange(10.0)
        >>> bootstrap(lambda i: float(x[i].mean()), np.arange(10)).value
        4.5
    """
    check_resampling(num_resamples, level)
    if clusters.ndim != 1:
        raise ArgumentError(f"`clusters` has shape {clusters.shape}; give one cluster for each row, shape (rows,)")
    _, codes = np.unique(clusters, return_inverse=True)
    count = int(codes.max()) + 1 if len(codes) else 0
    if count < 2:
        raise ArgumentError(f"`clusters` names {count} cluster; a bootstrap needs at least 2")
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for b in range(num_resamples):
        chosen = rng.integers(count, size=count)
        draws[b] = statistic(np.concatenate([members[c] for c in chosen]))
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(np.arange(len(codes)))), float(low), float(high), level)


def wilson(mean: float, count: int, level: float) -> Estimate:
    """Score interval of a mean of `count` values in [0, 1] (Wilson, JASA 1927), of which 0/1 values vary the most.

    Unlike percentiles of a bootstrap it has a width where all values are equal.

    Example:
        >>> print(wilson(1.0, 28, 0.95))
        1.000 [0.879, 1.000]
    """
    z = float(scipy.special.ndtri((1 + level) / 2))
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (mean * (1 - mean) / count + z**2 / (4 * count**2)) ** 0.5
    # Where all values are equal, an end of the interval is the mean but for rounding.
    low, high = min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))
    return Estimate(mean, low, high, level)


def check_resampling(num_resamples: int, level: float) -> None:
    """Raises `ArgumentError` unless there are resamples, and a coverage between 0 and 1."""
    if num_resamples < 1:
        raise ArgumentError(f"`num_resamples` is {num_resamples}; at least 1 is needed")
    if not 0 < level < 1:
        raise ArgumentError(f"`level` is {level}; it lies between 0 and 1")


def redrawn(
    statistic: Callable[..., NDArray[np.float64]],
    sums: tuple[NDArray[np.float64], NDArray[np.float64]],
    num_resamples: int,
    seed: int,
) -> tuple[float, NDArray[np.float64]]:
    """A statistic of sums over prompts, and its values as the prompts are redrawn, shape `(num_resamples,)`.

    Args:
        statistic: A function of how often each prompt was drawn, shape `(resamples, prompts)`, and the sums; it returns
            shape `(resamples,)`. One product with such a matrix takes the place of gathering rows for each resample.
        sums: Two arrays with a row for each prompt.
        num_resamples: Number of resamples.
        seed: Seed.
    """
    count = len(sums[0])
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for start in range(0, num_resamples, _CHUNK):
        part = draws[start : start + _CHUNK]
        part[:] = statistic(rng.multinomial(count, np.full(count, 1 / count), len(part)).astype(np.float64), *sums)
    return float(statistic(np.ones((1, count)), *sums)[0]), draws

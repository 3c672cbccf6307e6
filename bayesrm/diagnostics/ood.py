"""Does uncertainty tell the unfamiliar from the familiar?"""

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .bootstrap import Estimate, bootstrap


def auroc(negative: NDArray[np.float64], positive: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann & Whitney 1947).

    Args:
        negative: Scores of one class, for instance uncertainties of familiar prompts, shape `(n,)`.
        positive: Scores of the other, shape `(m,)`.

    Raises:
        ArgumentError: A class is empty.

    Example:
        >>> auroc(np.array([0.1, 0.4]), np.array([0.3, 0.9]))
        0.75
    """
    if len(negative) == 0 or len(positive) == 0:
        raise ArgumentError("`negative` and `positive` must both hold scores")
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([negative, positive]))
    above = ranks[len(negative) :].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(negative) * len(positive)))


def ood_auroc(
    familiar: NDArray[np.float64], unfamiliar: NDArray[np.float64], *, num_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """`auroc` of an uncertainty, one number a prompt, with a bootstrap interval over prompts."""
    values = np.concatenate([familiar, unfamiliar])
    is_unfamiliar = np.arange(len(values)) >= len(familiar)

    def statistic(index: NDArray[np.int64]) -> float:
        chosen = is_unfamiliar[index]
        if chosen.all() or not chosen.any():
            return float("nan")
        return auroc(values[index][~chosen], values[index][chosen])

    return bootstrap(statistic, np.arange(len(values)), num_resamples=num_resamples, seed=seed)

"""Does uncertainty tell the unfamiliar from the familiar?"""

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .bootstrap import Estimate, bootstrap, wilson


def auroc(negative: NDArray[np.float64], positive: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann & Whitney 1947).

    Args:
        negative: Scores of one class, for instance uncertainties of familiar prompts, shape `(n,)`.
        positive: Scores of the other, shape `(m,)`.

    Raises:
        ArgumentError: A class is empty, or a score is not a number.

    Example:
        >>> auroc(np.array([0.1, 0.4]), np.array([0.3, 0.9]))
        0.75
    """
    _check_scores("negative", negative)
    _check_scores("positive", positive)
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([negative, positive]))
    above = ranks[len(negative) :].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / (len(negative) * len(positive)))


def ood_auroc(
    familiar: NDArray[np.float64], unfamiliar: NDArray[np.float64], *, num_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """`auroc` of an uncertainty, one number a prompt, with a bootstrap interval over prompts.

    Where redrawing does not change it, as between classes that are wholly apart, the interval is Wilson's, with as many
    trials as the smaller class has prompts.

    Args:
        familiar: Uncertainties of familiar prompts, shape `(n,)`.
        unfamiliar: Those of unfamiliar ones, shape `(m,)`.
        num_resamples: Bootstrap resamples, at least 1.
        seed: Seed of the bootstrap.

    Raises:
        ArgumentError: A class is empty, or an uncertainty is not a number.

    Example:
        >>> ood_auroc(np.array([0.1, 0.4]), np.array([0.3, 0.9])).value
        0.75
    """
    _check_scores("familiar", familiar)
    _check_scores("unfamiliar", unfamiliar)
    values = np.concatenate([familiar, unfamiliar])
    is_unfamiliar = np.arange(len(values)) >= len(familiar)

    def statistic(index: NDArray[np.int64]) -> float:
        chosen = is_unfamiliar[index]
        if chosen.all() or not chosen.any():
            return float("nan")
        return auroc(values[index][~chosen], values[index][chosen])

    found = bootstrap(statistic, np.arange(len(values)), num_resamples=num_resamples, seed=seed)
    # Classes that are wholly apart stay so when they are redrawn, which says nothing of prompts that were not seen.
    fewer = min(len(familiar), len(unfamiliar))
    return found if found.low < found.high else wilson(found.value, fewer, found.level)


def _check_scores(name: str, scores: NDArray[np.float64]) -> None:
    if np.ndim(scores) != 1 or len(scores) == 0:
        raise ArgumentError(f"`{name}` has shape {np.shape(scores)}; give at least one score, shape (n,)")
    if np.isnan(scores).any():
        raise ArgumentError(f"`{name}[{int(np.isnan(scores).argmax())}]` is NaN; scores must be numbers")

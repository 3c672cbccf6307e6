"""Reliability diagrams: how sure predictions were, and how often they were right."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError

#: Probabilities that differ by no more are equal but for rounding.
_EQUAL = 1e-9


@dataclasses.dataclass(frozen=True)
class Reliability:
    """A reliability diagram: in each bin, how sure the predictions were and how often they were right.

    Attributes:
        confidence: Mean predicted probability of the bin, shape `(bins,)`.
        frequency: Observed frequency, shape `(bins,)`.
        count: Rows in the bin, weighted, shape `(bins,)`.
    """

    confidence: NDArray[np.float64]
    frequency: NDArray[np.float64]
    count: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean absolute gap, bins weighted by their rows; positive even by chance alone."""
        return float(np.average(np.abs(self.confidence - self.frequency), weights=self.count))


def reliability(
    probability: NDArray[np.float64],
    occurred: NDArray[np.float64],
    *,
    weight: NDArray[np.float64] | None = None,
    num_bins: int = 10,
) -> Reliability:
    """Reliability diagram of predicted probabilities of an event, in bins of equal numbers of rows.

    Args:
        probability: Predicted probability of the event, shape `(rows,)`.
        occurred: Whether it occurred, 0 or 1, shape `(rows,)`.
        weight: Weight of each row, shape `(rows,)`; 1 by default.
        num_bins: Number of bins; fewer when there are fewer rows, or fewer probabilities: equal ones share a bin.

    Raises:
        ArgumentError: Shapes disagree, there are no rows, or a probability is not between 0 and 1.

    Example:
        >>> round(reliability(np.array([0.2, 0.2, 0.8, 0.8]), np.array([0.0, 1.0, 1.0, 1.0]), num_bins=2).ece, 2)
        0.25
    """
    probability, occurred = np.asarray(probability, dtype=np.float64), np.asarray(occurred, dtype=np.float64)
    if probability.shape != occurred.shape or len(probability) == 0:
        raise ArgumentError(
            f"`probability` has shape {probability.shape}, `occurred` {occurred.shape}; give equal, non-empty ones"
        )
    if not ((probability >= -_EQUAL) & (probability <= 1 + _EQUAL)).all():
        bad = int(np.flatnonzero(~((probability >= -_EQUAL) & (probability <= 1 + _EQUAL)))[0])
        raise ArgumentError(f"`probability[{bad}]` is {probability[bad]}; probabilities lie between 0 and 1")
    weight = np.ones(len(probability)) if weight is None else weight
    bins = _bins(probability, weight, num_bins)
    return Reliability(
        np.array([np.average(probability[b], weights=weight[b]) for b in bins]),
        np.array([np.average(occurred[b], weights=weight[b]) for b in bins]),
        np.array([weight[b].sum() for b in bins]),
    )


def _bins(probability: NDArray[np.float64], weight: NDArray[np.float64], num_bins: int) -> list[NDArray[np.int64]]:
    """Positions of the members of each bin: equal numbers of rows of positive weight, in order of probability.

    Rows of one probability stay together, wherever the middle of them falls: nothing but the order of rows would part
    them, and there are fewer bins then.
    """
    if not isinstance(num_bins, int | np.integer) or num_bins < 1:
        raise ArgumentError(f"`num_bins` is {num_bins}; a whole number, at least 1, is needed")
    order = np.argsort(probability, kind="stable")
    order = order[weight[order] > 0]
    count, bins = len(order), min(int(num_bins), len(order))
    nominal = np.repeat(np.arange(bins), [len(part) for part in np.array_split(order, bins)])
    starts = np.flatnonzero(np.diff(probability[order], prepend=-np.inf) > _EQUAL)
    lengths = np.diff(starts, append=count)
    label = np.repeat(nominal[starts + (lengths - 1) // 2], lengths)
    return [order[label == i] for i in np.unique(label)]

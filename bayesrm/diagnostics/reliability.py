"""Reliability diagrams: how sure predictions were, and how often they were right."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError


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
        num_bins: Number of bins; fewer when there are fewer rows.

    Raises:
        ArgumentError: Shapes disagree, or there are no rows.

    Example:
        >>> round(reliability(np.array([0.2, 0.2, 0.8, 0.8]), np.array([0.0, 1.0, 1.0, 1.0]), num_bins=2).ece, 2)
        0.25
    """
    if probability.shape != occurred.shape or len(probability) == 0:
        raise ArgumentError(
            f"`probability` has shape {probability.shape}, `occurred` {occurred.shape}; give equal, non-empty ones"
        )
    weight = np.ones(len(probability)) if weight is None else weight
    bins = _bins(probability, weight, num_bins)
    return Reliability(
        np.array([np.average(probability[b], weights=weight[b]) for b in bins]),
        np.array([np.average(occurred[b], weights=weight[b]) for b in bins]),
        np.array([weight[b].sum() for b in bins]),
    )


def _bins(probability: NDArray[np.float64], weight: NDArray[np.float64], num_bins: int) -> list[NDArray[np.int64]]:
    """Positions of the members of each bin: equal numbers of rows of positive weight, in order of probability."""
    if num_bins < 1:
        raise ArgumentError(f"`num_bins` is {num_bins}; at least 1 bin is needed")
    order = np.argsort(probability, kind="stable")
    order = order[weight[order] > 0]
    return [b for b in np.array_split(order, min(num_bins, len(order))) if len(b)]

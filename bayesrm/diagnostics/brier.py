"""The Brier score and its parts: reliability, resolution, uncertainty."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from .events import Events
from .reliability import _bins


def brier_score(probs: Float[Tensor, "rows outcomes"], observed: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Squared distance of the predicted probabilities from the observed outcome, in [0, 2] (Brier 1950).

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.5000])
    """
    target = torch.nn.functional.one_hot(observed, probs.shape[1]).to(probs.dtype)
    return (probs - target).square().sum(1)


@dataclasses.dataclass(frozen=True)
class BrierDecomposition:
    """The Brier score of events in parts: `score = reliability - resolution + uncertainty + within_bin`, exactly.

    Reliability is (weighted) the squared gap between stated and observed frequency, 0 is best; resolution how far the
    frequencies of the bins lie from the overall one, more is better; uncertainty belongs to the events alone (Murphy
    1973). `within_bin` is what binning leaves over, 0 when the members of a bin have one probability (Stephenson,
    Coelho & Jolliffe 2008).

    Finite bins make reliability and resolution too large by chance. `corrected_reliability`, `corrected_resolution` and
    `corrected_uncertainty` have that taken out (Ferro & Fricker, QJRMS 2012, eqs. 7-9; rows independent) and add up to
    the same score. The first may be negative, which says that no miscalibration shows.

    Attributes:
        score: Mean of `(probability - occurred)^2`, in [0, 1].
        reliability: Miscalibration.
        resolution: What the predictions tell apart.
        uncertainty: Variance of the events.
        within_bin: Variance of the probabilities inside bins less twice their covariance with the events.
        corrected_reliability: Reliability without bias.
        corrected_resolution: Resolution without bias.
        corrected_uncertainty: Uncertainty without bias.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float
    corrected_reliability: float
    corrected_resolution: float
    corrected_uncertainty: float


def brier_decomposition(events: Events, *, num_bins: int = 10) -> BrierDecomposition:
    """Splits the Brier score of events into reliability, resolution and uncertainty, see `BrierDecomposition`.

    Args:
        events: From `predicted_events(prediction)`.
        num_bins: Number of bins of equal numbers of events.

    Example:
        >>> one = Events(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0.0, 0.0, 0.0, 1.0]), np.arange(4), np.ones(4))
        >>> d = brier_decomposition(one, num_bins=2)
        >>> d.score, d.reliability - d.resolution + d.uncertainty + d.within_bin
        (0.1875, 0.1875)
    """
    events = events.counted()
    p, o, w = events.probability, events.occurred, events.weight
    base = float(np.average(o, weights=w))
    reliability = resolution = within = chance = 0.0
    for b in _bins(p, w, num_bins):
        share = w[b].sum() / w.sum()
        confidence, frequency = np.average(p[b], weights=w[b]), np.average(o[b], weights=w[b])
        inside = (p[b] - confidence) ** 2 - 2 * (p[b] - confidence) * (o[b] - frequency)
        reliability += share * (confidence - frequency) ** 2
        resolution += share * (frequency - base) ** 2
        within += share * np.average(inside, weights=w[b])
        chance += share * _variance_of_mean(frequency, w[b])
    overall = _variance_of_mean(base, w)
    return BrierDecomposition(
        score=float(np.average((p - o) ** 2, weights=w)),
        reliability=float(reliability),
        resolution=float(resolution),
        uncertainty=base * (1 - base),
        within_bin=float(within),
        corrected_reliability=float(reliability - chance),
        corrected_resolution=float(resolution - chance + overall),
        corrected_uncertainty=base * (1 - base) + overall,
    )


def _variance_of_mean(frequency: float, weight: NDArray[np.float64]) -> float:
    # Weights count as Kish's effective number of rows; one row has frequency 0 or 1, and no variance to show.
    effective = weight.sum() ** 2 / (weight**2).sum()
    return float(frequency * (1 - frequency) / (effective - 1)) if effective > 1 + 1e-9 else 0.0

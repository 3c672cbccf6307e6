"""Calibration of predicted feedback: accuracy, negative log likelihood, Brier score, expected calibration error."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ..engines.prediction import FeedbackPrediction
from ..errors import ArgumentError
from .bootstrap import Estimate, bootstrap


def brier_score(probs: Float[Tensor, "rows outcomes"], observed: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Squared distance of the predicted probabilities from the observed outcome, in [0, 2] (Brier 1950).

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.5000])
    """
    target = torch.nn.functional.one_hot(observed, probs.shape[1]).to(probs.dtype)
    return (probs - target).square().sum(1)


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
        """Expected calibration error: mean absolute gap, bins weighted by their rows."""
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
    order = np.argsort(probability, kind="stable")
    order = order[weight[order] > 0]
    bins = [b for b in np.array_split(order, min(num_bins, len(order))) if len(b)]
    return Reliability(
        np.array([np.average(probability[b], weights=weight[b]) for b in bins]),
        np.array([np.average(occurred[b], weights=weight[b]) for b in bins]),
        np.array([weight[b].sum() for b in bins]),
    )


def top_label(prediction: FeedbackPrediction) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Probability of the likeliest outcome, whether it occurred, and the row, where outcomes are enumerated."""
    confidence, occurred, rows = [], [], []
    for group in prediction.groups:
        if group.probs is None or group.observed is None:
            continue
        top, label = group.probs.max(1)
        confidence.append(top.numpy())
        occurred.append((label == group.observed).numpy().astype(np.float64))
        rows.append(group.rows.numpy())
    if not rows:
        raise ArgumentError(
            "no row has outcomes that can be enumerated; calibration of the likeliest outcome is undefined"
        )
    return np.concatenate(confidence), np.concatenate(occurred), np.concatenate(rows)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well feedback was predicted, each number with a bootstrap interval over prompts.

    Attributes:
        accuracy: Share of rows whose likeliest outcome occurred.
        nll: Mean negative log predictive probability, nats a row.
        brier: Mean Brier score.
        ece: Expected calibration error of the likeliest outcome, 10 bins of equal size. It is positive even for perfect
            predictions; compare it between models on the same rows.
    """

    accuracy: Estimate
    nll: Estimate
    brier: Estimate
    ece: Estimate


def score(
    prediction: FeedbackPrediction,
    prompts: NDArray[np.int64],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Scores:
    """Accuracy, NLL, Brier score and ECE of predicted feedback, rows weighted, with intervals over prompts.

    Args:
        prediction: From `posterior.predict_feedback(data)`.
        prompts: Prompt of each row, `data.prompt_of_row`, shape `(rows,)`.
        num_resamples: Bootstrap resamples.
        level: Coverage of the intervals.
        seed: Seed of the bootstrap.
    """
    weight = prediction.weight.numpy()
    nll = -prediction.log_prob.numpy()
    correct = prediction.correct.numpy()
    brier = np.full(len(nll), np.nan)
    for group in prediction.groups:
        if group.probs is not None and group.observed is not None:
            brier[group.rows.numpy()] = brier_score(group.probs, group.observed).numpy()
    confidence, occurred = np.full(len(nll), np.nan), np.full(len(nll), np.nan)
    top, hit, rows = top_label(prediction)
    confidence[rows], occurred[rows] = top, hit

    def ece(index: NDArray[np.int64]) -> float:
        known = index[~np.isnan(confidence[index]) & (weight[index] > 0)]
        if not len(known):
            return float("nan")
        return reliability(confidence[known], occurred[known], weight=weight[known]).ece

    def interval(values: NDArray[np.float64]) -> Estimate:
        def mean(index: NDArray[np.int64]) -> float:
            known = index[~np.isnan(values[index]) & (weight[index] > 0)]
            if not len(known):
                return float("nan")
            return float(np.average(values[known], weights=weight[known]))

        return bootstrap(mean, prompts, num_resamples=num_resamples, level=level, seed=seed)

    return Scores(
        accuracy=interval(correct),
        nll=interval(nll),
        brier=interval(brier),
        ece=bootstrap(ece, prompts, num_resamples=num_resamples, level=level, seed=seed),
    )

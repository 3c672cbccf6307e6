"""How well feedback was predicted: accuracy, negative log likelihood, Brier score, calibration errors."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.prediction import FeedbackPrediction
from ..errors import ArgumentError
from .bootstrap import Estimate, bootstrap, check_resampling
from .brier import brier_score
from .calibration import (
    _absolute_interval,
    _bin_of,
    _cluster_sums,
    _fewer_bins,
    _root,
    _simulate,
    _squared_interval,
    _unseen,
    _widened,
)
from .events import Events, top_label


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well feedback was predicted, each number with a bootstrap interval over prompts.

    Accuracy, Brier score, ECE and calibration error are about the rows whose outcomes can be enumerated, and NaN where
    there are none.

    Attributes:
        accuracy: Share of rows whose likeliest outcome occurred.
        nll: Mean negative log predictive probability, nats a row.
        brier: Mean Brier score.
        ece: Expected calibration error of the likeliest outcome, 10 bins of equal size (fewer where prompts or
            probabilities are few, see `check_calibration`). It is positive even for perfect
            predictions; compare it between models on the same rows. Its interval says how much it would vary, with the
            upward bias that redrawing adds taken out; whether predictions are calibrated is for `calibration_error`.
        calibration_error: Debiased root mean squared calibration error of the likeliest outcome, see
            `CalibrationCheck`; its interval begins at 0 where no miscalibration shows, by the test described there.
    """

    accuracy: Estimate
    nll: Estimate
    brier: Estimate
    ece: Estimate
    calibration_error: Estimate


def score(
    prediction: FeedbackPrediction,
    prompts: NDArray[np.int64] | Sequence[int],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Scores:
    """Accuracy, NLL, Brier score and calibration of predicted feedback, rows weighted, with intervals over prompts.

    Args:
        prediction: From `posterior.predict_feedback(data)`.
        prompts: Prompt of each row, `data.prompt_of_row`, shape `(rows,)`.
        num_resamples: Bootstrap resamples, at least 1.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the bootstrap.

    Raises:
        ArgumentError: `prompts` has not one prompt for each row, names fewer than two, or a setting is out of range.
    """
    check_resampling(num_resamples, level)
    prompts = _checked(prompts, prediction)
    weight = prediction.weight.numpy()
    nll = -prediction.log_prob.numpy()
    brier = np.full(len(nll), np.nan)
    for group in prediction.groups:
        if group.probs is not None and group.observed is not None:
            brier[group.rows.numpy()] = brier_score(group.probs, group.observed).numpy()

    def interval(values: NDArray[np.float64]) -> Estimate:
        known = np.flatnonzero(~np.isnan(values) & (weight > 0))
        if not len(known):
            return Estimate(np.nan, np.nan, np.nan, level)

        def mean(index: NDArray[np.int64]) -> float:
            return float(np.average(values[known][index], weights=weight[known][index]))

        return bootstrap(mean, prompts[known], num_resamples=num_resamples, level=level, seed=seed)

    absolute = root = Estimate(np.nan, np.nan, np.nan, level)
    if (~np.isnan(brier) & (weight > 0)).any():
        confidence, occurred, rows = top_label(prediction)
        likeliest = Events(confidence, occurred, rows, weight[rows]).counted()
        bin_of = _bin_of(likeliest, _fewer_bins(likeliest, prompts, 10))
        sums = _cluster_sums(likeliest, prompts, bin_of)
        null = _simulate(likeliest, prompts, bin_of, num_resamples, seed)
        unseen = _unseen(likeliest, prompts, level)
        absolute = _widened(_absolute_interval(sums, num_resamples, level, seed), unseen, least=0.0)
        root = _root(_squared_interval(sums, num_resamples, level, seed, null.p_value))
        root = _widened(root, unseen, least=0.0)
    return Scores(interval(prediction.correct.numpy()), interval(nll), interval(brier), absolute, root)


def score_by_kind(
    prediction: FeedbackPrediction,
    prompts: NDArray[np.int64] | Sequence[int],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Scores]:
    """`score` of each kind of feedback by itself: choices, rankings, ratings, approvals."""
    prompts = _checked(prompts, prediction)
    kinds = dict.fromkeys(group.label.split(".")[0] for group in prediction.groups)
    result = {}
    for kind in kinds:
        groups = [group for group in prediction.groups if group.label.split(".")[0] == kind]
        rows = torch.cat([group.rows for group in groups]).sort().values
        groups = [dataclasses.replace(group, rows=torch.searchsorted(rows, group.rows)) for group in groups]
        part = FeedbackPrediction(prediction.log_prob[rows], tuple(groups), prediction.weight[rows])
        chosen = prompts[rows.numpy()]
        result[kind] = score(part, chosen, num_resamples=num_resamples, level=level, seed=seed)
    return result


def _checked(prompts: NDArray[np.int64] | Sequence[int], prediction: FeedbackPrediction) -> NDArray[np.int64]:
    prompts = np.asarray(prompts)
    if prompts.shape != (len(prediction.log_prob),):
        raise ArgumentError(
            f"`prompts` has shape {prompts.shape}, the prediction {len(prediction.log_prob)} rows; give the prompt of "
            "each row, `data.prompt_of_row`"
        )
    return prompts

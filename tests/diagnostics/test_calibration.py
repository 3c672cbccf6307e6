"""Scores of predicted feedback against hand-computed numbers, with predictions that must look wrong."""

import numpy as np
import pytest
import scipy.stats
import torch

from bayesrm import diagnostics
from bayesrm.engines import FeedbackPrediction, GroupPrediction
from bayesrm.errors import ArgumentError


def prediction(probs, observed, weight=None):
    probs = torch.as_tensor(probs, dtype=torch.float64)
    observed = torch.as_tensor(observed)
    rows = torch.arange(len(probs))
    group = GroupPrediction("choice.2", rows, torch.arange(probs.shape[1]), probs, observed)
    weight = (
        torch.ones(len(probs), dtype=torch.float64) if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    )
    return FeedbackPrediction(probs.gather(1, observed[:, None])[:, 0].log(), (group,), weight)


def test_scores_by_hand():
    p = prediction([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [0, 1, 1])
    scores = diagnostics.score(p, np.arange(3), num_resamples=50)
    assert scores.accuracy.value == pytest.approx(2 / 3)
    assert scores.nll.value == pytest.approx(-np.log([0.8, 0.4, 0.7]).mean())
    assert scores.brier.value == pytest.approx(np.mean([0.08, 0.72, 0.18]))
    # Three bins of one row each: |0.8 - 1|, |0.6 - 0|, |0.7 - 1|.
    assert scores.ece.value == pytest.approx(np.mean([0.2, 0.6, 0.3]))


def test_a_row_of_weight_zero_does_not_count():
    with_row = prediction([[0.8, 0.2], [0.6, 0.4], [0.01, 0.99]], [0, 1, 0], weight=[1.0, 1.0, 0.0])
    without = prediction([[0.8, 0.2], [0.6, 0.4]], [0, 1])
    a = diagnostics.score(with_row, np.arange(3), num_resamples=2)
    b = diagnostics.score(without, np.arange(2), num_resamples=2)
    for name in ("accuracy", "nll", "brier", "ece"):
        assert getattr(a, name).value == pytest.approx(getattr(b, name).value)


def test_ece_tells_honest_from_overconfident_predictions():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 1.0, size=20_000)
    hit = (rng.random(20_000) < truth).astype(float)
    honest = diagnostics.reliability(truth, hit).ece
    # Ten bins of 2,000: each gap is at most about 0.011 (one standard error), so the mean is well below 0.02.
    assert honest < 0.02
    overconfident = diagnostics.reliability(0.5 + 0.5 * (2 * truth - 1) ** 0.5, hit).ece
    assert overconfident > 0.05


def test_reliability_refuses_nonsense():
    with pytest.raises(ArgumentError, match="equal, non-empty"):
        diagnostics.reliability(np.zeros(2), np.zeros(3))


def test_auroc_equals_the_mann_whitney_statistic():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 10, size=40).astype(float), rng.integers(3, 12, size=60).astype(float)
    expected = scipy.stats.mannwhitneyu(b, a).statistic / (40 * 60)
    assert diagnostics.auroc(a, b) == pytest.approx(expected, abs=1e-12)
    by_hand = np.mean([(y > x) + 0.5 * (y == x) for x in a for y in b])
    assert diagnostics.auroc(a, b) == pytest.approx(by_hand, abs=1e-12)
    same = diagnostics.ood_auroc(a, rng.permutation(a))
    assert same.low < 0.5 < same.high


def test_bootstrap_intervals_cover_the_mean_of_clusters():
    # 40 clusters of 5 equal values: treating rows as independent would make intervals sqrt(5) times too narrow.
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 5)
    by_cluster = by_row = 0
    for _ in range(200):
        values = rng.normal(size=40)[clusters]

        def mean(index, values=values):
            return float(values[index].mean())

        interval = diagnostics.bootstrap(mean, clusters, num_resamples=200, level=0.9)
        by_cluster += interval.low < 0 < interval.high
        narrow = diagnostics.bootstrap(mean, np.arange(200), num_resamples=200, level=0.9)
        by_row += narrow.low < 0 < narrow.high
    low, high = scipy.stats.binom(200, 0.9).ppf([0.0005, 0.9995])
    # The percentile interval of 40 clusters is a little narrow: its own nominal coverage is about 0.88.
    assert low - 4 <= by_cluster <= high
    assert by_row < low - 4


def test_bootstrap_needs_clusters():
    with pytest.raises(ArgumentError, match="at least 2"):
        diagnostics.bootstrap(lambda i: 0.0, np.zeros(5, dtype=np.int64))

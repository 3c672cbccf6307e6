"""Scores of predicted feedback against hand-computed numbers, with predictions that must look wrong."""

import numpy as np
import pytest
import scipy.stats
import torch

from bayesrm import diagnostics
from bayesrm.diagnostics import (
    Events,
    brier_decomposition,
    check_calibration,
    predicted_events,
    randomised_pit,
    score_by_kind,
    top_label,
)
from bayesrm.diagnostics.events import top_choice
from bayesrm.engines import FeedbackPrediction, GroupPrediction
from bayesrm.errors import ArgumentError
from bayesrm.likelihoods.base import orderings


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
    # Three prompts are too few for more than one bin: 0.7 was stated, 2 of 3 were right.
    assert scores.ece.value == pytest.approx(0.7 - 2 / 3)
    # Three bins of one row each: |0.8 - 1|, |0.6 - 0|, |0.7 - 1|.
    alone = diagnostics.reliability(np.array([0.8, 0.6, 0.7]), np.array([1.0, 0.0, 1.0]), num_bins=3)
    assert alone.ece == pytest.approx(np.mean([0.2, 0.6, 0.3]))


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
    for negative, positive, words in (
        (a[:0], b, r"`negative` has shape \(0,\)"),
        (a, b[:0], r"`positive` has shape \(0,\)"),
        (a, np.array([1.0, np.nan]), r"`positive\[1\]` is NaN"),
    ):
        with pytest.raises(ArgumentError, match=words):
            diagnostics.auroc(negative, positive)
        with pytest.raises(
            ArgumentError, match=words.replace("negative", "familiar").replace("positive", "unfamiliar")
        ):
            diagnostics.ood_auroc(negative, positive)
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


def independent(probability, occurred, weight=None):
    """Events each of a row, and a prompt, of its own."""
    n = len(probability)
    weight = np.ones(n) if weight is None else weight
    return Events(np.asarray(probability, float), np.asarray(occurred, float), np.arange(n), weight)


def simulated(rng, n, slope=1.0):
    """Stated probabilities p in (0.5, 1) of events that happen with probability 0.5 + slope (p - 0.5)."""
    p = rng.uniform(0.5, 1.0, n)
    return independent(p, rng.random(n) < 0.5 + slope * (p - 0.5))


def joined(*parts):
    """One prediction of several groups `(label, outcomes, probs, observed)`, rows in turn."""
    groups, start = [], 0
    for label, outcomes, probs, observed in parts:
        rows = torch.arange(start, start + len(probs))
        groups.append(GroupPrediction(label, rows, outcomes, probs, observed))
        start += len(probs)
    log_prob = torch.cat([g.probs.gather(1, g.observed[:, None])[:, 0].log() for g in groups])
    return FeedbackPrediction(log_prob, tuple(groups), torch.ones(start, dtype=torch.float64))


def random_prediction(rng, label, outcomes, n):
    probs = rng.dirichlet(np.ones(len(outcomes)), size=n)
    observed = np.array([rng.choice(len(p), p=p) for p in probs])
    return label, torch.as_tensor(outcomes), torch.as_tensor(probs), torch.as_tensor(observed)


def test_reliability_equals_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(3)
    e = simulated(rng, 400)
    ours = diagnostics.reliability(e.probability, e.occurred, num_bins=8)
    frequency, confidence = calibration.calibration_curve(e.occurred, e.probability, n_bins=8, strategy="quantile")
    np.testing.assert_allclose(ours.frequency, frequency, atol=1e-12)
    np.testing.assert_allclose(ours.confidence, confidence, atol=1e-12)


def test_the_parts_of_the_brier_score_add_up_and_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    for num_bins in (1, 3, 10, 1000):
        e = simulated(rng, 250, slope=0.6)
        e = Events(e.probability, e.occurred, e.rows, rng.uniform(0.2, 3.0, 250))
        d = brier_decomposition(e, num_bins=num_bins)
        expected = metrics.brier_score_loss(e.occurred, e.probability, sample_weight=e.weight)
        assert d.score == pytest.approx(expected, abs=1e-12)
        assert d.reliability - d.resolution + d.uncertainty + d.within_bin == pytest.approx(d.score, abs=1e-12)
        corrected = d.corrected_reliability - d.corrected_resolution + d.corrected_uncertainty
        assert corrected + d.within_bin == pytest.approx(d.score, abs=1e-12)


def test_parts_of_the_brier_score_by_enumeration_of_the_stated_values():
    p = np.repeat([0.2, 0.7], [5, 5])
    o = np.array([0, 0, 1, 0, 1, 1, 1, 1, 0, 1])
    d = brier_decomposition(independent(p, o), num_bins=2)
    # Frequencies 0.4 and 0.8, overall 0.6; Ferro & Fricker take f (1 - f) / (n - 1) from each bin.
    assert d.reliability == pytest.approx(0.5 * 0.2**2 + 0.5 * 0.1**2)
    assert d.resolution == pytest.approx(0.2**2)
    assert d.uncertainty == pytest.approx(0.24)
    assert d.within_bin == pytest.approx(0.0, abs=1e-15)
    chance = 0.5 * 0.24 / 4 + 0.5 * 0.16 / 4
    assert d.corrected_reliability == pytest.approx(0.025 - chance)
    assert d.corrected_resolution == pytest.approx(0.04 - chance + 0.24 / 9)


def test_corrected_reliability_has_no_bias_and_the_plain_one_has():
    rng = np.random.default_rng(5)
    stated, true = np.repeat([0.2, 0.5, 0.8], 20), np.repeat([0.3, 0.5, 0.7], 20)
    # Resolution of finite samples: its expectation is about the true variance of the bins' rates, 0.08 / 3.
    found = [brier_decomposition(independent(stated, rng.random(60) < true), num_bins=3) for _ in range(1500)]
    for name, truth in (("reliability", 0.02 / 3), ("resolution", 0.08 / 3)):
        corrected = np.array([getattr(d, f"corrected_{name}") for d in found])
        plain = np.array([getattr(d, name) for d in found])
        error = 4 * corrected.std() / len(found) ** 0.5
        assert abs(corrected.mean() - truth) < error
        assert plain.mean() - truth > 2 * error


def test_squared_error_is_the_mean_product_over_different_prompts():
    rng = np.random.default_rng(6)
    p, o, w = rng.random(30), rng.integers(0, 2, 30).astype(float), rng.uniform(0.5, 2.0, 30)
    prompts = np.concatenate([np.arange(10), rng.integers(0, 10, 20)])
    check = check_calibration(independent(p, o, w), prompts, num_bins=2, num_resamples=2)
    order = np.argsort(p)
    expected = 0.0
    for members in (order[:15], order[15:]):
        products = pairs = 0.0
        for i in members:
            for j in members:
                if prompts[i] != prompts[j]:
                    products += w[i] * w[j] * (p[i] - o[i]) * (p[j] - o[j])
                    pairs += w[i] * w[j]
        expected += w[members].sum() / w.sum() * products / pairs
    assert check.squared_error.value == pytest.approx(expected, abs=1e-12)


def test_squared_error_has_no_bias_where_rows_of_a_prompt_go_together():
    # Four rows a prompt share one answer, each stated with the same probability: rows are far from independent.
    rng = np.random.default_rng(7)
    by_prompt, by_row = [], []
    for _ in range(100):
        p = np.repeat(rng.uniform(0.5, 1.0, 60), 4)
        hit = np.repeat(rng.random(60) < p[::4], 4)
        e = independent(p, hit)
        by_prompt.append(check_calibration(e, np.repeat(np.arange(60), 4), num_resamples=1).squared_error.value)
        by_row.append(check_calibration(e, np.arange(240), num_resamples=1).squared_error.value)
    error = 4 * np.std(by_prompt) / 10
    assert abs(np.mean(by_prompt)) < error
    assert np.mean(by_row) > 2 * error


def test_interval_covers_and_the_naive_one_of_the_plain_error_does_not():
    rng = np.random.default_rng(8)
    edges = np.linspace(0.5, 1.0, 11)
    middle = (edges[1:] + edges[:-1]) / 2
    replicates, naive_covers = 60, 0
    # In bins of uniform probabilities the mean gap is that of the middle.
    for slope in (1.0, 0.5):
        truth = np.mean(((1 - slope) * (middle - 0.5)) ** 2) ** 0.5
        covers = 0
        for r in range(replicates):
            e = simulated(rng, 300, slope)
            check = check_calibration(e, np.arange(300), num_resamples=150, seed=r)
            covers += check.error.low <= truth <= check.error.high
            if slope == 1.0 and r < 5:

                def ece(index, e=e):
                    return diagnostics.reliability(e.probability[index], e.occurred[index]).ece

                naive = diagnostics.bootstrap(ece, np.arange(300), num_resamples=100)
                naive_covers += naive.low <= 0.0
        # Exact binomial band of a 95% interval from below; above, it may cover more often near 0.
        assert covers >= scipy.stats.binom(replicates, 0.94).ppf(0.001)
    assert naive_covers == 0


def test_overconfident_predictions_are_flagged_and_calibrated_ones_at_the_level_of_the_test():
    rng = np.random.default_rng(9)
    honest = [check_calibration(simulated(rng, 300), np.arange(300), num_resamples=99, seed=r) for r in range(150)]
    p_values = np.array([c.p_value for c in honest])
    # P(p <= k / 100) = k / 100 exactly when the event's outcomes are as likely as its redraws.
    for level in (0.05, 0.2, 0.5):
        low, high = scipy.stats.binom(150, level).ppf([0.0005, 0.9995])
        assert low <= (p_values <= level + 1e-9).sum() <= high
    expected = np.mean([c.expected_ece for c in honest])
    assert np.mean([c.ece for c in honest]) == pytest.approx(expected, rel=0.05)
    sure = check_calibration(simulated(rng, 1500, slope=0.6), np.arange(1500), num_resamples=199)
    assert sure.p_value == 1 / 200
    assert sure.squared_error.low > 0
    assert "p = 0.005" in str(sure)


def false_alarms(draw, replicates, tests=("gap_p_value", "p_value")):
    """How often each test rejects at 5%, and each interval leaves 0 out, of drawn `(p, occurred, prompts)`."""
    found = dict.fromkeys([*tests, "gap", "squared_error"], 0)
    for r in range(replicates):
        p, occurred, prompts = draw(r)
        check = check_calibration(independent(p, occurred), prompts, num_resamples=99, seed=r)
        for name in tests:
            found[name] += getattr(check, name) <= 0.05
        found["gap"] += not check.gap.low <= 0 <= check.gap.high
        found["squared_error"] += check.squared_error.low > 0
        if check.p_value > 0.05:
            assert check.error.low == 0.0
    return found


@pytest.mark.parametrize(("stated", "count"), [(0.95, 20), (0.05, 20), (0.98, 50)])
def test_calibrated_events_that_nearly_all_occur_raise_no_false_alarms(stated, count):
    """All of 20 occur in 36% of replicates: redrawn prompts are then all alike and leave 0 out of every interval."""

    def draw(r):
        rng = np.random.default_rng([17, r])
        p = stated + rng.uniform(-0.01, 0.01, count)
        return p, (rng.random(count) < p).astype(float), np.arange(count)

    replicates, naive = 150, 0
    found = false_alarms(draw, replicates)
    most = scipy.stats.binom(replicates, 0.05).ppf(0.9995)
    assert all(number <= most for number in found.values()), found
    for r in range(replicates):
        occurred = draw(r)[1]
        naive += bool(occurred.all() or not occurred.any())
    assert naive > 2 * most


def test_a_gap_is_judged_by_the_poisson_binomial_distribution():
    rng = np.random.default_rng(18)
    p = rng.uniform(0.6, 0.99, 25)
    # The distribution of the number that occur, one event after the other.
    mass = np.ones(1)
    for chance in p:
        mass = np.convolve(mass, [1 - chance, chance])
    for number in (15, 18, 22, 25):
        occurred = np.zeros(25)
        occurred[:number] = 1.0
        exact = 2 * min(mass[: number + 1].sum(), mass[number:].sum())
        found = check_calibration(independent(p, occurred), np.arange(25), num_resamples=4000)
        # The standard error of a doubled share of 4,000, and the one that is added to it.
        error = 4.5 * 2 * np.sqrt(exact / 2 / 4000) + 2 / 4000
        assert found.gap_p_value == pytest.approx(min(1.0, exact), abs=error)
        assert found.gap.value == pytest.approx(p.mean() - number / 25)


@pytest.mark.parametrize("stated", [0.98, None])
def test_rows_of_a_prompt_that_go_together_raise_no_false_alarms(stated):
    """20 prompts of 20 rows with one answer each: of independent rows all would be right once in 3,000 replicates."""

    def draw(r):
        rng = np.random.default_rng([19, r])
        p = np.full(20, stated) if stated else rng.uniform(0.5, 1.0, 20)
        return np.repeat(p, 20), np.repeat(rng.random(20) < p, 20).astype(float), np.repeat(np.arange(20), 20)

    replicates = 100
    most = scipy.stats.binom(replicates, 0.05).ppf(0.9995)
    found = false_alarms(draw, replicates, tests=("gap_p_value",))
    assert all(number <= most for number in found.values()), found
    # The same rows, each said to be a prompt of its own.
    alone = false_alarms(lambda r: (*draw(r)[:2], np.arange(400)), replicates, tests=("gap_p_value",))
    assert alone["gap_p_value"] > 3 * most


@pytest.mark.parametrize(("stated", "true", "count"), [(0.95, 0.75, 40), (0.8, 1.0, 40)])
def test_wrong_probabilities_are_still_caught(stated, true, count):
    def draw(r):
        rng = np.random.default_rng([20, r])
        return np.full(count, stated), (rng.random(count) < true).astype(float), np.arange(count)

    found = false_alarms(draw, 40)
    # 0.2 off is more than 3 standard deviations of the mean of 40; exact power of either test is above 0.9.
    least = scipy.stats.binom(40, 0.9).ppf(0.0005)
    assert found["gap_p_value"] >= least
    assert found["gap"] >= least
    if true == 1.0:
        # All answers are right: redraws do not vary, and the tests see it nonetheless.
        assert found["squared_error"] == found["p_value"]


def test_a_design_effect_is_that_of_rows_copied():
    from bayesrm.diagnostics.calibration import _design_effect

    rng = np.random.default_rng(21)
    p = rng.uniform(0.5, 1.0, 30)
    copied = independent(np.repeat(p, 4), np.repeat(rng.random(30) < p, 4))
    cells = np.zeros(120, dtype=np.int64)
    assert _design_effect(copied, np.repeat(np.arange(30), 4), cells) == pytest.approx(4.0)
    assert _design_effect(copied, np.arange(120), cells) == 1.0
    # Rows of a prompt that take turns vary less than independent ones; that is no reason to reject sooner.
    turns = independent(np.full(40, 0.5), np.tile([0.0, 1.0], 20))
    assert _design_effect(turns, np.repeat(np.arange(20), 2), np.zeros(40, dtype=np.int64)) == 1.0


def test_consistency_bars_are_binomial_quantiles():
    rng = np.random.default_rng(10)
    e = independent(np.full(50, 0.3), rng.random(50) < 0.3)
    check = check_calibration(e, np.arange(50), num_bins=1, num_resamples=20_000, level=0.9)
    expected = scipy.stats.binom(50, 0.3).ppf([0.05, 0.95]) / 50
    # The quantiles of a count may be one off by Monte Carlo error only where the distribution function is at 5%.
    np.testing.assert_allclose([check.low[0], check.high[0]], expected, atol=1e-12)


def test_redrawn_events_of_a_row_exclude_each_other_and_happen_as_often_as_stated():
    from bayesrm.diagnostics.calibration import _redraw

    probability = np.array([0.2, 0.5, 0.1, 0.7, 0.3, 0.4])
    rows = np.array([5, 5, 5, 2, 2, 9])
    draw = _redraw(Events(probability, np.zeros(6), rows, np.ones(6)))
    rng = np.random.default_rng(11)
    drawn = np.stack([draw(rng) for _ in range(20_000)])
    error = 4 * np.sqrt(probability * (1 - probability) / 20_000)
    assert (np.abs(drawn.mean(0) - probability) < error).all()
    assert drawn[:, :3].sum(1).max() == 1
    assert (drawn[:, 3:5].sum(1) == 1).all()


def test_events_of_every_kind_by_hand():
    p = joined(
        ("choice.2", torch.arange(3), torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64), torch.tensor([2])),
        (
            "ranking.3.3",
            torch.tensor(orderings(3, 3)),
            torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.15, 0.05]], dtype=torch.float64),
            torch.tensor([3]),
        ),
        ("rating.1", torch.arange(3), torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64), torch.tensor([1])),
        ("approval.1", torch.arange(2), torch.tensor([[0.4, 0.6]], dtype=torch.float64), torch.tensor([1])),
    )
    found = predicted_events(p)
    expected = {
        "choice: likeliest answer": ([0.5], [0]),
        "choice: candidate chosen": ([0.5, 0.2], [0, 0]),
        "choice: tie": ([0.3], [1]),
        "ranking: likeliest answer": ([0.3], [0]),
        # Orders 012 021 102 120 201 210; observed 120.
        "ranking: first place": ([0.3, 0.5, 0.2], [0, 1, 0]),
        "rating: likeliest answer": ([0.5], [1]),
        "rating: level at most 0": ([0.2], [0]),
        "rating: level at most 1": ([0.7], [1]),
        "approval: likeliest answer": ([0.6], [1]),
        "approval: approved": ([0.6], [1]),
    }
    assert list(found) == list(expected)
    for name, (probability, occurred) in expected.items():
        np.testing.assert_allclose(found[name].probability, probability, atol=1e-12)
        assert found[name].occurred.tolist() == occurred
    assert found["ranking: first place"].rows.tolist() == [1, 1, 1]


def test_of_equally_likely_answers_the_listed_first_is_no_better():
    """Data with `chosen` and `rejected` list the answer first; who cannot tell them apart is right half the time."""
    even = torch.full((2000, 2), 0.5, dtype=torch.float64)
    p = joined(("choice.2", torch.arange(2), even, torch.zeros(2000, dtype=torch.int64)))
    for _, occurred, _ in (top_label(p), top_choice(p)):
        # Four standard errors.
        assert abs(occurred.mean() - 0.5) < 4 * 0.5 / 2000**0.5


def test_the_order_of_candidates_does_not_matter():
    rng = np.random.default_rng(12)
    label, outcomes, probs, observed = random_prediction(rng, "choice.2", np.arange(3), 80)
    swap = torch.tensor([1, 0, 2])
    a = predicted_events(joined((label, outcomes, probs, observed)))["choice: candidate chosen"]
    b = predicted_events(joined((label, outcomes, probs[:, swap], swap[observed])))["choice: candidate chosen"]
    for name in ("confidence", "frequency", "count"):
        left, right = (getattr(diagnostics.reliability(e.probability, e.occurred), name) for e in (a, b))
        np.testing.assert_allclose(left, right, atol=1e-12)


@pytest.mark.parametrize(
    ("label", "outcomes"),
    [
        ("choice.3", np.arange(4)),
        ("ranking.3.3", np.array(orderings(3, 3))),
        ("rating.1", np.arange(5)),
        ("approval.1", np.arange(2)),
    ],
)
def test_every_event_of_right_predictions_is_calibrated_and_of_wrong_ones_is_not(label, outcomes):
    rng = np.random.default_rng(13)
    label, outcomes, probs, observed = random_prediction(rng, label, outcomes, 1500)
    honest = predicted_events(joined((label, outcomes, probs, observed)))
    # Sharpened: the same order of outcomes, stated too surely.
    sharp = probs**3 / (probs**3).sum(1, keepdim=True)
    sure = predicted_events(joined((label, outcomes, sharp, observed)))
    for name, e in honest.items():
        # Ten events in all are tested at 0.001.
        assert check_calibration(e, np.arange(1500), num_resamples=999).p_value > 0.001, name
        assert check_calibration(sure[name], np.arange(1500), num_resamples=199).p_value == 1 / 200, name


def test_randomised_pit_is_uniform_for_right_predictions_alone():
    rng = np.random.default_rng(14)
    rating = random_prediction(rng, "rating.1", np.arange(4), 1000)
    pit, rows = randomised_pit(joined(rating), seed=1)
    assert rows.tolist() == list(range(1000))
    assert scipy.stats.kstest(pit, "uniform").pvalue > 0.01
    label, outcomes, probs, observed = rating
    sharp = probs**3 / (probs**3).sum(1, keepdim=True)
    pit, _ = randomised_pit(joined((label, outcomes, sharp, observed)), seed=1)
    assert scipy.stats.kstest(pit, "uniform").pvalue < 1e-4
    assert (randomised_pit(joined(rating), seed=1)[0] == randomised_pit(joined(rating), seed=1)[0]).all()
    with pytest.raises(ArgumentError, match="no ratings"):
        randomised_pit(joined(random_prediction(rng, "choice.2", np.arange(2), 5)))


def test_scores_by_kind_are_the_scores_of_each_kind_alone():
    rng = np.random.default_rng(15)
    parts = [random_prediction(rng, "choice.2", np.arange(3), 30), random_prediction(rng, "rating.1", np.arange(4), 20)]
    prompts = rng.integers(0, 12, 50)
    found = score_by_kind(joined(*parts), prompts, num_resamples=30)
    assert list(found) == ["choice", "rating"]
    for kind, part, rows in (("choice", parts[0], slice(30)), ("rating", parts[1], slice(30, 50))):
        assert found[kind] == diagnostics.score(joined(part), prompts[rows], num_resamples=30)


def test_scores_without_enumerable_outcomes_are_those_that_need_none():
    p = FeedbackPrediction(
        torch.tensor([-1.0, -3.0], dtype=torch.float64),
        (GroupPrediction("ranking.9.9", torch.arange(2), None, None, None),),
        torch.ones(2, dtype=torch.float64),
    )
    scores = diagnostics.score(p, np.arange(2), num_resamples=10)
    assert scores.nll.value == 2.0
    assert all(np.isnan(getattr(scores, name).value) for name in ("accuracy", "brier", "ece", "calibration_error"))
    with pytest.raises(ArgumentError, match="enumerated"):
        predicted_events(p)


def test_interval_of_the_plain_error_lies_around_it():
    rng = np.random.default_rng(16)
    e = simulated(rng, 400)
    probs = np.stack([e.probability, 1 - e.probability], axis=1)
    p = prediction(probs, (1 - e.occurred).astype(int))
    ece = diagnostics.score(p, np.arange(400)).ece
    assert ece.low < ece.value < ece.high
    # Redrawing rows adds the bias a second time, so a percentile interval lies above the value's own.
    naive = diagnostics.bootstrap(
        lambda i: diagnostics.reliability(e.probability[i], e.occurred[i]).ece, np.arange(400), num_resamples=300
    )
    assert (naive.low + naive.high) / 2 > (ece.low + ece.high) / 2


def test_checks_refuse_nonsense():
    with pytest.raises(ArgumentError, match="must agree"):
        Events(np.zeros(2), np.zeros(3), np.arange(2), np.ones(2))
    with pytest.raises(ArgumentError, match="positive weight"):
        check_calibration(independent([0.5], [1], np.zeros(1)), np.arange(1))
    with pytest.raises(ArgumentError, match="at least 2"):
        check_calibration(independent([0.5, 0.6], [1, 0]), np.zeros(2, dtype=np.int64))
    with pytest.raises(ArgumentError, match="num_bins"):
        diagnostics.reliability(np.ones(2), np.ones(2), num_bins=0)
    one = independent([0.5, 0.6, 0.7], [1, 0, 1])
    with pytest.raises(ArgumentError, match=r"`prompts` has shape \(2,\).*row 2"):
        check_calibration(one, np.arange(2))
    with pytest.raises(ArgumentError, match=r"`prompts` has shape \(3, 1\)"):
        check_calibration(one, np.arange(3)[:, None])
    p = prediction([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [0, 1, 1])
    for function in (diagnostics.score, score_by_kind):
        for prompts in (np.arange(2), np.arange(4)):
            with pytest.raises(ArgumentError, match=rf"`prompts` has shape \({len(prompts)},\), the prediction 3 rows"):
                function(p, prompts)
    for settings, words in (
        ({"level": 2.0}, "`level` is 2.0; it lies"),
        ({"num_resamples": 0}, "`num_resamples` is 0"),
    ):
        for call in (
            lambda **s: check_calibration(one, np.arange(3), **s),
            lambda **s: diagnostics.score(p, np.arange(3), **s),
            lambda **s: diagnostics.bootstrap(lambda i: 0.0, np.arange(3), **s),
        ):
            with pytest.raises(ArgumentError, match=words):
                call(**settings)
    with pytest.raises(ArgumentError, match=r"`clusters` has shape \(3, 1\)"):
        diagnostics.bootstrap(lambda i: 0.0, np.arange(3)[:, None])


def test_equal_probabilities_share_a_bin_whatever_the_order_of_the_rows():
    """A constant forecaster of an event that occurs so often is calibrated, also with its successes listed first."""
    p, o, rows = np.full(100, 0.5), np.repeat([1.0, 0.0], 50), np.arange(100)
    found = check_calibration(Events(p, o, rows, np.ones(100)), rows)
    assert found.ece == 0.0
    assert (found.brier.reliability, found.brier.resolution) == (0.0, 0.0)
    assert len(found.curve.count) == 1
    # Rounding does not part them either, and what differs is kept apart.
    noisy = p + 1e-12 * np.random.default_rng(0).normal(size=100)
    assert len(diagnostics.reliability(noisy, o).count) == 1
    two = diagnostics.reliability(np.repeat([0.2, 0.8], 50), o)
    np.testing.assert_allclose(two.confidence, [0.2, 0.8])
    np.testing.assert_allclose(two.frequency, [1.0, 0.0])


def test_intervals_of_a_calibration_error_have_a_width():
    rows = np.arange(15)
    # All occurred, at an even stated chance: redrawn prompts are all alike.
    found = check_calibration(Events(np.full(15, 0.5), np.ones(15), rows, np.ones(15)), rows)
    assert found.error.value == pytest.approx(0.5)
    # Wilson: 15 of 15 leaves 0.20 to be seen.
    assert found.error.low == pytest.approx(0.5 - 1.96**2 / (15 + 1.96**2), abs=1e-3)
    assert found.gap.low < -0.5 < found.gap.high
    # Few prompts of many rows each: the debiased square is negative however they are redrawn.
    rng = np.random.default_rng(3)
    p = np.repeat([0.2, 0.4, 0.6, 0.8], 100)
    o = (rng.random(400) < p).astype(float)
    few = check_calibration(Events(p, o, np.arange(400), np.ones(400)), np.repeat(np.arange(4), 100))
    assert few.error.low == 0.0 < few.error.high


def test_classes_that_are_wholly_apart_have_an_interval():
    found = diagnostics.ood_auroc(np.array([0.1, 0.2]), np.array([0.8, 0.9]))
    assert found.value == found.high == 1.0
    assert found.low < 0.5


def test_probabilities_and_prompts_are_checked():
    with pytest.raises(ArgumentError, match=r"`probability\[0\]` is 1.5"):
        diagnostics.reliability(np.array([1.5, 0.5]), np.array([1.0, 0.0]))
    with pytest.raises(ArgumentError, match=r"`num_bins` is 0"):
        diagnostics.reliability(np.array([0.5]), np.array([1.0]), num_bins=0)
    p = prediction([[0.8, 0.2], [0.6, 0.4]], [0, 1])
    assert diagnostics.score(p, [0, 1], num_resamples=5).nll.value > 0

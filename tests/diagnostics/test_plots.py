"""Figures show the numbers they are given; the band of the ECDF holds uniform ranks at its level and no others."""

import numpy as np
import pytest
import scipy.stats
import torch

import bayesrm as brm
from bayesrm.diagnostics import Events, check_calibration, plots
from bayesrm.diagnostics.coverage import coverage
from bayesrm.diagnostics.predictive_checks import PredictiveCheck
from bayesrm.errors import ArgumentError

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def nothing_stays_open():
    """Figures are drawn, and none is registered with pyplot."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def drawn(axes):
    """Renders the figure, which finds artists that cannot be drawn, and returns its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(axes.figure).draw()
    assert axes.get_xlabel()
    assert axes.get_ylabel() or len(axes.get_yticklabels())
    return axes


def points(axes, marker):
    return next(line for line in axes.lines if line.get_marker() == marker).get_xydata()


def test_reliability_shows_curve_and_bars():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1.0, 300)
    events = Events(p, (rng.random(300) < p).astype(float), np.arange(300), np.ones(300))
    check = check_calibration(events, np.arange(300), num_resamples=100)
    axes = drawn(plots.plot_reliability(check, label="held out"))
    np.testing.assert_array_equal(points(axes, "o"), np.stack([check.curve.confidence, check.curve.frequency], 1))
    bars = np.stack([segment[:, 1] for segment in axes.collections[0].get_segments()])
    np.testing.assert_array_equal(bars, np.stack([check.low, check.high], 1))
    low, high = axes.get_ylim()
    assert low <= min(check.low.min(), check.curve.frequency.min())
    assert high >= max(check.high.max(), check.curve.frequency.max())
    assert any("held out" in text.get_text() for text in axes.get_legend().get_texts())


def test_axes_that_are_given_are_used():
    from matplotlib.figure import Figure

    left, right = Figure().subplots(1, 2)
    assert plots.plot_pit(np.linspace(0, 1, 50), left) is left
    assert not right.patches


def test_pit_histogram_counts_and_band():
    pit = np.random.default_rng(1).random(400)
    axes = drawn(plots.plot_pit(pit, num_bins=10))
    np.testing.assert_array_equal(axes.patches[0].get_data().values, np.histogram(pit, 10, (0, 1))[0])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == tuple(scipy.stats.binom(400, 0.1).ppf([0.025, 0.975]))


def test_coverage_curve_passes_through_its_points():
    belief = brm.RewardBelief(torch.zeros(60, 3).double(), torch.eye(3).double().expand(60, 3, 3))
    found = coverage(belief, belief.sample(1, seed=0)[0], num_resamples=50)
    axes = drawn(plots.plot_coverage(found))
    curve = axes.lines[1].get_xydata()
    for level, share in zip(found.levels, found.covered, strict=True):
        assert curve[curve[:, 0] <= level, 1].max() == pytest.approx(share.value)
    np.testing.assert_array_equal(points(axes, "o")[:, 1], [c.value for c in found.covered])


def test_predictive_check_of_one_number():
    values = np.random.default_rng(2).binomial(200, 0.3, size=(300, 1)) / 200
    axes = drawn(plots.plot_predictive_check(PredictiveCheck("tie rate", ("tie rate",), np.array([0.4]), values)))
    assert axes.lines[0].get_xdata()[0] == 0.4
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights) == 300
    # Bars hold equally many of the values a rate can take: none is empty between full ones by construction.
    assert min(heights[len(heights) // 3 : -len(heights) // 3]) > 0


def test_predictive_check_of_several_numbers_shows_the_most_suspect():
    rng = np.random.default_rng(3)
    replicated = rng.normal(size=(200, 30))
    observed = np.zeros(30)
    observed[[4, 17]] = 5.0
    observed[9] = np.nan
    check = PredictiveCheck("agreement", tuple(f"rater {i}" for i in range(30)), observed, replicated)
    axes = drawn(plots.plot_predictive_check(check, most=5))
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == 5
    assert {"rater 4", "rater 17"} <= set(labels)
    assert "rater 9" not in labels
    nothing = PredictiveCheck("x", ("x",), np.array([np.nan]), np.ones((3, 1)))
    with pytest.raises(ArgumentError, match="no number"):
        plots.plot_predictive_check(nothing)


@pytest.mark.parametrize("values", [np.zeros(50), np.repeat([0.1, 0.3], 25), np.random.default_rng(0).normal(size=50)])
def test_a_histogram_counts_all_values_however_few(values):
    check = PredictiveCheck("x", ("x",), np.array([0.0]), values[:, None])
    axes = drawn(plots.plot_predictive_check(check))
    assert sum(patch.get_height() for patch in axes.patches) == 50


def test_ranks_fall_into_bars_of_equal_width():
    ranks = np.random.default_rng(4).integers(0, 100, 500)
    axes = drawn(plots.plot_ranks(ranks, 99, num_bins=15))
    # 10 is the largest number up to 15 that divides 100.
    np.testing.assert_array_equal(axes.patches[0].get_data().values, np.bincount(ranks // 10, minlength=10))


def outside(ranks, band):
    at, low, high = band
    ecdf = np.searchsorted(np.sort(ranks), at, side="right") / len(ranks)
    return bool(((ecdf < low - 1e-12) | (ecdf > high + 1e-12)).any())


@pytest.mark.parametrize(("num_replicates", "num_draws"), [(200, 19), (500, 99), (100, 999)])
def test_the_band_holds_uniform_ranks_at_its_level(num_replicates, num_draws):
    band = plots.ecdf_band(num_replicates, num_draws)
    rng = np.random.default_rng(5)
    left = sum(outside(rng.integers(0, num_draws + 1, num_replicates), band) for _ in range(2000))
    # Both the band and this count come from 2,000 simulations, and discrete bands err on the wide side.
    error = 4 * (2 * 0.05 * 0.95 / 2000) ** 0.5
    assert left / 2000 < 0.05 + error
    assert left / 2000 > 0.02
    # A band for each point by itself is left far more often.
    at, _, _ = band
    share = (at + 1) / (num_draws + 1)
    pointwise = at, *(scipy.stats.binom.ppf(q, num_replicates, share) / num_replicates for q in (0.025, 0.975))
    assert sum(outside(rng.integers(0, num_draws + 1, num_replicates), pointwise) for _ in range(300)) > 0.15 * 300


def test_wrong_ranks_leave_the_band():
    rng = np.random.default_rng(6)
    band = plots.ecdf_band(500, 99)
    truth = rng.normal(size=500)
    for name, spread, shift in (("halved variance", 0.5**0.5, 0.0), ("shifted mean", 1.0, 0.3)):
        # Posterior N(mean, 1) of a truth, with draws of another spread or centre.
        centre = truth + rng.normal(size=500)
        ranks = (centre[:, None] + shift + spread * rng.normal(size=(500, 99)) < truth[:, None]).sum(1)
        assert outside(ranks, band), name
        axes = drawn(plots.plot_ecdf_difference(ranks, 99))
        low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), 0.1
        assert np.abs(axes.lines[1].get_ydata()).max() > min(-low, high)


def test_familiarity_shows_both_and_their_auroc():
    rng = np.random.default_rng(7)
    axes = drawn(plots.plot_familiarity(rng.gamma(4, size=100), rng.gamma(9, size=80)))
    assert "AUROC" in axes.get_legend().get_title().get_text()
    for patch in axes.patches:
        data = patch.get_data()
        assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1.0)


def test_chains():
    draws = np.random.default_rng(8).normal(size=(4, 200))
    draws[2] += 3.0
    trace = drawn(plots.plot_trace(draws, name="tie weight"))
    np.testing.assert_array_equal(np.stack([line.get_ydata() for line in trace.lines]), draws)
    ranks = drawn(plots.plot_chain_ranks(draws, num_bins=10))
    counts = np.stack([patch.get_data().values for patch in ranks.patches])
    assert (counts.sum(1) == 200).all()
    assert (counts.sum(0) == 80).all()
    # The chain that sits elsewhere is not flat.
    assert counts[2].max() > 60


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.plot_ranks(np.array([0, 101]), 99),
        lambda: plots.plot_ecdf_difference(np.zeros((2, 2), dtype=np.int64), 99),
        lambda: plots.plot_trace(np.zeros(5)),
        lambda: plots.plot_chain_ranks(np.zeros((0, 5))),
    ],
)
def test_refuses_nonsense(call):
    with pytest.raises(ArgumentError):
        call()

"""Figures of the diagnostics. Each draws on axes that are given, or on a new figure: `axes.figure.savefig(path)`.

Needs matplotlib (`pip install 'bayesrm[plots]'`). New figures are made without `pyplot`, so that none stays open and
nothing global changes. Blue is what was found, orange what it is compared with, grey what was expected.
"""

from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from ..errors import ArgumentError
from .calibration import CalibrationCheck
from .coverage import Coverage
from .ood import auroc
from .predictive_checks import PredictiveCheck

#: Colours that differ in lightness too, so that they can be told apart without colour vision.
BLUE, ORANGE, SKY, INK, GREY = "#2563a8", "#d9772b", "#7db7e8", "#1d2330", "#8a8f98"
_BAND = "#e2e5ea"
_CHAINS = (BLUE, ORANGE, SKY, INK, "#f0b27a", GREY)


def _axes(axes: Any, width: float = 5.0, height: float = 3.6) -> Any:
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(width, height), dpi=130, layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _legend(axes: Any, **settings: Any) -> None:
    # Above the axes, where it cannot hide data.
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(frameon=False, fontsize="small", **(place | settings))


def plot_reliability(check: CalibrationCheck, axes: Any = None, *, label: str = "predictions") -> Any:
    """Reliability diagram: stated probability against observed frequency, with consistency bars.

    A point outside its bar is one that calibrated predictions would rarely show.

    Args:
        check: From `check_calibration`.
        axes: Matplotlib axes; made when absent.
        label: What to call the predictions.

    Returns:
        The axes.
    """
    axes = _axes(axes, 4.6, 4.2)
    x, curve = check.curve.confidence, check.curve
    ends = np.array([min(x.min(), curve.frequency.min(), check.low.min()), max(x.max(), curve.frequency.max())])
    ends = np.clip(ends + np.array([-0.03, 0.03]), 0.0, 1.0)
    axes.plot(ends, ends, color=GREY, lw=1, zorder=1)
    bars = f"{check.level:.0%} of calibrated predictions"
    axes.vlines(x, check.low, check.high, color=_BAND, lw=7, zorder=0, label=bars)
    name = f"{label}\nECE {check.ece:.3f} (calibrated: {check.expected_ece:.3f}), p = {check.p_value:.2g}"
    axes.plot(x, curve.frequency, "o-", color=BLUE, ms=5, lw=1.2, label=name)
    axes.set(xlabel="stated probability", ylabel="observed frequency", xlim=ends, ylim=ends)
    _legend(axes)
    return axes


def plot_pit(pit: NDArray[np.float64], axes: Any = None, *, num_bins: int = 20, level: float = 0.95) -> Any:
    """Histogram of the probability integral transform, with the band that holds each bar of a calibrated one.

    Args:
        pit: Values in [0, 1], shape `(n,)`: from `randomised_pit` or `Coverage.pit`.
        axes: Matplotlib axes; made when absent.
        num_bins: Number of bars.
        level: Coverage of the band, for each bar by itself, values independent.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    counts, edges = np.histogram(pit, num_bins, range=(0.0, 1.0))
    _count_band(axes, len(pit), 1 / num_bins, level, (0.0, 1.0))
    axes.stairs(counts, edges, color=BLUE, fill=True, alpha=0.65)
    axes.set(xlabel="belief's distribution function at what was observed", ylabel="count", xlim=(0, 1))
    _legend(axes)
    return axes


def _count_band(axes: Any, size: int, share: float, level: float, ends: tuple[float, float]) -> None:
    binomial = scipy.stats.binom(size, share)
    low, high = binomial.ppf([(1 - level) / 2, (1 + level) / 2])
    axes.fill_between(ends, low, high, color=_BAND, lw=0, zorder=0, label=f"{level:.0%} band if uniform")
    axes.hlines(size * share, *ends, color=GREY, lw=1, zorder=3)


def plot_coverage(coverage: Coverage, axes: Any = None) -> Any:
    """Share of true differences inside central intervals, at all levels, with intervals over prompts at some.

    Args:
        coverage: From `coverage`.
        axes: Matplotlib axes; made when absent.

    Returns:
        The axes.
    """
    axes = _axes(axes, 4.4, 4.2)
    depth = np.sort(2 * np.abs(coverage.pit - 0.5))
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, label="right")
    axes.plot(depth, np.arange(1, len(depth) + 1) / len(depth), color=BLUE, lw=1.5, label="observed")
    interval = f"{coverage.covered[0].level:.0%} interval over prompts"
    low, high = [c.low for c in coverage.covered], [c.high for c in coverage.covered]
    axes.vlines(coverage.levels, low, high, color=BLUE, lw=2, label=interval)
    axes.plot(coverage.levels, [c.value for c in coverage.covered], "o", color=BLUE, ms=5)
    axes.set(xlabel="nominal coverage", ylabel="share of true differences inside", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
    return axes


def plot_predictive_check(check: PredictiveCheck, axes: Any = None, *, level: float = 0.9, most: int = 20) -> Any:
    """Observed value of a statistic against its values on replicates; one line a number if it has several.

    Args:
        check: From `predictive_check`.
        axes: Matplotlib axes; made when absent.
        level: Share of the replicates that a bar covers, if there are several numbers.
        most: Numbers shown at most, those with the smallest p-values.

    Returns:
        The axes.
    """
    known = ~np.isnan(check.observed) & (~np.isnan(check.replicated)).any(0)
    if not known.any():
        raise ArgumentError(f"`check` of {check.name} has no number that is defined on data and replicates")
    if len(check.labels) == 1:
        axes = _axes(axes)
        values = check.replicated[:, 0][~np.isnan(check.replicated[:, 0])]
        axes.hist(values, _value_bins(values), color=GREY, alpha=0.65, label="replicated")
        axes.axvline(check.observed[0], color=BLUE, lw=2.5, label=f"observed, p = {check.p_value[0]:.2g}")
        axes.set(xlabel=check.name, ylabel="replicates")
    else:
        shown = np.flatnonzero(known)
        shown = np.sort(shown[np.argsort(check.p_value[shown], kind="stable")[:most]])
        axes = _axes(axes, 5.4, 1.2 + 0.3 * len(shown))
        y = np.arange(len(shown))[::-1]
        low, middle, high = np.nanquantile(check.replicated[:, shown], [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
        axes.hlines(y, low, high, color=_BAND, lw=9, label=f"{level:.0%} of replicates")
        axes.plot(middle, y, "|", color=GREY, ms=9)
        axes.plot(check.observed[shown], y, "o", color=BLUE, ms=6, label="observed")
        axes.set(
            xlabel=check.name, yticks=y, yticklabels=[check.labels[i] for i in shown], ylim=(-0.6, len(shown) - 0.4)
        )
        axes.tick_params(axis="y", length=0)
    _legend(axes)
    return axes


def _value_bins(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges that leave no gap where a rate takes few values."""
    distinct = np.unique(values)
    if len(distinct) == 1:
        half = max(0.05 * abs(float(distinct[0])), 5e-4)
        return np.array([distinct[0] - half, distinct[0] + half])
    step = np.diff(distinct).min()
    span = (distinct[-1] - distinct[0]) / step
    if span <= 1000:
        # A rate takes multiples of one step: bars of whole steps hold equally many of them.
        width = step * max(1, round(span / 25))
        count = int(np.ceil((distinct[-1] - distinct[0] + 0.5 * step) / width))
        edges: NDArray[np.float64] = distinct[0] - 0.5 * step + np.arange(count + 1) * width
        return edges
    return np.histogram_bin_edges(values, 30)


def plot_ranks(
    ranks: NDArray[np.int64], num_draws: int, axes: Any = None, *, num_bins: int = 20, level: float = 0.95
) -> Any:
    """Histogram of the ranks of simulation-based calibration, with a uniform one's band (Talts et al., 1804.06788).

    Args:
        ranks: Rank of each truth among the draws, 0 to `num_draws`, shape `(replicates,)`.
        num_draws: Number of draws.
        axes: Matplotlib axes; made when absent.
        num_bins: Number of bars wished for; the nearest number below that divides `num_draws + 1` is taken.
        level: Coverage of the band, for each bar by itself.

    Returns:
        The axes.
    """
    _check_ranks(ranks, num_draws)
    axes = _axes(axes)
    num_bins = max(n for n in range(1, num_bins + 1) if (num_draws + 1) % n == 0)
    edges = np.linspace(0, num_draws + 1, num_bins + 1)
    _count_band(axes, len(ranks), 1 / num_bins, level, (0.0, num_draws + 1.0))
    axes.stairs(np.histogram(ranks, edges)[0], edges, color=BLUE, fill=True, alpha=0.65)
    axes.set(xlabel=f"rank of the truth among {num_draws} draws", ylabel="replicates", xlim=(0, num_draws + 1))
    _legend(axes)
    return axes


def plot_ecdf_difference(
    ranks: NDArray[np.int64], num_draws: int, axes: Any = None, *, level: float = 0.95, label: str = "ranks"
) -> Any:
    """Empirical distribution of ranks less the uniform one, with a band that holds all of it at once.

    The band is that of Saeilynoja, Buerkner & Vehtari (Statistics and Computing 2022, 2103.10522): a curve that leaves
    it anywhere rejects uniformity at `1 - level`.

    Args:
        ranks: Rank of each truth among the draws, 0 to `num_draws`, shape `(replicates,)`.
        num_draws: Number of draws.
        axes: Matplotlib axes; made when absent.
        level: Coverage of the band, for the whole curve.
        label: What to call the curve.

    Returns:
        The axes.
    """
    _check_ranks(ranks, num_draws)
    axes = _axes(axes)
    points, low, high = ecdf_band(len(ranks), num_draws, level=level)
    expected = (points + 1) / (num_draws + 1)
    found = np.searchsorted(np.sort(ranks), points, side="right") / len(ranks)
    axes.fill_between(
        expected, low - expected, high - expected, color=_BAND, lw=0, step="post", label=f"{level:.0%} band if uniform"
    )
    axes.axhline(0, color=GREY, lw=1)
    axes.step(expected, found - expected, where="post", color=BLUE, lw=1.5, label=label)
    axes.set(xlabel="rank of the truth, as a share of the draws", ylabel="ECDF less uniform", xlim=(0, 1))
    _legend(axes)
    return axes


def ecdf_band(
    num_replicates: int, num_draws: int, *, level: float = 0.95, num_simulations: int = 2000
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Simultaneous band of the ECDF of uniform ranks (Saeilynoja et al. 2022, 2103.10522, algorithm 1 by simulation).

    Args:
        num_replicates: Number of ranks.
        num_draws: Ranks run from 0 to `num_draws`.
        level: Probability that the ECDF of uniform ranks stays inside everywhere.
        num_simulations: Simulations that adjust the band; its level has a standard error of 0.005.

    Returns:
        Ranks at which the band is given, and its lower and upper ends as shares, each of shape `(points,)`.
    """
    points = np.unique(np.linspace(0, num_draws - 1, min(num_draws, 100)).round().astype(np.int64))
    share = (points + 1) / (num_draws + 1)
    rng = np.random.default_rng(0)
    cells = np.diff(share, prepend=0.0, append=1.0)
    counts = rng.multinomial(num_replicates, cells, num_simulations).cumsum(1)[:, :-1]
    upper_tail = scipy.stats.binom.sf(counts - 1, num_replicates, share)
    lower_tail = scipy.stats.binom.cdf(counts, num_replicates, share)
    least = 2 * np.minimum(upper_tail, lower_tail).min(1)
    gamma = np.quantile(least, 1 - level)
    low = scipy.stats.binom.ppf(gamma / 2, num_replicates, share) / num_replicates
    high = scipy.stats.binom.ppf(1 - gamma / 2, num_replicates, share) / num_replicates
    return points, low, high


def _check_ranks(ranks: NDArray[np.int64], num_draws: int) -> None:
    if ranks.ndim != 1 or not len(ranks) or ranks.min() < 0 or ranks.max() > num_draws:
        raise ArgumentError(f"`ranks` must be a non-empty vector of ranks from 0 to `num_draws` = {num_draws}")


def plot_familiarity(
    familiar: NDArray[np.float64],
    unfamiliar: NDArray[np.float64],
    axes: Any = None,
    *,
    quantity: str = "posterior std of a reward difference",
) -> Any:
    """Distributions of an uncertainty on familiar and unfamiliar prompts, with the AUROC that tells them apart.

    Args:
        familiar: Uncertainty of each familiar prompt, shape `(n,)`.
        unfamiliar: Of each unfamiliar one, shape `(m,)`.
        axes: Matplotlib axes; made when absent.
        quantity: What the uncertainty is, with its unit.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    bins = np.histogram_bin_edges(np.concatenate([familiar, unfamiliar]), 30)
    for values, colour, name in ((familiar, BLUE, "familiar"), (unfamiliar, ORANGE, "unfamiliar")):
        density = np.histogram(values, bins, density=True)[0]
        axes.stairs(density, bins, color=colour, fill=True, alpha=0.35)
        axes.stairs(density, bins, color=colour, lw=1.5, label=f"{name} ({len(values)} prompts)")
    title = f"AUROC {auroc(familiar, unfamiliar):.2f}"
    axes.set(xlabel=quantity, ylabel="density")
    _legend(axes, title=title, title_fontsize="small")
    return axes


def plot_trace(draws: NDArray[np.float64], axes: Any = None, *, name: str = "value") -> Any:
    """Draws of each chain in their order; chains that explore the same posterior cannot be told apart.

    Args:
        draws: Shape `(chains, draws)`.
        axes: Matplotlib axes; made when absent.
        name: What was drawn, with its unit.

    Returns:
        The axes.
    """
    _check_chains(draws)
    axes = _axes(axes, 6.0, 2.6)
    for i, chain in enumerate(draws):
        axes.plot(chain, color=_CHAINS[i % len(_CHAINS)], lw=0.7, alpha=0.85, label=f"chain {i + 1}")
    axes.set(xlabel="draw", ylabel=name, xlim=(0, draws.shape[1] - 1))
    _legend(axes, ncols=min(4, len(draws)))
    return axes


def plot_chain_ranks(draws: NDArray[np.float64], axes: Any = None, *, num_bins: int = 20, name: str = "value") -> Any:
    """Ranks of each chain's draws among all draws (Vehtari et al. 2021, 1903.08008); flat for chains that have mixed.

    Args:
        draws: Shape `(chains, draws)`.
        axes: Matplotlib axes; made when absent.
        num_bins: Number of bars.
        name: What was drawn.

    Returns:
        The axes.
    """
    _check_chains(draws)
    axes = _axes(axes, 6.0, 2.6)
    ranks = scipy.stats.rankdata(draws, method="average").reshape(draws.shape)
    edges = np.linspace(0.5, draws.size + 0.5, num_bins + 1)
    axes.axhline(draws.shape[1] / num_bins, color=GREY, lw=1, ls="--")
    for i, chain in enumerate(ranks):
        counts = np.histogram(chain, edges)[0]
        axes.stairs(counts, edges, color=_CHAINS[i % len(_CHAINS)], lw=1.5, baseline=None, label=f"chain {i + 1}")
    axes.set(xlabel=f"rank of {name} among the draws of all chains", ylabel="draws", xlim=(0, draws.size + 1))
    axes.set_ylim(0, None)
    _legend(axes, ncols=min(4, len(draws)))
    return axes


def _check_chains(draws: NDArray[np.float64]) -> None:
    if draws.ndim != 2 or not draws.size:
        raise ArgumentError(f"`draws` has shape {draws.shape}; give (chains, draws)")

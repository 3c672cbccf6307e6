"""Are predicted probabilities right? Consistency bars, a test, and the calibration error without its bias."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .bootstrap import Estimate, check_resampling, redrawn, wilson
from .brier import BrierDecomposition, brier_decomposition
from .events import Events
from .reliability import Reliability, _bins, reliability

#: Fewer prompts than this leave a bin nothing to be judged by.
_PROMPTS_PER_BIN = 5


@dataclasses.dataclass(frozen=True)
class CalibrationCheck:
    """A reliability diagram with what is needed to judge it.

    The plain ECE is positive even for perfect predictions, and a bootstrap adds the same bias once more, so its naive
    percentile interval lies too high and never reaches 0. Two numbers take its place. `p_value` compares the ECE with
    what perfect calibration would have shown on these rows. `error` estimates the root mean squared gap without that
    bias, and its interval begins at 0 where no miscalibration shows: where `p_value` exceeds `1 - level`, whatever the
    redrawn prompts say, for where nearly all events occurred (or nearly none) they are all alike and vary too little.
    In the same way the interval of `gap` holds 0 where `gap_p_value` exceeds `1 - level`.

    Attributes:
        curve: The reliability diagram.
        low: Lower end of the consistency bars, shape `(bins,)`: where frequencies would fall if every event happened
            with its stated probability, rows independently of each other (Broecker & Smith, Weather and Forecasting
            2007).
        high: Their upper end, shape `(bins,)`.
        level: Coverage of the bars, for each bin by itself, and of the intervals.
        ece: Expected calibration error of the diagram.
        expected_ece: Its mean under perfect calibration.
        p_value: Chance of an ECE at least as large under perfect calibration.
        error: Debiased root mean squared calibration error with its interval over prompts; negative squares count as 0.
        squared_error: The same before the root: an unbiased estimate, which may be negative.
        gap: Mean stated probability less the share of events that occurred, with its interval over prompts. For the
            likeliest answers it is over-confidence where positive, under-confidence where negative.
        gap_p_value: Chance of a gap as far out on either side under perfect calibration: twice the smaller tail.
        brier: The Brier score of the events in parts.
    """

    curve: Reliability
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    level: float
    ece: float
    expected_ece: float
    p_value: float
    error: Estimate
    squared_error: Estimate
    gap: Estimate
    gap_p_value: float
    brier: BrierDecomposition

    def __str__(self) -> str:
        return (
            f"ECE {self.ece:.3f} ({self.expected_ece:.3f} if calibrated, p = {self.p_value:.2g}), debiased {self.error}"
        )


def check_calibration(
    events: Events,
    prompts: NDArray[np.int64] | Sequence[int],
    *,
    num_bins: int = 10,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationCheck:
    """Reliability of events with consistency bars, a test of calibration, and the error without bias.

    The squared gap of a bin is estimated from products of gaps of *different* prompts, which has no bias; with one
    event a prompt this is the debiased estimator of Kumar, Liang & Ma (NeurIPS 2019, 1909.10155), with the variance of
    the gap in place of the label's. Its interval redraws prompts, and products of a prompt with its own copy stay out.
    Bins are those of all the data. Near 0 the interval is wider than it need be, elsewhere it covers at its level.
    Where redrawn prompts do not vary at all, as where every event occurred, the width is that of Wilson's interval for
    the share of events that occurred, with the prompts as its trials.

    The tests simulate events that happen with their stated probabilities, rows independently. Rows of one prompt that
    go together make gaps vary more: simulated ones are widened by the root of the design effect of the observed ones
    (Rao & Scott, Biometrics 1992), which is 1 where each row has a prompt of its own.

    Args:
        events: From `predicted_events(prediction)`.
        prompts: Prompt of each row of the data, `data.prompt_of_row`, shape `(rows,)`.
        num_bins: Number of bins of equal numbers of events; fewer where there are fewer than five prompts for each, or
            where probabilities are equal, which share a bin.
        num_resamples: Resamples for bars, tests and intervals.
        level: Coverage of bars and intervals, between 0 and 1.
        seed: Seed.

    Raises:
        ArgumentError: There are fewer than two prompts, `prompts` is too short for the rows of the events, no event
            counts, or a setting is out of range.
    """
    check_resampling(num_resamples, level)
    prompts = np.asarray(prompts)
    events = events.counted()
    _check_prompts(events, prompts)
    num_bins = _fewer_bins(events, prompts, num_bins)
    curve = reliability(events.probability, events.occurred, weight=events.weight, num_bins=num_bins)
    bin_of = _bin_of(events, num_bins)
    sums = _cluster_sums(events, prompts, bin_of)
    null = _simulate(events, prompts, bin_of, num_resamples, seed)
    low, high = np.quantile(null.frequencies, [(1 - level) / 2, (1 + level) / 2], axis=0)
    squared = _squared_interval(sums, num_resamples, level, seed, null.p_value)
    unseen = _unseen(events, prompts, level)
    return CalibrationCheck(
        curve,
        low,
        high,
        level,
        curve.ece,
        null.expected_ece,
        null.p_value,
        _widened(_root(squared), unseen, least=0.0),
        squared,
        _widened(_gap_interval(sums, num_resamples, level, seed, null.gap_p_value), unseen, least=-1.0),
        null.gap_p_value,
        brier_decomposition(events, num_bins=num_bins),
    )


@dataclasses.dataclass(frozen=True)
class _Null:
    """What perfect calibration would have shown: frequencies by bin, shape `(resamples, bins)`, and two tests."""

    frequencies: NDArray[np.float64]
    expected_ece: float
    p_value: float
    gap_p_value: float


def _simulate(
    events: Events, prompts: NDArray[np.int64], bin_of: NDArray[np.int64], num_resamples: int, seed: int
) -> _Null:
    count = np.bincount(bin_of, events.weight)
    confidence = np.bincount(bin_of, events.weight * events.probability) / count
    found = confidence - np.bincount(bin_of, events.weight * events.occurred) / count
    rng = np.random.default_rng(seed)
    draw = _redraw(events)
    frequencies = np.empty((num_resamples, len(count)))
    for s in range(num_resamples):
        frequencies[s] = np.bincount(bin_of, events.weight * draw(rng), minlength=len(count)) / count
    gaps = confidence - frequencies
    within, overall = (_design_effect(events, prompts, cells) ** 0.5 for cells in (bin_of, np.zeros_like(bin_of)))
    eces = within * np.average(np.abs(gaps), axis=1, weights=count)
    totals, total = overall * np.average(gaps, axis=1, weights=count), np.average(found, weights=count)
    # Rounding must not decide between a number and its equal.
    tails = [(1 + (sign * totals >= sign * total - 1e-12).sum()) / (1 + num_resamples) for sign in (1, -1)]
    ece = np.average(np.abs(found), weights=count)
    return _Null(
        frequencies,
        float(eces.mean()),
        float((1 + (eces >= ece - 1e-12).sum()) / (1 + num_resamples)),
        float(min(1.0, 2 * min(tails))),
    )


def _design_effect(events: Events, prompts: NDArray[np.int64], cells: NDArray[np.int64]) -> float:
    """Variance of sums of gaps over that of independent rows, at least 1; sums are taken in each cell."""
    gap = events.weight * (events.probability - events.occurred)
    squares = []
    for owner in (prompts[events.rows], events.rows):
        _, code = np.unique(owner, return_inverse=True)
        squares.append(np.square(np.bincount(code * (cells.max() + 1) + cells, gap)).sum())
    # Gaps of exclusive events cancel: what rounding leaves of them has no effect to show.
    return max(1.0, float(squares[0] / squares[1])) if squares[1] > 1e-18 * np.square(gap).sum() else 1.0


def _bin_of(events: Events, num_bins: int) -> NDArray[np.int64]:
    bin_of = np.empty(len(events.rows), np.int64)
    for i, members in enumerate(_bins(events.probability, events.weight, num_bins)):
        bin_of[members] = i
    return bin_of


def _redraw(events: Events) -> Callable[[np.random.Generator], NDArray[np.float64]]:
    """A function that draws which events occur if each has its stated probability, those of a row exclusive."""
    _, row = np.unique(events.rows, return_inverse=True)
    order = np.argsort(row, kind="stable")
    total = np.cumsum(events.probability[order])
    starts = np.flatnonzero(np.diff(row[order], prepend=-1))
    before = (
        total
        - events.probability[order]
        - np.repeat(total[starts] - events.probability[order][starts], np.diff(starts, append=len(order)))
    )
    low = np.empty_like(before)
    low[order] = before

    def draw(rng: np.random.Generator) -> NDArray[np.float64]:
        u = rng.random(len(starts))[row]
        return ((u >= low) & (u < low + events.probability)).astype(np.float64)

    return draw


def _fewer_bins(events: Events, prompts: NDArray[np.int64], num_bins: int) -> int:
    """As many bins as have five prompts each: products of fewer tell nothing of a bin."""
    return max(1, min(num_bins, len(np.unique(prompts[events.rows])) // _PROMPTS_PER_BIN)) if num_bins > 0 else num_bins


def _unseen(events: Events, prompts: NDArray[np.int64], level: float) -> float:
    """How far the share of events that occurred may lie from what was found, by the number of prompts alone."""
    share = float(np.average(events.occurred, weights=events.weight))
    found = wilson(share, len(np.unique(prompts[events.rows])), level)
    return max(found.high - share, share - found.low)


def _widened(found: Estimate, half_width: float, *, least: float) -> Estimate:
    """The interval, or where it has no width one of the given half width, inside [`least`, 1]."""
    if found.low != found.high:
        return found
    low, high = max(least, found.value - half_width), min(1.0, found.value + half_width)
    return Estimate(found.value, low, high, found.level)


def _check_prompts(events: Events, prompts: NDArray[np.int64]) -> None:
    if prompts.ndim != 1 or len(prompts) <= events.rows.max():
        raise ArgumentError(
            f"`prompts` has shape {prompts.shape}; give one prompt for each row of the data, of which the events name "
            f"row {events.rows.max()}: `data.prompt_of_row`"
        )


def _cluster_sums(
    events: Events, prompts: NDArray[np.int64], bin_of: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted sums of gaps, and of weights, of each prompt in each bin, both of shape `(prompts, bins)`."""
    _, cluster = np.unique(prompts[events.rows], return_inverse=True)
    shape = (int(cluster.max()) + 1, int(bin_of.max()) + 1)
    if shape[0] < 2:
        raise ArgumentError(f"`prompts` names {shape[0]} prompt; intervals over prompts need at least 2")
    cell = cluster * shape[1] + bin_of
    gap = events.weight * (events.probability - events.occurred)
    size = shape[0] * shape[1]
    gaps: NDArray[np.float64] = np.bincount(cell, gap, size).astype(np.float64).reshape(shape)
    return gaps, np.bincount(cell, events.weight, size).astype(np.float64).reshape(shape)


def _squared_error(
    copies: NDArray[np.float64], gap: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean over bins of the squared gap, from products of different prompts, shape `(resamples,)`.

    Args:
        copies: How often each prompt was drawn, shape `(resamples, prompts)`.
        gap: From `_cluster_sums`.
        weight: From `_cluster_sums`.
    """
    total = copies @ weight
    products = (copies @ gap) ** 2 - copies**2 @ gap**2
    pairs = total**2 - copies**2 @ weight**2
    # A bin that holds one prompt alone has no product of different ones, and no say.
    known = pairs > 1e-9 * total**2
    squared = np.divide(products, pairs, out=np.zeros_like(products), where=known)
    share = (total * known).sum(1)
    mean: NDArray[np.float64] = np.full(len(copies), np.nan)
    np.divide((total * squared).sum(1), share, out=mean, where=share > 0)
    return mean


def _absolute_error(
    copies: NDArray[np.float64], gap: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    error: NDArray[np.float64] = np.abs(copies @ gap).sum(1) / (copies @ weight).sum(1)
    return error


def _mean_gap(
    copies: NDArray[np.float64], gap: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = (copies @ gap.sum(1)) / (copies @ weight.sum(1))
    return mean


def _squared_interval(
    sums: tuple[NDArray[np.float64], NDArray[np.float64]], num_resamples: int, level: float, seed: int, p_value: float
) -> Estimate:
    value, draws = redrawn(_squared_error, sums, num_resamples, seed)
    if np.isnan(value):
        return Estimate(value, value, value, level)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return _judged(value, float(low), float(high), level, p_value)


def _gap_interval(
    sums: tuple[NDArray[np.float64], NDArray[np.float64]], num_resamples: int, level: float, seed: int, p_value: float
) -> Estimate:
    value, draws = redrawn(_mean_gap, sums, num_resamples, seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return _judged(value, float(low), float(high), level, p_value)


def _judged(value: float, low: float, high: float, level: float, p_value: float) -> Estimate:
    """The interval, with 0 in it where the test sees no miscalibration."""
    if p_value > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    return Estimate(value, low, high, level)


def _absolute_interval(
    sums: tuple[NDArray[np.float64], NDArray[np.float64]], num_resamples: int, level: float, seed: int
) -> Estimate:
    value, draws = redrawn(_absolute_error, sums, num_resamples, seed)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - (draws.mean() - value)
    return Estimate(value, max(0.0, float(low)), float(high), level)


def _root(squared: Estimate) -> Estimate:
    low, value, high = (float(np.maximum(v, 0.0) ** 0.5) for v in (squared.low, squared.value, squared.high))
    return Estimate(value, low, high, squared.level)

"""Does feedback drawn from the posterior look like the feedback that was given?"""

import numpy as np

from ...engines import Posterior
from ..plots import ORANGE
from ..predictive_checks import PredictiveCheck, all_predictive_checks
from ._evidence import Evidence, Floats
from ._html import Html, element, join, paragraph, table
from ._section import Section, Status, several

_LEVEL = 0.05
#: Rows of the table; some statistics have a number for each annotator.
_MOST = 40


def predictive(posterior: Posterior, evidence: Evidence, *, seed: int) -> Section:
    """The section on posterior predictive checks; p-values are judged after Holm's correction for their number."""
    # The smallest p-value that S replicates can give is 2 / (S + 1), and Holm asks for 0.05 / (number of statistics).
    num_samples = min(4000, max(1000, 40 * (20 + len(evidence.data.annotators))))
    title = "Posterior predictive checks"
    checks = all_predictive_checks(posterior, evidence.data, num_samples=num_samples, seed=seed)
    numbers = [(check, i) for check in checks for i in range(len(check.labels)) if not np.isnan(check.observed[i])]
    if not numbers:
        verdict = "0 of the statistics of this package apply to these comparisons."
        return Section("predictive", title, Status.NOTE, verdict, "", Html())
    size = len(numbers[0][0].replicated)
    order = np.argsort([check.p_value[i] for check, i in numbers], kind="stable")
    failed = holm(np.array([numbers[k][0].p_value[numbers[k][1]] for k in order]), _LEVEL)
    odd = {int(k) for k in order[:failed]}
    if odd:
        check, i = numbers[int(order[0])]
        low, high = _span(check, i)
        verdict = (
            f"{len(odd)} of {several(len(numbers), 'number')} of the feedback {'is' if len(odd) == 1 else 'are'} "
            f"unlike what the posterior draws: {_label(check, i)} is {check.observed[i]:.3g}, and {low:.3g} to "
            f"{high:.3g} in nine draws of ten."
        )
        status = Status.CAUTION
        advice = (
            "The likelihood lacks something that the feedback has: ties that do not depend on the reward, a bias "
            "for length or order, raters who differ. Declare it and fit again."
        )
    else:
        smallest = min(c.p_value[i] for c, i in numbers)
        status, advice = Status.GOOD, ""
        verdict = (
            f"All of {several(len(numbers), 'number')} of the feedback look like what the posterior draws (the "
            f"smallest of their p-values is {smallest:.3f})."
        )
        if 2 / (size + 1) > _LEVEL / len(numbers):
            status = Status.NOTE
            advice = f"With {several(size, 'draw')} nothing can be told beyond chance; an engine with more draws could."
    rows = []
    for k, (check, i) in enumerate(numbers[:_MOST]):
        low, high = _span(check, i)
        mark = "beyond chance" if k in odd else "-"
        rows.append(
            (
                _label(check, i),
                _picture(check, i),
                f"{check.observed[i]:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{check.p_value[i]:.3f}",
                mark,
            )
        )
    head = ["statistic", "drawn (grey), observed (dot)", "observed", "drawn, nine in ten", "p", "finding"]
    more = paragraph(f"and {len(numbers) - _MOST:,} more", class_="tag") if len(numbers) > _MOST else None
    note = paragraph(
        f"{size:,} replicates answer the same comparisons with one joint draw of rewards and latents each. What is "
        f"marked stays beyond chance after Holm's correction for {several(len(numbers), 'number')}, at 5%.",
        class_="tag",
    )
    return Section(
        "predictive",
        title,
        status,
        verdict,
        advice,
        join([table("Feedback observed and drawn", head, rows), more, note]),
    )


def holm(sorted_p: Floats, level: float) -> int:
    """How many of the p-values, smallest first, are rejected at a family-wise `level` (Holm 1979).

    Example:
        >>> holm(np.array([0.001, 0.02, 0.04]), 0.05)
        3
        >>> holm(np.array([0.02, 0.021, 0.04]), 0.05)
        0
    """
    count = len(sorted_p)
    passed = sorted_p > level / (count - np.arange(count))
    return int(np.argmax(passed)) if passed.any() else count


def _label(check: PredictiveCheck, i: int) -> str:
    label = check.labels[i]
    return check.name if label == check.name else f"{check.name}, {label}"


def _span(check: PredictiveCheck, i: int) -> tuple[float, float]:
    values = check.replicated[:, i]
    low, high = np.nanquantile(values, [0.05, 0.95]) if not np.isnan(values).all() else (np.nan, np.nan)
    return float(low), float(high)


def _picture(check: PredictiveCheck, i: int) -> Html | str:
    """Histogram of the replicates in grey with the observed value as a dot, on the axis that holds both."""
    values = check.replicated[~np.isnan(check.replicated[:, i]), i]
    if not len(values):
        return "-"
    width, height = 180, 30
    observed = float(check.observed[i])
    low, high = min(values.min(), observed), max(values.max(), observed)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return "-"
    counts, edges = np.histogram(values, bins=30, range=(low, high))

    def at(value: float) -> float:
        return float(6 + (value - low) / (high - low) * (width - 12))

    bars = [
        element(
            "rect",
            x=round(at(left), 1),
            y=round(24 - 20 * n / counts.max(), 1),
            width=round(max(at(right) - at(left), 1.0), 1),
            height=round(20 * n / counts.max(), 1),
            fill="#b9c0c9",
        )
        for n, left, right in zip(counts, edges[:-1], edges[1:], strict=True)
        if n
    ]
    dot = element("circle", cx=round(at(observed), 1), cy="24", r="4.5", fill=ORANGE)
    words = f"observed {observed:.3g}, drawn {values.min():.3g} to {values.max():.3g}"
    return element(
        "svg",
        *bars,
        dot,
        viewBox=f"0 0 {width} {height}",
        width=str(width),
        height=str(height),
        role="img",
        aria_label=words,
    )

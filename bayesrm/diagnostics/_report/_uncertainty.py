"""Does the posterior know where it is guessing? Uncertainty in and out of distribution, and on errors."""

import functools

import numpy as np

from ..bootstrap import bootstrap
from ..ood import auroc, ood_auroc
from ..plots import BLUE, plot_familiarity
from ._evidence import Evidence, Floats, Integers
from ._figures import axes, image
from ._html import Html, join, paragraph, table
from ._section import Section, Status, several


def uncertainty(evidence: Evidence, ood: Evidence | None, *, seed: int) -> Section:
    """The section on uncertainty, against comparisons from elsewhere where they are given."""
    title = "Uncertainty in and out of distribution"
    inside = evidence.prompt_spread()
    if not inside.any():
        verdict = f"Every {evidence.quantity} has a posterior standard deviation of 0: this posterior is a point."
        advice = (
            "Fit with Laplace, NUTS or an ensemble; a point is as sure of what it has never seen as of its "
            "training data."
        )
        return Section("uncertainty", title, Status.PROBLEM, verdict, advice, Html())
    errors = _errors(evidence, seed)
    rows = [("these data", *_summary(evidence))]
    if ood is None:
        middle = float(np.median(inside))
        verdict = (
            f"The {evidence.quantity} of a response is known to ± {middle:.2f} in the middle of "
            f"{several(len(inside), 'prompt')}; whether that grows away from the training data was not tested."
        )
        advice = (
            "Give a second data set on other subjects (`ood`) to see whether the posterior notices that it is out "
            "of its depth."
        )
        figure = _densities(inside, None, evidence.quantity)
        body = join(
            [table(f"Standard deviation of a response's {evidence.quantity}, by prompt", _HEAD, rows), figure, errors]
        )
        return Section("uncertainty", title, Status.NOTE, verdict, advice, body)
    outside = ood.prompt_spread()
    separation = ood_auroc(inside, outside, seed=seed)
    rows.append(("from elsewhere", *_summary(ood)))
    verdict = (
        f"A prompt from elsewhere is more uncertain than one of these with probability {separation.value:.2f} "
        f"[{separation.low:.2f}, {separation.high:.2f}]; 0.5 would be chance."
    )
    if separation.low > 0.5:
        status, advice = Status.GOOD, ""
    elif separation.high < 0.5:
        status = Status.PROBLEM
        advice = (
            "It is surer away from its data than on them: check that the features (and their scale) mean the same "
            "in both sets, and that the prior leaves room (a lower precision, or tuned)."
        )
    else:
        status = Status.CAUTION
        advice = (
            "Do not count on the uncertainty to flag unfamiliar prompts. Features that tell the two sets apart, a "
            "full structure, or a tangent model in place of a frozen encoder can help."
        )
    figure = _densities(inside, outside, evidence.quantity)
    body = join(
        [
            table(f"Standard deviation of a response's {evidence.quantity}, by prompt", _HEAD, rows),
            figure,
            _scores(evidence, ood, seed),
            errors,
        ]
    )
    return Section("uncertainty", title, status, verdict, advice, body)


_HEAD = ["prompts", "number", "middle", "nine in ten"]


def _summary(evidence: Evidence) -> tuple[str, str, str]:
    spread = evidence.prompt_spread()
    low, middle, high = np.quantile(spread, [0.05, 0.5, 0.95])
    return f"{len(spread):,}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def _errors(evidence: Evidence, seed: int) -> Html | None:
    """Whether comparisons that were predicted wrongly are those with little confidence."""
    scored = np.flatnonzero(evidence.scored)
    wrong = evidence.correct[scored] < 0.5
    doubt = 1.0 - evidence.confidence[scored]
    if wrong.sum() < 5 or (~wrong).sum() < 5 or evidence.num_prompts < 2:
        return None

    def separation(index: Integers) -> float:
        missed = wrong[index]
        return auroc(doubt[index][~missed], doubt[index][missed]) if 0 < missed.sum() < len(missed) else float("nan")

    estimate = bootstrap(separation, evidence.prompt[scored], seed=seed)
    said = (
        "A comparison that was predicted wrongly was less sure than one predicted rightly with probability "
        f"{estimate.value:.2f} "
        f"[{estimate.low:.2f}, {estimate.high:.2f}] (0.5 would be chance; {several(int(wrong.sum()), 'error')} "
        f"among {len(wrong):,})."
    )
    return paragraph(said, class_="tag")


def _scores(evidence: Evidence, ood: Evidence, seed: int) -> Html | None:
    """Accuracy and stated confidence on both sets."""
    rows = []
    for name, e in (("these data", evidence), ("from elsewhere", ood)):
        scored = np.flatnonzero(e.scored)
        if not len(scored) or len(np.unique(e.prompt[scored])) < 2:
            continue
        weight, right = e.weight[scored], e.correct[scored]
        hits = bootstrap(functools.partial(_average, right, weight), e.prompt[scored], seed=seed)
        sure = np.average(e.confidence[scored], weights=weight)
        rows.append((name, f"{sure:.1%}", f"{hits.value:.1%} [{hits.low:.1%}, {hits.high:.1%}]"))
    return table("Stated and found accuracy", ["comparisons", "stated", "found"], rows) if rows else None


def _average(values: Floats, weight: Floats, index: Integers) -> float:
    return float(np.average(values[index], weights=weight[index]))


def _densities(inside: Floats, outside: Floats | None, what: str) -> Html | None:
    every = inside if outside is None else np.concatenate([inside, outside])
    # Numbers that differ by rounding alone have no histogram.
    if np.ptp(every) <= 1e-9 * every.max():
        return None
    figure, ax = axes(5.4, 3.2)
    quantity = f"std of a response's {what}, mean over the prompt"
    said = f"these data: {np.median(inside):.3f} in the middle"
    if outside is None:
        ax.hist(inside, 24, color=BLUE, alpha=0.65)
        ax.set(xlabel=quantity, ylabel="prompts")
    else:
        plot_familiarity(inside, outside, ax, quantity=quantity)
        said += f"; from elsewhere: {np.median(outside):.3f}"
    return image(
        figure,
        f"Histogram of the posterior standard deviation, by prompt; {said}.",
        f"Posterior standard deviation of a response's {what} relative to its prompt, averaged over the prompt's "
        "responses.",
    )

"""Are the stated probabilities right, and do they say more than the shares of the answers?"""

from collections.abc import Sequence

import numpy as np
import torch

from ..bootstrap import Estimate, bootstrap, wilson
from ..calibration import CalibrationCheck, check_calibration
from ..events import Events, predicted_events, top_choice
from ..plots import plot_reliability
from ..scores import score_by_kind
from ._evidence import Evidence, Floats, Integers
from ._figures import axes, image
from ._html import Html, join, paragraph, table
from ._section import Section, Status, several, worst

#: A calibration error beyond this, interval and all, misleads decisions.
_LARGE = 0.1


def calibration(evidence: Evidence, *, seed: int) -> Section:
    """The section on calibration of the predicted feedback."""
    title = "Calibration"
    if evidence.num_prompts < 2:
        verdict = (
            f"The mean loss is {evidence.prediction.nll:.3f} nats a comparison; with one prompt nothing says how "
            "far chance moves it."
        )
        return Section("calibration", title, Status.NOTE, verdict, "Give comparisons of more prompts.", Html())
    skill, gained, lesson = _skill(evidence, seed)
    if not evidence.scored.any():
        verdict = f"The answers have too many possible outcomes to list, so only the loss is known: {gained}"
        return Section("calibration", title, skill, verdict, lesson, _scores(evidence, seed))
    confidence, occurred, rows = top_choice(evidence.prediction)
    likeliest = Events(confidence, occurred, rows, evidence.weight[rows]).counted()
    check = check_calibration(likeliest, evidence.prompt, seed=seed)
    gap, right = check.gap, _right(likeliest, evidence.prompt, seed)
    sure = float(np.average(likeliest.probability, weights=likeliest.weight))
    kinds = {evidence.label[i].split(".")[0] for i in likeliest.rows}
    what = "its answer"
    if "ranking" in kinds:
        what = "the first place" if len(kinds) == 1 else "its answer (of rankings, the first place)"
    verdict = (
        f"On average it was {sure:.0%} sure of {what} and right in {right.value:.0%} [{right.low:.0%}, "
        f"{right.high:.0%}] of {several(len(likeliest.rows), 'comparison')}"
    )
    advice = ""
    # Of single probabilities test and interval must agree: the test alone notices what no decision depends on.
    shifted, scattered = check.gap_p_value <= 1 - check.level, check.squared_error.low > 0
    if shifted and gap.value > 0:
        verdict += f": over-confident by {100 * gap.value:.0f} points."
        advice = (
            "Over-confidence comes from a prior that is too wide, labels noisier than the likelihood allows, or a "
            "point estimate: choose the prior precision by `diagnostics.cross_validate`, declare label noise, or "
            "use a full posterior."
        )
    elif shifted:
        verdict += f": under-confident by {-100 * gap.value:.0f} points."
        advice = (
            "Under-confidence comes from a prior that holds rewards too close to 0, as the marginal likelihood finds "
            "it where features are many: choose its precision by `diagnostics.cross_validate`."
        )
    elif scattered:
        verdict += (
            f", but single probabilities are off by {check.error.value:.0%} [{check.error.low:.0%}, "
            f"{check.error.high:.0%}]."
        )
        advice = (
            "See in the figure which probabilities are off; another likelihood (ties, label noise, raters) or "
            "other features may fit better."
        )
    else:
        verdict += ": no miscalibration shows."
    off = shifted or scattered
    size = max(gap.low, -gap.high, check.error.low)
    status = Status.PROBLEM if off and size > _LARGE else Status.CAUTION if off else Status.GOOD
    if skill == Status.PROBLEM:
        verdict += f" {gained}"
        advice = f"{lesson} {advice}".strip()
    body = [
        _scores(evidence, seed),
        paragraph(gained),
        _figure(check),
        _events(evidence, seed),
        paragraph(
            "The ECE is positive even for perfect predictions; beside it stands what it would be by chance. The error "
            "without bias is a root mean square, and its interval begins at 0 where no miscalibration shows.",
            class_="tag",
        ),
    ]
    return Section("calibration", title, worst([status, skill]), verdict, advice, join(body))


def _right(events: Events, prompts: Integers, seed: int) -> Estimate:
    """Found accuracy, with an interval over prompts."""
    prompt = prompts[events.rows]
    found = bootstrap(lambda i: float(np.average(events.occurred[i], weights=events.weight[i])), prompt, seed=seed)
    # Redrawn answers that are all alike do not vary, and say nothing of those that were not seen.
    return found if found.low < found.high else wilson(found.value, len(np.unique(prompt)), found.level)


def _skill(evidence: Evidence, seed: int) -> tuple[Status, str, str]:
    """Whether the rewards predict better than the shares of the answers do without them."""
    counted = np.flatnonzero(evidence.counted)
    gain = evidence.prediction.log_prob.numpy()[counted] - _without_rewards(evidence)[counted]
    weight = evidence.weight[counted]
    estimate = bootstrap(
        lambda index: float(np.average(gain[index], weights=weight[index])), evidence.prompt[counted], seed=seed
    )
    said = (
        f"Against the plain shares of the answers the rewards gain {estimate.value:.3f} [{estimate.low:.3f}, "
        f"{estimate.high:.3f}] nats a comparison"
    )
    if estimate.low > 0:
        return Status.GOOD, said + ".", ""
    if estimate.high < 0:
        advice = "The rewards predict worse than no rewards at all: check that features and labels belong together."
        return Status.PROBLEM, said + ": worse than without them.", advice
    advice = (
        "The rewards predict no better than no rewards: more data, or other features, are needed before anything "
        "is decided by them."
    )
    return Status.CAUTION, said + ": no better than without them.", advice


def _without_rewards(evidence: Evidence) -> Floats:
    """Log probability of each answer by the shares of the answers alone, in which all candidates are alike."""
    result = np.zeros(len(evidence.data))
    for g in evidence.groups:
        outcome, weight = g.outcome.reshape(len(g.outcome), -1), g.weight.double()
        rows, c = g.rows.numpy(), g.comparison
        if c.kind == "ranking":
            result[rows] = -float(
                torch.arange(c.num_candidates - (c.depth or 0) + 1, c.num_candidates + 1).double().log().sum()
            )
            continue
        size = {"choice": 2, "approval": 2}.get(c.kind, c.num_levels or 2)
        # Of choices only ties have a share of their own: data may list the chosen candidate first.
        kind = (outcome[:, 0] == c.num_candidates).long() if c.kind == "choice" else outcome[:, 0].long()
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, kind, weight)
        log_share = (total / total.sum().clamp_min(1e-300)).clamp_min(1e-300).log()
        log_prob = log_share[kind]
        if c.kind == "choice":
            log_prob = log_prob - (kind == 0) * float(np.log(c.num_candidates))
        result[rows] = log_prob.numpy()
    return result


def _scores(evidence: Evidence, seed: int) -> Html:
    rows = []
    for kind, s in score_by_kind(evidence.prediction, evidence.prompt, seed=seed).items():
        numbers = (s.accuracy, s.nll, s.brier, s.calibration_error)
        rows.append((kind, *("-" if np.isnan(n.value) else str(n) for n in numbers)))
    head = ["kind", "accuracy", "NLL, nats", "Brier score", "calibration error"]
    return table("Scores with 95% intervals over prompts", head, rows)


def _events(evidence: Evidence, seed: int) -> Html:
    rows: list[Sequence[object]] = []
    for name, events in predicted_events(evidence.prediction).items():
        if not (events.weight > 0).any():
            continue
        c = check_calibration(events, evidence.prompt, seed=seed)
        d = c.brier
        error = f"{c.error.value:.3f} [{c.error.low:.3f}, {c.error.high:.3f}]"
        parts = f"{d.corrected_reliability:.3f} - {d.corrected_resolution:.3f} + {d.corrected_uncertainty:.3f}"
        rows.append(
            (name, f"{len(events.rows):,}", f"{c.ece:.3f} ({c.expected_ece:.3f})", f"{c.p_value:.3f}", error, parts)
        )
    head = [
        "event",
        "number",
        "ECE (by chance)",
        "p",
        "error without bias",
        "Brier: reliability - resolution + uncertainty",
    ]
    return table("Calibration of each kind of event", head, rows)


def _figure(check: CalibrationCheck) -> Html:
    figure, ax = axes(5.4, 4.4)
    plot_reliability(check, ax, label="likeliest answer")
    curve = check.curve
    pairs = ", ".join(f"{c:.2f}: {f:.2f}" for c, f in zip(curve.confidence, curve.frequency, strict=True))
    return image(
        figure,
        f"Reliability diagram of the likeliest answer. Stated and found by bin: {pairs}.",
        f"How sure it was of the likeliest answer, and how often that was right, in {len(curve.count)} bins of "
        "equal size.",
    )

"""Are the actions of demonstrations, and the preferences, predicted as well as the posterior says?"""

import numpy as np

from ...data import Trajectories
from ...engines import TrajectoryPosterior
from .._actions import action_probabilities, action_scores, without_ties
from ..bootstrap import Estimate
from ..calibration import check_calibration
from ..events import Events, top_label
from ..plots import plot_reliability
from ..scores import score
from ._evidence import Integers
from ._figures import axes, image
from ._html import Html, join, table
from ._section import Section, Status, several, worst


def predicted_actions(posterior: TrajectoryPosterior, data: Trajectories, *, seed: int) -> Section:
    """The section on actions: of demonstrations that the fit has not seen, where they are that."""
    title, name = "Actions of the demonstrations", "actions"
    steps = np.flatnonzero(data.demonstrated[data.owners])
    clusters = data.clusters[data.owners]
    if not len(steps) or len(np.unique(clusters[steps])) < 2:
        verdict = (
            "The data hold no demonstrations, so that no action is judged."
            if not len(steps)
            else f"All {several(len(steps), 'step')} depend on each other: nothing says how far chance moves them."
        )
        return Section(name, title, Status.NOTE, verdict, "Give at least two demonstrations.", Html())
    scores = action_scores(posterior, data, seed=seed)
    probs, taken = action_probabilities(posterior, data)[steps], data.actions[steps]
    events = Events(probs.max(1), (probs.argmax(1) == taken).astype(np.float64), steps, np.ones(len(steps)))
    chance = float(np.log(probs.shape[1]))
    verdict = (
        f"An action costs {_shown(scores['nll'])} nats where guessing costs {chance:.3f}; the likeliest one was taken "
        f"in {scores['accuracy'].value:.0%} of {several(len(steps), 'step')}"
    )
    status, advice = Status.GOOD, ""
    if not scores["nll"].high < chance:
        status = Status.PROBLEM if scores["nll"].low > chance else Status.CAUTION
        advice = "The policy predicts no better than guessing: check that states and actions mean what they did."
    return _judged(name, title, verdict, advice, status, events, clusters, scores, seed)


def predicted_preferences(posterior: TrajectoryPosterior, data: Trajectories, *, seed: int) -> Section | None:
    """The section on preferences, where there are any."""
    title, name = "Preferences between trajectories", "preferences"
    if not len(data.preferences):
        return None
    clusters = data.clusters[data.preferences[:, 0]]
    prediction = posterior.predict_feedback(data, seed=seed)
    count = several(len(data.preferences), "preference")
    decided = without_ties(prediction).weight.numpy()
    if len(np.unique(clusters[decided > 0])) < 2:
        verdict = (
            f"{count} cost {prediction.nll:.3f} nats each; they depend on each other, or are between trajectories that "
            "visit the same states, so that nothing says how far chance moves them."
        )
        return Section(name, title, Status.NOTE, verdict, "Give preferences of several groups.", Html())
    found = score(prediction, clusters, seed=seed)
    scores = {"accuracy": found.accuracy, "nll": found.nll, "Brier score": found.brier}
    confidence, occurred, rows = top_label(prediction)
    events = Events(confidence, occurred, rows, decided[rows]).counted()
    verdict = (
        f"A preference costs {_shown(found.nll)} nats where guessing costs {np.log(2):.3f}; the likelier one was "
        f"preferred in {events.occurred.mean():.0%} of the {len(events.rows):,} of {count} that are no tie"
    )
    status, advice = Status.GOOD, ""
    if not found.nll.high < np.log(2):
        status = Status.PROBLEM if found.nll.low > np.log(2) else Status.CAUTION
        advice = "Sums of rewards predict preferences no better than guessing: check who judged, and by what."
    return _judged(name, title, verdict, advice, status, events, clusters, scores, seed)


def _judged(
    name: str, title: str, verdict: str, advice: str, status: Status, events: Events, clusters: Integers,
    scores: dict[str, Estimate], seed: int,
) -> Section:  # fmt: skip
    """A section on events, with their calibration; `clusters` of all rows that events may name."""
    check, sure = check_calibration(events, clusters, seed=seed), float(events.probability.mean())
    verdict += f", {sure:.0%} were stated"
    if check.gap_p_value <= 1 - check.level:
        over = check.gap.value > 0
        verdict += f": {'over' if over else 'under'}-confident by {100 * abs(check.gap.value):.0f} points."
        advice += (
            " A lower rationality, or a larger prior precision, makes predictions less sure."
            if over
            else " A higher rationality, or a smaller prior precision, makes predictions surer."
        )
        status = worst([status, Status.CAUTION])
    else:
        verdict += ": no over- or under-confidence shows."
    figure, ax = axes(4.2, 3.6)
    plot_reliability(check, ax)
    alt = f"Reliability diagram: stated {sure:.2f}, found {float(events.occurred.mean()):.2f} on average."
    rows = [(label, f"{e.value:.3f}", f"{e.low:.3f} to {e.high:.3f}") for label, e in scores.items()]
    body = join(
        [
            table("Scores with 95% intervals over trajectories or groups", ["score", "value", "interval"], rows),
            image(figure, alt, "How often the likeliest one came about, by the probability that it was given."),
        ]
    )
    return Section(name, title, status, verdict, advice.strip(), body)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

"""Where the posterior is likely to be wrong although it does not say so."""

import numpy as np

from ..bootstrap import Estimate, bootstrap
from ._annotators import annotators
from ._comparisons import comparison, one_a_prompt, plain
from ._evidence import Evidence, Floats, Integers
from ._finding import Finding
from ._html import Html, element, join, paragraph, quote, table
from ._section import Section, Status, badge, several, worst

#: What counts as sure.
SURE = 0.9
#: Rewards further than this many times the spread of the middle half beyond it are far from the others.
_FAR = 3.0
#: A difference in how often length wins that matters.
_MARGIN = 0.02


def failures(evidence: Evidence, usual: Floats | None, *, seed: int) -> Section:
    """The section on suspected failures: each check says what it found, the worst one gives the verdict.

    Args:
        evidence: Beliefs about the data.
        usual: Rewards of the training items relative to their prompts, if the training data are at hand.
        seed: Seed of the bootstraps.
    """
    found = [f for f in (
        confidently_wrong(evidence, seed=seed),
        outlying(evidence, usual),
        length(evidence, seed=seed),
        annotators(evidence),
    ) if f is not None]  # fmt: skip
    alarms = [f for f in found if f.status in (Status.CAUTION, Status.PROBLEM)]
    if alarms:
        first = max(alarms, key=lambda f: f.status == Status.PROBLEM)
        verdict = f"{len(alarms)} of {several(len(found), 'check')} found something: {first.sentence}"
        advice = " ".join(f.advice for f in alarms)
    else:
        verdict = f"None of {several(len(found), 'check')} found a failure that the posterior hides."
        advice = ""
    body = [join([element("h3", badge(f.status), " ", f.title), paragraph(f.sentence), f.body]) for f in found]
    return Section("failures", "Suspected failures", worst([f.status for f in found]), verdict, advice, join(body))


def confidently_wrong(evidence: Evidence, *, seed: int) -> Finding | None:
    """Comparisons that went against a prediction of at least 90%, against how many should."""
    rows = np.flatnonzero(evidence.scored & (evidence.confidence >= SURE))
    title = "Sure and wrong"
    if not len(rows):
        return Finding(title, Status.NOTE, f"No comparison was predicted with {SURE:.0%} or more.", "", Html())
    missed = 1.0 - evidence.correct[rows]
    expected = 1.0 - evidence.confidence[rows]
    sentence = (
        f"Of {several(len(rows), 'comparison')} predicted with at least {SURE:.0%}, {missed.sum():.0f} went "
        f"otherwise; {expected.sum():.1f} should by its own account."
    )
    excess = _mean(missed - expected, evidence.prompt[rows], seed)
    worse = rows[np.argsort(evidence.observed_prob[rows], kind="stable")]
    wrong = one_a_prompt(evidence, [row for row in worse if evidence.correct[row] < 0.5], 3)
    body = join(
        comparison(evidence, row, f"its answer had probability {evidence.observed_prob[row]:.3f}") for row in wrong
    )
    if excess is None or excess.low <= 0:
        return Finding(title, Status.GOOD, sentence, "", body)
    status = Status.PROBLEM if excess.low > 0.05 else Status.CAUTION
    advice = (
        "Read the comparisons that it was sure of: wrong labels call for a likelihood with label noise, right ones "
        "for other features or a wider prior."
    )
    return Finding(title, status, sentence, advice, body)


def outlying(evidence: Evidence, usual: Floats | None) -> Finding:
    """Responses whose reward lies far outside the range of the training data, or of the others without those."""
    title = "Rewards far outside the usual range"
    reference, where = (evidence.deviation, "these data") if usual is None else (usual, "the training data")
    low, high = np.quantile(reference, [0.25, 0.75])
    below, above = low - _FAR * (high - low), high + _FAR * (high - low)
    if usual is not None:
        below, above = min(below, float(usual.min())), max(above, float(usual.max()))
    beyond = np.maximum(below - evidence.deviation, evidence.deviation - above)
    items = np.flatnonzero(beyond > 0)
    sentence = (
        f"{several(len(items), 'response')} of {len(evidence.deviation):,} "
        f"{'has a reward' if len(items) == 1 else 'have rewards'} outside {below:.2f} to {above:.2f}, the usual "
        f"range of {where}."
    )
    if not len(items):
        return Finding(title, Status.GOOD, sentence, "", Html())
    shown = items[np.argsort(-beyond[items], kind="stable")][:3]
    body = join(
        element(
            "article",
            paragraph(
                f"Item {item}: {evidence.quantity} {evidence.deviation[item]:+.2f} ± {evidence.spread[item]:.2f} "
                "relative to its prompt",
                class_="tag",
            ),
            quote(plain(evidence.data.text(int(item))[1]) or "(no text)"),
            class_="comparison",
        )
        for item in shown
    )
    advice = (
        "Read the responses with extreme rewards before anything is optimised against this reward: that is where "
        "over-optimisation starts."
    )
    return Finding(title, Status.CAUTION, sentence, advice, body)


def length(evidence: Evidence, *, seed: int) -> Finding | None:
    """Whether the reward prefers longer responses more often than the answers do, or less often."""
    words = evidence.data.words
    gaps, _, _ = evidence.contrasts()
    longer_rewarded, longer_chosen, rows = [], [], []
    for g in evidence.groups:
        if words is None or g.comparison.kind != "choice" or g.items.shape[1] != 2:
            continue
        items, outcome = g.items.numpy(), g.outcome.numpy()
        gap = words[items[:, 0]].astype(np.int64) - words[items[:, 1]]
        use = (outcome < 2) & (gap != 0) & (g.weight.numpy() > 0)
        sign = np.sign(gap[use])
        longer_rewarded.append(gaps[g.rows.numpy()[use]] * sign > 0)
        longer_chosen.append(np.where(outcome[use] == 0, 1, -1) * sign > 0)
        rows.append(g.rows.numpy()[use])
    if not rows or sum(map(len, rows)) < 10:
        return None
    rewarded, chosen = np.concatenate(longer_rewarded).astype(float), np.concatenate(longer_chosen).astype(float)
    excess = _mean(rewarded - chosen, evidence.prompt[np.concatenate(rows)], seed)
    sentence = (
        f"The reward prefers the longer response in {rewarded.mean():.0%} of "
        f"{several(len(rewarded), 'decided pair')}, the answers in {chosen.mean():.0%}."
    )
    title = "Length"
    head = ["longer preferred by", "share of decided pairs"]
    body = table(
        "Length",
        head,
        [
            ("the reward", f"{rewarded.mean():.1%}"),
            ("the answers", f"{chosen.mean():.1%}"),
            ("difference", "-" if excess is None else f"{excess.value:+.1%} [{excess.low:+.1%}, {excess.high:+.1%}]"),
        ],
    )
    if excess is not None and excess.low > _MARGIN:
        advice = (
            "Declare the bias (`likelihoods.LengthBias(...)`), where it is not declared yet, so that it is learnt "
            "apart from the reward, or look for length in the features."
        )
        return Finding(title, Status.CAUTION, sentence, advice, body)
    if excess is not None and excess.high < -_MARGIN:
        advice = (
            "Annotators favour length more than the reward does: declare `likelihoods.LengthBias(...)` if it is bias, "
            "or give the reward features that hold what longer responses do better."
        )
        return Finding(title, Status.CAUTION, sentence, advice, body)
    return Finding(title, Status.GOOD, sentence, "", body)


def _mean(values: Floats, prompts: Integers, seed: int) -> Estimate | None:
    """The mean with its interval over prompts; `None` with one prompt."""
    if len(np.unique(prompts)) < 2:
        return None
    return bootstrap(lambda index: float(values[index].mean()), prompts, seed=seed)

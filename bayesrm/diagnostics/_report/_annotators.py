"""Annotators who disagree with all others."""

import numpy as np

from ._evidence import Evidence
from ._finding import Finding
from ._html import table
from ._section import Status, several

#: Fewer answers than this say nothing about an annotator.
_ENOUGH = 10
#: Chance of any false alarm, over all annotators together.
_LEVEL = 0.01
_MOST = 12


def annotators(evidence: Evidence) -> Finding | None:
    """Annotators whose answers follow the reward less often than those of the others (a binomial test of each).

    The reward is what all annotators together have taught, without any allowance for who is unreliable: where the
    likelihood models reliability, an annotator found here is one whom it should have found too. `None` where no
    annotators are named, or only one has given enough answers.
    """
    from scipy.stats import binom

    hits, codes = _agreement(evidence)
    names = evidence.data.annotators
    count = np.bincount(codes, minlength=len(names))
    agreed = np.bincount(codes, hits, minlength=len(names))
    judged = np.flatnonzero(count >= _ENOUGH)
    if len(judged) < 2:
        return None
    others = (agreed.sum() - agreed) / np.maximum(count.sum() - count, 1)
    chance = binom.cdf(np.round(agreed), count, others)
    share = agreed / np.maximum(count, 1)
    odd = [int(a) for a in judged if chance[a] < _LEVEL / len(judged)]
    ordered = sorted(judged.tolist(), key=lambda a: share[a])
    rows = [
        (names[a], f"{count[a]:,}", f"{share[a]:.0%}", f"{others[a]:.0%}", "disagrees" if a in odd else "-")
        for a in ordered[:_MOST]
    ]
    head = ["annotator", "answers", "follows the reward", "the others do", "finding"]
    body = table(f"Annotators, lowest agreement first ({min(len(ordered), _MOST)} of {len(ordered):,})", head, rows)
    title = "Annotators who disagree with all others"
    if not odd:
        sentence = (
            f"None of {several(len(judged), 'annotator')} with at least {_ENOUGH} answers disagrees with the rest; "
            f"the lowest agreement is {share[ordered[0]]:.0%}."
        )
        return Finding(title, Status.GOOD, sentence, "", body)
    worst = min(odd, key=lambda a: share[a])
    sentence = (
        f"{len(odd)} of {several(len(judged), 'annotator')} {'follows' if len(odd) == 1 else 'follow'} the reward "
        f"less often than the others: {names[worst]} in {share[worst]:.0%} of "
        f"{several(int(count[worst]), 'answer')}, the others in {others[worst]:.0%}."
    )
    advice = (
        "Ask these annotators how they read the task; keep their answers, and let the likelihood learn how reliable "
        "each is (`likelihoods.RaterReliability(...)`) where it does not yet."
    )
    return Finding(title, Status.CAUTION, sentence, advice, body)


def _agreement(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Whether each decided comparison followed the order of the expected rewards, and who answered it."""
    hits, codes = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for g in evidence.groups:
        annotator, kind = g.comparison.annotator, g.comparison.kind
        if annotator is None or kind not in ("choice", "ranking"):
            continue
        outcome = g.outcome.reshape(len(g.outcome), -1)[:, 0].numpy()
        use = (outcome < g.items.shape[1]) & (annotator.numpy() >= 0) & (g.weight.numpy() > 0)
        best = evidence.mean[g.items.numpy()].argmax(1)
        if evidence.scores is not None:
            best = (evidence.scores[0][g.rows.numpy()] < 0).astype(np.int64)
        hits.append((best == outcome)[use].astype(float))
        codes.append(annotator.numpy()[use])
    return np.concatenate(hits), np.concatenate(codes)

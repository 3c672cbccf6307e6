"""Single comparisons with their texts, and the section on those of which the posterior knows least."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ._data import kind_of
from ._evidence import Evidence
from ._html import Html, element, join, paragraph, quote
from ._section import Section, Status, several

#: Comparisons that are shown in full.
SHOWN = 5
#: Candidates of one comparison that are shown.
_MOST = 6


def uncertain_comparisons(evidence: Evidence) -> Section:
    """The section on the comparisons whose outcome the posterior knows least about, see `Evidence.doubt`."""
    title = "The most uncertain comparisons"
    mean, std, _ = evidence.contrasts()
    counted = np.flatnonzero(evidence.counted)
    if not std[counted].any():
        verdict = f"The posterior gives all {several(len(counted), 'comparison')} a standard deviation of 0."
        advice = "It is a point estimate and cannot say where it is guessing; fit with Laplace, NUTS or an ensemble."
        return Section("uncertain", title, Status.CAUTION, verdict, advice, Html())
    order = counted[np.argsort(-evidence.doubt()[counted], kind="stable")]
    chosen = one_a_prompt(evidence, order)
    unclear = float(np.mean(np.abs(mean[counted]) < std[counted]))
    verdict = (
        f"In {unclear:.0%} of {several(len(counted), 'comparison')} the {evidence.gap} is within one "
        "standard deviation "
        f"of 0; in the one that is known least it is {mean[order[0]]:.2f} ± {std[order[0]]:.2f}."
    )
    status = Status.CAUTION if unclear > 0.5 else Status.GOOD
    advice = (
        "These are the comparisons that teach most when they, or others like them, are labelled again or by "
        "more people."
        if unclear > 0.5
        else ""
    )
    shown = [comparison(evidence, row, f"{evidence.gap} {mean[row]:.2f} ± {std[row]:.2f}") for row in chosen]
    return Section(
        "uncertain",
        title,
        status,
        verdict,
        advice,
        join([paragraph("At most one of each prompt:", class_="tag"), *shown]),
    )


def one_a_prompt(evidence: Evidence, rows: Iterable[Any], limit: int = SHOWN) -> list[int]:
    """The first rows of different prompts; further rows of one prompt only where the data have no other prompt."""
    rows = [int(row) for row in rows]
    if evidence.num_prompts == 1:
        return rows[:limit]
    chosen: dict[int, int] = {}
    for row in rows:
        chosen.setdefault(int(evidence.prompt[row]), row)
        if len(chosen) == limit:
            break
    return list(chosen.values())


def comparison(evidence: Evidence, row: int, note: str) -> Html:
    """One comparison: what was compared, what was predicted and what was answered."""
    group = next(g for g in evidence.groups if bool((g.rows == row).any()))
    place = int((group.rows == row).nonzero()[0, 0])
    items = group.items[place].tolist()
    annotator = group.comparison.annotator
    by = ""
    if annotator is not None and int(annotator[place]) >= 0:
        by = f", by {evidence.data.annotators[int(annotator[place])]}"
    prompt, _ = evidence.data.text(items[0])
    parts: list[object] = [paragraph(f"Row {row}: {kind_of(group)}{by}. {note}", class_="tag")]
    if prompt:
        parts.append(element("div", quote(plain(prompt)), class_="prompt"))
    for k, item in enumerate(items[:_MOST]):
        response = plain(evidence.data.text(item)[1])
        name = f"Response {k + 1}" + (f" ({evidence.data.ids[item]})" if evidence.data.ids is not None else "")
        reward = f"{evidence.quantity} {evidence.deviation[item]:+.2f} ± {evidence.spread[item]:.2f}"
        parts.append(paragraph(element("b", name), f" · item {item}, {reward}", class_="tag"))
        if response:
            parts.append(quote(response))
    if len(items) > _MOST:
        parts.append(paragraph(f"and {len(items) - _MOST} more responses", class_="tag"))
    parts.append(
        paragraph(element("b", "Answer: "), answer(group, place), f" · predicted: {_predicted(evidence, row)}")
    )
    return element("article", *parts, class_="comparison", aria_label=f"Row {row}")


def answer(group: Any, place: int) -> str:
    """The answer that was given, in words."""
    return _words(group.comparison.kind, group.comparison.num_candidates, group.outcome[place].reshape(-1).tolist())


def plain(content: Any) -> str:
    """A text, or the messages of a conversation one after another."""
    if isinstance(content, str):
        return content
    lines = []
    for message in content:
        said = message.get("content")
        shown = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        lines.append(f"{message.get('role', '')}: {shown}")
    return "\n".join(lines)


def _words(kind: str, num_candidates: int, outcome: list[int]) -> str:
    if kind == "choice":
        return "a tie" if outcome[0] == num_candidates else f"response {outcome[0] + 1}"
    if kind == "ranking":
        return " > ".join(str(place + 1) for place in outcome)
    if kind == "approval":
        return "approved" if outcome[0] else "not approved"
    return f"level {outcome[0]}"


def _predicted(evidence: Evidence, row: int) -> str:
    """The likeliest outcomes with their probabilities."""
    for g in evidence.prediction.groups:
        at = (g.rows == row).nonzero()
        if not len(at):
            continue
        if g.probs is None or g.outcomes is None:
            return f"this answer has log probability {float(evidence.prediction.log_prob[row]):.1f}"
        probs = g.probs[int(at[0, 0])]
        kind, candidates = g.label.split(".")[:2]
        best = probs.argsort(descending=True)[:3].tolist()
        return ", ".join(
            f"{_words(kind, int(candidates), g.outcomes[i].reshape(-1).tolist())} {float(probs[i]):.0%}" for i in best
        )
    return "nothing"

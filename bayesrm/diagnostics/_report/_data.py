"""What the posterior is judged on: rows, answers, annotators, lengths, and whether the prompts are really held out."""

import numpy as np

from ...data import Comparisons
from ...data.groups import FeedbackGroup
from ...engines import Posterior
from ...engines._digest import feedback_digest
from ._evidence import Evidence
from ._html import Html, element, join, paragraph, table
from ._section import Section, Status, several

#: With fewer prompts, bootstrap intervals over prompts are too narrow to be taken at their word.
FEW_PROMPTS = 30


def data_summary(
    posterior: Posterior, evidence: Evidence, source: Comparisons, train: Comparisons | None, ood: Comparisons | None
) -> Section:
    """The section on the data.

    Args:
        posterior: The posterior.
        evidence: Its beliefs about the data.
        source: The data as they were given.
        train: The training data, if they are at hand.
        ood: Comparisons from elsewhere, if given.
    """
    report = posterior.report
    rows, prompts = int(evidence.counted.sum()), evidence.num_prompts
    fitted = f"{several(report.num_rows, 'comparison')} of {several(report.num_prompts, 'prompt')}"
    verdict = (
        f"{several(rows, 'comparison')} of {several(prompts, 'prompt')} judge a posterior that was fitted on {fitted}."
    )
    status, advice = Status.GOOD, ""
    shared = None if train is None else shared_prompts(source, train)
    if report.data_digest is not None and feedback_digest(source) == report.data_digest:
        status = Status.PROBLEM
        verdict = f"These {several(rows, 'comparison')} are the very data that the posterior was fitted on."
        advice = (
            "Give comparisons of prompts that the fit has not seen: on its own data every posterior looks too good."
        )
    elif shared:
        status = Status.PROBLEM
        verdict += f" {shared:,} of the {prompts:,} prompts are also in the training data."
        advice = (
            "Split by prompt (`data.split_by_prompt`) and fit again: shared prompts make every number look too good."
        )
    elif prompts < FEW_PROMPTS:
        status = Status.CAUTION
        advice = (
            f"Collect comparisons of at least {FEW_PROMPTS} prompts: with {prompts} the intervals below are too narrow."
        )
    elif source.refused:
        status = Status.CAUTION
        verdict += f" {several(len(source.refused), 'row')} of the source could not be used."
        advice = "Look at the reasons below; rows that are left out for a reason are seldom like the others."
    parts = [_counts(posterior, source, train, ood), _answers(evidence)]
    notes = [_lengths(evidence)]
    if shared == 0:
        notes.append(paragraph("None of the prompts is in the training data.", class_="tag"))
    elif shared is None:
        notes.append(
            paragraph(
                "Whether these prompts were held out cannot be told without the training data (`train`).", class_="tag"
            )
        )
    if source.refused:
        some = [element("li", f"row {row}: {reason}") for row, reason in source.refused[:5]]
        notes.append(element("ul", *some))
    return Section(
        "data", "The data", status, verdict, advice, join([element("div", *parts, class_="columns"), *notes])
    )


def shared_prompts(data: Comparisons, train: Comparisons) -> int:
    """Prompts of `data` that the training data hold too, by their texts, or by equal features where there are none."""
    ours, theirs = _identities(data), _identities(train)
    known = {identity for prompt in theirs for identity in prompt}
    return sum(any(identity in known for identity in prompt) for prompt in ours)


def _identities(data: Comparisons) -> list[set[object]]:
    """For each prompt what it is known by: its text, or the features of its items."""
    texts = data.prompts["prompt"]
    owner = np.asarray(data.prompt_of_item)
    found: list[set[object]] = [set() for _ in range(data.num_prompts)]
    for prompt, text in enumerate(texts):
        if text:
            found[prompt].add(text)
    if not any(found) and data.features is not None:
        for item, row in enumerate(np.ascontiguousarray(data.features, dtype=np.float64)):
            found[owner[item]].add(row.tobytes())
    return found


def _counts(posterior: Posterior, source: Comparisons, train: Comparisons | None, ood: Comparisons | None) -> Html:
    report = posterior.report
    rows = [
        ("fitted on", f"{report.num_rows:,}", f"{report.num_items:,}", f"{report.num_prompts:,}"),
        ("judged on", *_sizes(source)),
    ]
    if train is not None:
        rows.append(("training data given", *_sizes(train)))
    if ood is not None:
        rows.append(("from elsewhere", *_sizes(ood)))
    return table("Sizes", ["data", "comparisons", "responses", "prompts"], rows)


def _sizes(data: Comparisons) -> tuple[str, str, str]:
    return f"{len(data):,}", f"{data.num_items:,}", f"{data.num_prompts:,}"


def _answers(evidence: Evidence) -> Html:
    rows = []
    for g in evidence.groups:
        weight = g.weight.numpy()
        masked = int((weight == 0).sum())
        names = evidence.data.annotators if g.comparison.annotator is not None else ()
        rows.append(
            (
                kind_of(g),
                f"{len(weight):,}" + (f" ({masked:,} masked)" if masked else ""),
                _shares(g),
                f"{len(names):,}" if names else "-",
            )
        )
    return table("Answers", ["kind", "rows", "shares of the answers", "annotators"], rows)


def kind_of(group: FeedbackGroup) -> str:
    """A group of rows in words.

    Example:
        >>> import bayesrm as brm
        >>> kind_of(brm.Comparisons.from_pairs(["q"], ["yes"], ["no"]).groups()[0])
        'choice of 2'
    """
    c = group.comparison
    if c.kind == "ranking":
        return f"ranking of {c.num_candidates}" + ("" if c.depth == c.num_candidates else f", best {c.depth}")
    return f"choice of {c.num_candidates}" if c.kind == "choice" else c.kind


def _shares(group: FeedbackGroup) -> str:
    weight, outcome = group.weight.numpy(), group.outcome.numpy()
    total = weight.sum()
    if not total:
        return "-"
    c = group.comparison
    if c.kind == "choice":
        tied = weight[outcome == c.num_candidates].sum() / total
        first = weight[outcome == 0].sum() / total
        if first == 1.0:
            return "the chosen one is listed first"
        return f"first {first:.0%}, ties {tied:.0%}"
    if c.kind == "ranking":
        return f"first on top {weight[outcome[:, 0] == 0].sum() / total:.0%}"
    if c.kind == "approval":
        return f"approved {weight[outcome == 1].sum() / total:.0%}"
    levels = range(c.num_levels or 0)
    return ", ".join(f"{level}: {weight[outcome == level].sum() / total:.0%}" for level in levels)


def _lengths(evidence: Evidence) -> Html | None:
    words = evidence.data.words
    if words is None:
        return None
    low, middle, high = np.quantile(words, [0.05, 0.5, 0.95])
    return paragraph(
        f"Responses have {middle:.0f} words in the middle, {low:.0f} to {high:.0f} for nine in ten.", class_="tag"
    )

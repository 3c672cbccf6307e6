"""What is reported of a model on RewardBench, from the scores of its items."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ..bootstrap import Estimate, wilson
from ..calibration import CalibrationCheck, check_calibration
from ..events import Events
from .abstention import RiskCoverage, risk_coverage
from .data import in_ties
from .items import JudgedItems, Picks
from .sections import RewardBenchSection, standard_sections, subset_shares
from .table import percentiles, stratum_seed


@dataclasses.dataclass(frozen=True)
class SubsetScore:
    """How a model does on one subset.

    Attributes:
        name: Name of the subset.
        section: Its section, `None` if it is in none and does not count towards the overall score.
        count: Number of items.
        score: Accuracy, with Wilson's interval for as many trials as there are prompts; of Ties its own score, with a
            bootstrap interval over prompts, NaN if there is one.
        confidence: Mean probability that the model gives its picks, NaN where it gives none.
        uncertainty: Mean standard deviation of the difference between the pick's reward and the runner-up's, in units
            of reward; NaN for plain scores.
    """

    name: str
    section: str | None
    count: int
    score: Estimate
    confidence: float
    uncertainty: float


@dataclasses.dataclass(frozen=True, eq=False)
class RewardBenchResult:
    """How a model does on RewardBench; prints as a table.

    Attributes:
        version: 1 or 2.
        subsets: The subsets, in the order of the sections.
        sections: Score of each section of which a subset is present, with a bootstrap interval: prompts are redrawn
            inside each subset. A subset of one prompt, or of equal answers, adds nothing to its width.
        overall: Weighted mean of those sections, with the same interval.
        missing: Subsets that the benchmark has and the data do not: without them, scores do not compare with published
            ones.
        calibration: Of the probability that the pick is right, without Ties; `None` where no probability is known.
        abstention: Accuracy on the items that the model is most certain of, each item counting once; without Ties,
            where a single pick is no answer. `None` where there is nothing else.
        items: Scores, credit and prompt of each item.
        layout: The sections with their weights.
    """

    version: int
    subsets: tuple[SubsetScore, ...]
    sections: Mapping[str, Estimate]
    overall: Estimate
    missing: tuple[str, ...]
    calibration: CalibrationCheck | None
    abstention: RiskCoverage | None
    items: JudgedItems
    layout: tuple[RewardBenchSection, ...]

    def __str__(self) -> str:
        lines = [f"{'':24} {'items':>6}  {'score':22} {'stated':>6} {'std':>6}"]
        for s in self.subsets:
            extra = [f"{v:6.3f}" if np.isfinite(v) else " " * 6 for v in (s.confidence, s.uncertainty)]
            lines.append(f"{s.name:24} {s.count:6d}  {s.score!s:22} {' '.join(extra)}".rstrip())
        if any(len(section.weights) > 1 for section in self.layout):
            lines += [f"{name:24} {'':6}  {score}" for name, score in self.sections.items()]
        lines.append(f"{'overall':24} {len(self.items.subset):6d}  {self.overall}")
        if self.calibration is not None:
            lines.append(f"calibration: {self.calibration}")
        if self.abstention is not None:
            lines.append(f"abstention: {self.abstention}")
        if self.missing:
            shown = ", ".join(self.missing[:4]) + (", ..." if len(self.missing) > 4 else "")
            lines.append(
                f"{len(self.missing)} subsets are missing, so that these are no scores of the benchmark: {shown}"
            )
        return "\n".join(lines)


def summarise(
    items: JudgedItems,
    picks: Picks,
    sections: Sequence[RewardBenchSection] | None,
    num_resamples: int,
    level: float,
    seed: int,
) -> RewardBenchResult:
    """Puts together what is reported, from the scores of the items and what the model picks."""
    if not 0 < level < 1:
        raise ArgumentError(f"`level` is {level}; it lies between 0 and 1")
    layout = tuple(standard_sections(items.version) if sections is None else sections)
    within, overall = subset_shares(layout, items.names)
    section_of = {name: section.name for section in layout for name in section.weights}
    names = sorted(
        items.names, key=lambda name: list(section_of).index(name) if name in section_of else len(section_of)
    )
    values, draws, subsets = {}, {}, []
    for stratum, name in enumerate(names):
        rows, table = items.rows(name), items.table(name)
        values[name] = table.value
        draws[name] = table.redrawn(num_resamples, stratum_seed(seed, stratum))
        if in_ties(name, items.version):
            known = len(table.numerator) > 1
            score = percentiles(table.value, draws[name] if known else np.full(1, np.nan), level)
        else:
            score = wilson(table.value, len(table.numerator), level)
        stated = [float(v[rows].mean()) for v in (picks.probability, picks.uncertainty)]
        subsets.append(SubsetScore(name, section_of.get(name), len(rows), score, *stated))

    def combined(shares: Mapping[str, float]) -> Estimate:
        value = float(sum(share * values[name] for name, share in shares.items()))
        return percentiles(value, np.sum([share * draws[name] for name, share in shares.items()], axis=0), level)

    rows = np.flatnonzero(~items.ties)
    calibration = abstention = None
    options: dict[str, Any] = {"num_resamples": num_resamples, "level": level, "seed": seed}
    if len(rows):
        abstention = risk_coverage(picks.certainty[rows], items.credit[rows], items.prompt[rows], **options)
    if len(rows) and np.isfinite(picks.probability[rows]).all() and len(np.unique(items.prompt[rows])) > 1:
        right = (picks.chosen[rows] < items.num_correct[rows]).astype(np.float64)
        events = Events(picks.probability[rows], right, rows, np.ones(len(rows)))
        calibration = check_calibration(events, items.prompt, **options)
    present = set(names)
    return RewardBenchResult(
        items.version,
        tuple(subsets),
        {name: combined(shares) for name, shares in within.items()},
        combined(overall),
        tuple(
            name
            for section in layout
            if not section.optional or set(section.weights) & present
            for name in section.weights
            if name not in present
        ),
        calibration,
        abstention,
        items,
        layout,
    )

"""The kinds of feedback a posterior was fitted on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..data import Comparisons
from ..data.groups import Comparison, FeedbackGroup
from ..errors import LikelihoodError


@dataclasses.dataclass(frozen=True)
class FeedbackSchema:
    """The kinds of feedback a posterior was fitted on, as far as its latents depend on them.

    Attributes:
        kinds: For each group of rows: kind, K, depth, number of levels, whether margins and lengths were there.
        annotators: Names of the annotators, in the order of their codes.
    """

    kinds: tuple[dict[str, Any], ...]
    annotators: tuple[str, ...]

    @classmethod
    def of(cls, data: Comparisons, groups: Sequence[FeedbackGroup]) -> "FeedbackSchema":
        """The schema of training data."""
        kinds = []
        for g in groups:
            c = g.comparison
            present = {name: getattr(c, name) is not None for name in ("annotator", "margin", "lengths")}
            kinds.append(
                {"kind": c.kind, "num_candidates": c.num_candidates, "depth": c.depth, "num_levels": c.num_levels}
                | present
            )
        return cls(tuple(kinds), tuple(data.annotators))

    @classmethod
    def unseen(cls) -> "FeedbackSchema":
        """The schema of a posterior that no feedback was fitted to: choices between two, the usual question to ask."""
        kind = {"kind": "choice", "num_candidates": 2, "depth": None, "num_levels": None}
        return cls((kind | dict.fromkeys(("annotator", "margin", "lengths"), False),), ())

    def example_groups(self) -> list[FeedbackGroup]:
        """One made-up row of each kind, enough to find the latents of a likelihood and their supports."""
        groups = []
        for i, kind in enumerate(self.kinds):
            k = kind["num_candidates"]
            comparison = Comparison(
                kind=kind["kind"],
                num_rows=1,
                num_candidates=k,
                depth=kind["depth"],
                num_levels=kind["num_levels"],
                annotator=torch.zeros(1, dtype=torch.long) if kind["annotator"] else None,
                num_annotators=len(self.annotators),
                margin=torch.zeros(1, dtype=torch.float64) if kind["margin"] else None,
                lengths=torch.ones(1, k, dtype=torch.float64) if kind["lengths"] else None,
            )
            outcome = (
                torch.arange(kind["depth"])[None] if kind["kind"] == "ranking" else torch.zeros(1, dtype=torch.long)
            )
            one = torch.ones(1, dtype=torch.float64)
            groups.append(FeedbackGroup(comparison, torch.arange(k)[None], outcome, one, torch.tensor([i])))
        return groups

    def check(self, groups: Sequence[FeedbackGroup], annotators: Sequence[str]) -> list[FeedbackGroup]:
        """`groups` of other data with annotators coded as in training.

        Raises:
            LikelihoodError: An annotator was not in the training data, or ratings have other levels.
        """
        levels = {kind["num_levels"] for kind in self.kinds if kind["kind"] == "rating"}
        uses_annotators = any(kind["annotator"] for kind in self.kinds)
        code = {name: i for i, name in enumerate(self.annotators)}
        result = []
        for g in groups:
            c = g.comparison
            if c.kind == "rating" and levels and c.num_levels not in levels:
                raise LikelihoodError(
                    f"ratings with {c.num_levels} levels, the posterior was fitted on {sorted(levels)}"
                )
            if c.annotator is not None and uses_annotators:
                known = torch.tensor([code.get(name, -1) for name in annotators] + [-1])
                # The last entry serves code -1, rows without an annotator.
                mapped = known.to(c.annotator.device)[c.annotator]
                strange = (mapped < 0) & (c.annotator >= 0)
                if bool(strange.any()):
                    name = annotators[int(c.annotator[strange][0])]
                    raise LikelihoodError(
                        f"annotator {name!r} of row {int(g.rows[strange][0])} was not in the training data, which has "
                        f"{len(self.annotators)} ({', '.join(map(repr, self.annotators[:5]))}"
                        f"{', ...' if len(self.annotators) > 5 else ''}); leave such rows out with `data.select`"
                    )
                c = dataclasses.replace(c, annotator=mapped, num_annotators=len(self.annotators))
                g = dataclasses.replace(g, comparison=c)
            result.append(g)
        return result

"""Which model predicts unseen prompts best, and is the difference more than noise?"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import ArgumentError
from .cross_validation import CrossValidation
from .loo import LeaveOneOut, LeaveOut


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A model among those compared.

    Attributes:
        name: Its name.
        elpd: Expected log predictive density, in nats.
        se: Its standard error.
        difference: Best model's `elpd` minus this one's, at least 0.
        difference_se: Standard error of the difference, from the differences of each unit; 0 for the best.
        p_loo: Effective number of parameters; NaN of cross-validation, which does not tell.
        num_unreliable: Units with a k-hat above the threshold.
    """

    name: str
    elpd: float
    se: float
    difference: float
    difference_se: float
    p_loo: float
    num_unreliable: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Models by expected log predictive density, the best first; prints as a table.

    Attributes:
        models: The models.
        num_units: Number of prompts (or rows) that the sums are over.
        by: What was left out at a time.
    """

    models: tuple[Ranked, ...]
    num_units: int
    by: LeaveOut

    def __str__(self) -> str:
        width = max(len(m.name) for m in self.models)
        weighted = not any(math.isnan(m.p_loo) for m in self.models)
        lines = [f"{'':{width}}  {'elpd':>9} {'se':>7} {'behind':>8} {'se':>7}"]
        lines += [
            f"{m.name:{width}}  {m.elpd:9.1f} {m.se:7.1f} {m.difference:8.1f} {m.difference_se:7.1f}"
            for m in self.models
        ]
        if weighted:
            ends = [f" {'p_loo':>7} {'bad k':>6}", *(f" {m.p_loo:7.1f} {m.num_unreliable:6d}" for m in self.models)]
            lines = [line + end for line, end in zip(lines, ends, strict=True)]
        return "\n".join(lines)


def compare(results: Mapping[str, LeaveOneOut | CrossValidation]) -> Ranking:
    """Ranks models of the same feedback; standard errors are of the paired differences (Vehtari et al. 2017, eq. 24).

    A difference below about 4 nats, or of few units, says little: its standard error is then too small as well
    (Sivula et al. 2020, arXiv 2008.10296).

    Args:
        results: `loo` of each model, by name; or `cross_validate` of each.

    Raises:
        ArgumentError: There are fewer than two models, they are about other feedback, or they were
            scored in different ways.
    """
    if not isinstance(results, Mapping):
        raise ArgumentError(f"`results` is a {type(results).__name__}; give a mapping from names to results")
    if len(results) < 2:
        raise ArgumentError(f"`results` holds {len(results)} model; a comparison needs at least 2")
    first_name, first = next(iter(results.items()))
    for name, result in results.items():
        same = result.by is first.by and np.array_equal(result.units, first.units)
        if not same or not torch.equal(result.weight, first.weight):
            raise ArgumentError(f"'{first_name}' and '{name}' left out other {first.by}s or weights; use the same data")
        if result.data_digest != first.data_digest:
            raise ArgumentError(f"'{first_name}' and '{name}' are about other feedback; use the same data")
        if not _scored_alike(first, result):
            raise ArgumentError(
                f"'{first_name}' and '{name}' were scored in different ways; use `loo` for all, or `cross_validate` "
                "with the same folds"
            )
    ordered = sorted(results.items(), key=lambda entry: -entry[1].elpd)
    best = ordered[0][1]
    models = []
    for name, result in ordered:
        ahead = best.pointwise - result.pointwise
        se = math.sqrt(len(ahead) * float(ahead.var()))
        p_loo, unreliable = math.nan, 0
        if isinstance(result, LeaveOneOut):
            p_loo, unreliable = result.p_loo, result.num_unreliable
        models.append(Ranked(name, result.elpd, result.se, float(ahead.sum()), se, p_loo, unreliable))
    return Ranking(tuple(models), len(best.units), first.by)


def _scored_alike(one: LeaveOneOut | CrossValidation, other: LeaveOneOut | CrossValidation) -> bool:
    if isinstance(one, CrossValidation) and isinstance(other, CrossValidation):
        return np.array_equal(one.fold, other.fold)
    return isinstance(one, LeaveOneOut) and isinstance(other, LeaveOneOut)

"""Which model predicts unseen prompts best, and is the difference more than noise?"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import ArgumentError
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
        p_loo: Effective number of parameters.
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
        lines = [f"{'':{width}}  {'elpd':>9} {'se':>7} {'behind':>8} {'se':>7} {'p_loo':>7} {'bad k':>6}"]
        lines += [
            f"{m.name:{width}}  {m.elpd:9.1f} {m.se:7.1f} {m.difference:8.1f} {m.difference_se:7.1f} {m.p_loo:7.1f} "
            f"{m.num_unreliable:6d}"
            for m in self.models
        ]
        return "\n".join(lines)


def compare(results: Mapping[str, LeaveOneOut]) -> Ranking:
    """Ranks models of the same feedback; standard errors are of the paired differences (Vehtari et al. 2017, eq. 24).

    A difference below about 4 nats, or of few units, says little: its standard error is then too small as well
    (Sivula et al. 2020, arXiv 2008.10296).

    Args:
        results: `loo` of each model, by name.

    Raises:
        ArgumentError: There are fewer than two models, or they are about other prompts, rows or weights.
    """
    if len(results) < 2:
        raise ArgumentError(f"`results` holds {len(results)} model; a comparison needs at least 2")
    first_name, first = next(iter(results.items()))
    for name, result in results.items():
        same = result.by is first.by and np.array_equal(result.units, first.units)
        if not same or not torch.equal(result.weight, first.weight):
            raise ArgumentError(f"'{first_name}' and '{name}' left out other {first.by}s or weights; use the same data")
    ordered = sorted(results.items(), key=lambda entry: -entry[1].elpd)
    best = ordered[0][1]
    models = []
    for name, result in ordered:
        ahead = best.pointwise - result.pointwise
        se = math.sqrt(len(ahead) * float(ahead.var()))
        models.append(Ranked(name, result.elpd, result.se, float(ahead.sum()), se, result.p_loo, result.num_unreliable))
    return Ranking(tuple(models), len(best.units), first.by)

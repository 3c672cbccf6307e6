"""Sizes, intervals and progress of the alignment worlds."""

import dataclasses
import sys

import numpy as np
import torch
from _common import Claim
from torch import Tensor

from bayesrm.diagnostics import Estimate


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        seeds: Independent worlds.
        rounds: Of each training.
        sets: Sets of candidates behind an expected gradient.
        repeats: Sets behind a coverage, for each prompt.
        learnt: Worlds with a learnt reward.
    """

    seeds: int
    rounds: int
    sets: int
    repeats: int
    learnt: int


def over_seeds(values: Tensor) -> Estimate:
    """The mean over seeds with a 95% bootstrap interval; values that are not a number are left out."""
    known = values[~torch.isnan(values)].numpy()
    rng = np.random.default_rng(0)
    low, high = np.quantile(known[rng.integers(len(known), size=(4000, len(known)))].mean(1), [0.025, 0.975])
    return Estimate(float(known.mean()), float(low), float(high))


def number(value: float) -> Estimate:
    """A number without an interval."""
    return Estimate(value, value, value)


def say(claims: list[Claim]) -> None:
    """The last claim goes to the standard error as soon as it is there, so that long runs can be followed."""
    print(claims[-1].line, file=sys.stderr, flush=True)

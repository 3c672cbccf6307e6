"""Recovery: truths are drawn from the prior, feedback from the program, and 90% intervals must cover at their rate.

If truth and feedback come from the program itself, a central 90% interval of the right posterior covers with
probability 0.9 exactly, whatever the design (Cook, Gelman & Rubin 2006,
https://doi.org/10.1198/106186006X136976). Replicates are independent data sets, so the number of covered truths is
Binomial(replicates, 0.9), and each count must lie inside the exact band of that distribution.

Laplace's approximation is no exact posterior. `CASES` hold every likelihood with its default prior, in designs for
which it is close; `SKEWED` are two vaguer priors for which it is known not to be.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import bayesrm as brm
from bayesrm.likelihoods import (
    Approval,
    BradleyTerry,
    Davidson,
    LabelNoise,
    LengthBias,
    Ordinal,
    PlackettLuce,
    RaoKupper,
    RaterReliability,
    Thurstone,
)

SEED = 2026
REPLICATES = 250
DIMENSION = 4
COVERAGE = 0.9
# Chance that any count of any case below leaves its band though every interval is right, divided evenly (Bonferroni)
# among all of them.
FAMILY_LEVEL = 0.01
# Posterior draws of the latents. Among 999 draws of the right posterior the truth has each of 1,000 ranks with equal
# probability, so ranks 50 .. 949 are an interval of exactly 90%: drawing adds no error to the coverage.
DRAWS = 999


@dataclasses.dataclass(frozen=True)
class Case:
    """A likelihood, the comparisons it is shown, and its latents by site with their sizes."""

    likelihood: Any
    rows: int
    kind: str = "choice"
    candidates: int = 2
    depth: int | None = None
    levels: int | None = None
    raters: int = 0
    words: bool = False
    reward_scale: float = 1.0
    latents: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def quantities(self) -> tuple[str, ...]:
        sites = [name if n == 1 else f"{name}[{i}]" for name, n in self.latents.items() for i in range(n)]
        return (*sites, "difference")

    def design(self, rng: np.random.Generator) -> brm.Comparisons:
        """Comparisons of fresh items in every row; their outcomes are placeholders that a simulation replaces."""
        items = self.rows * self.candidates
        zeros = np.zeros(self.rows, dtype=np.int64)
        return brm.Comparisons.from_arrays(
            # By default rewards have standard deviation 1, differences sqrt(2): neither coin flips nor sure wins.
            rng.normal(size=(items, DIMENSION)) * self.reward_scale / DIMENSION**0.5,
            candidates=np.arange(items).reshape(self.rows, self.candidates),
            outcome=zeros if self.depth is None else np.tile(np.arange(self.depth), (self.rows, 1)),
            kind=self.kind,
            annotator=[f"rater {i % self.raters}" for i in range(self.rows)] if self.raters else None,
            words=rng.integers(20, 320, size=items) if self.words else None,
            num_levels=self.levels,
            prompt_index=np.repeat(np.arange(self.rows), self.candidates),
        )


CASES = {
    "bradley_terry": Case(BradleyTerry(), rows=100),
    "thurstone": Case(Thurstone(), rows=100),
    "davidson": Case(Davidson(), rows=300, latents={"tie_weight": 1}),
    "rao_kupper": Case(RaoKupper(), rows=300, latents={"tie_threshold": 1}),
    "plackett_luce_full": Case(PlackettLuce(), rows=50, kind="ranking", candidates=4, depth=4),
    "plackett_luce_partial": Case(PlackettLuce(), rows=60, kind="ranking", candidates=5, depth=3),
    "plackett_luce_top": Case(PlackettLuce(), rows=80, kind="ranking", candidates=4, depth=1),
    "plackett_luce_choice": Case(PlackettLuce(), rows=80, candidates=4),
    "ordinal": Case(
        Ordinal(), rows=300, kind="rating", candidates=1, levels=5, latents={"first_cutpoint": 1, "cutpoint_gaps": 3}
    ),
    "approval": Case(Approval(), rows=500, kind="approval", candidates=1, latents={"approval_offset": 1}),
    "label_noise_known": Case(LabelNoise(BradleyTerry(), flip_rate=0.2), rows=300),
    "label_noise_learnt": Case(
        LabelNoise(BradleyTerry()), rows=800, reward_scale=3.0, latents={"doubled_flip_rate": 1}
    ),
    "rater_reliability": Case(
        RaterReliability(BradleyTerry()),
        rows=1000,
        raters=6,
        reward_scale=3.0,
        latents={"reliability_mean": 1, "rater_deviation": 6},
    ),
    "length_bias": Case(LengthBias(BradleyTerry()), rows=200, words=True, latents={"length_coefficient": 1}),
    "rated_length_biased_ties": Case(
        RaterReliability(LengthBias(Davidson())),
        rows=1000,
        raters=4,
        reward_scale=3.0,
        words=True,
        latents={
            "tie_weight": 1,
            "length_coefficient": 1,
            "reliability_mean": 1,
            "rater_deviation": 4,
        },
    ),
}

# Priors with which the mode lies off the bulk of the posterior. The model is right there: on 800 rows
# importance sampling from the same log joint centres the scores again and brings their spread back towards 1.
SKEWED = {
    # Flip rate and size of the rewards may grow together: a skewed ridge, which 3,000 rows still leave.
    "label_noise_flat": Case(LabelNoise(BradleyTerry(), prior_kept=4.0), rows=800, latents={"doubled_flip_rate": 1}),
    # As the spread grows, the deviations it scales are pinned down more tightly. A joint mode ignores that loss of
    # volume, so it puts the spread too high, the more so the better raters are known.
    "rater_spread_learnt": Case(
        RaterReliability(BradleyTerry(), spread=None),
        rows=400,
        raters=10,
        reward_scale=5.0,
        latents={"reliability_mean": 1, "reliability_spread": 1, "rater_deviation": 10},
    ),
}

# The cases that run in every test run; the others are marked slow.
QUICK = ("bradley_terry",)


def normal_scores(case: Case, replicate: int) -> list[float]:
    """Where each truth of one replicate lies in its posterior: standard normal numbers if the posterior is right."""
    rng = np.random.default_rng([SEED, replicate])
    model = brm.RewardModel(brm.rewards.Linear(), case.likelihood)
    simulation = model.simulate(case.design(rng), seed=int(rng.integers(2**31)))
    posterior = brm.fit(model, simulation.data, inference=brm.Laplace(structure="full"))
    draws = posterior.latents(DRAWS, seed=replicate)
    sites = {site: draw[0].numel() for site, draw in draws.items()}
    if sites != case.latents:
        pytest.fail(f"the posterior has latents {sites}, the case declares {case.latents}")
    ranks = [
        (draws[site].reshape(DRAWS, -1) < simulation.latents[site].reshape(-1)).sum(0).numpy() for site in case.latents
    ]
    # A draw keeps the order of truth and draws under the monotone map to unconstrained space, so ranks need no map.
    scores = [float(z) for rank in ranks for z in scipy.stats.norm.ppf((rank + 0.5) / (DRAWS + 1))]
    pair = torch.as_tensor(rng.normal(size=(2, DIMENSION)) * case.reward_scale / DIMENSION**0.5)
    belief = posterior.predict(candidates=[pair])
    contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
    error = contrast @ (pair @ simulation.parameters["weight"] - belief.mean[0])
    return [*scores, float(error / (contrast @ belief.covariance[0] @ contrast).sqrt())]


def band(replicates: int) -> tuple[int, int]:
    """Smallest and largest count of covered truths that right intervals allow."""
    tail = FAMILY_LEVEL / sum(len(case.quantities) for case in CASES.values()) / 2
    counts = scipy.stats.binom(replicates, COVERAGE)
    return int(counts.ppf(tail)), int(counts.isf(tail))


def covered(scores: np.ndarray, *, stretch: float = 1.0) -> np.ndarray:
    """Truths inside intervals `stretch` times as wide, for each column of `scores`, shape (replicates, quantities)."""
    return (np.abs(scores) < stretch * scipy.stats.norm.ppf(0.5 + COVERAGE / 2)).sum(0)


def report(case: Case, scores: np.ndarray) -> str:
    """One line for each quantity: its count, the band, mean and standard deviation of the scores (0 and 1 if right)."""
    low, high = band(len(scores))
    moments = zip(case.quantities, covered(scores), scores.mean(0), scores.std(0), strict=True)
    return "\n".join(
        f"{name}: {count} of {len(scores)} covered (band {low} to {high}), scores {mean:+.2f} +- {std:.2f}"
        for name, count, mean, std in moments
    )


def all_scores(case: Case) -> np.ndarray:
    return np.array([normal_scores(case, replicate) for replicate in range(REPLICATES)])


def check_coverage(case: Case, scores: np.ndarray) -> None:
    print(report(case, scores))
    low, high = band(REPLICATES)
    inside = covered(scores)
    assert ((low <= inside) & (inside <= high)).all(), report(case, scores)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_intervals_cover_truths_drawn_from_the_prior(name):
    case = CASES[name]
    scores = all_scores(case)
    check_coverage(case, scores)
    # Negative controls: standard deviations halved and doubled must be noticed, for every quantity.
    low, high = band(REPLICATES)
    assert (covered(scores, stretch=0.5) < low).all(), report(case, scores)
    assert (covered(scores, stretch=2.0) > high).all(), report(case, scores)


@pytest.mark.slow
@pytest.mark.xfail(raises=AssertionError, reason="Laplace's approximation at the joint mode misses a skewed posterior")
@pytest.mark.parametrize("name", SKEWED)
def test_skewed_posteriors_are_covered_too(name):
    check_coverage(SKEWED[name], all_scores(SKEWED[name]))

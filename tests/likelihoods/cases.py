"""Every likelihood with the circumstances it needs, and its outcome probabilities from textbook formulas in mpmath.

The reference works with strengths pi = exp(r) and plain probabilities in as many digits as it takes, where the package
works in log space with floats; rankings are enumerated over all permutations.
"""

import dataclasses
import itertools
from typing import Any

import mpmath
import torch

from bayesrm.backend import PriorRecorder, Recorder, convert, following, seeded
from bayesrm.data import Comparison
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

NUM_ANNOTATORS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    likelihood: Any
    kind: str = "choice"
    num_candidates: int = 2
    depth: int | None = None
    num_levels: int | None = None
    margin: bool = False

    def comparison(self, num_rows, seed=0):
        """Rows with random annotators, lengths and (where asked for) margins."""
        generator = torch.Generator().manual_seed(seed)
        shape = (num_rows, self.num_candidates)
        return Comparison(
            kind=self.kind,
            num_rows=num_rows,
            num_candidates=self.num_candidates,
            depth=self.depth,
            num_levels=self.num_levels,
            annotator=torch.randint(NUM_ANNOTATORS, (num_rows,), generator=generator),
            num_annotators=NUM_ANNOTATORS,
            margin=torch.randn(num_rows, generator=generator, dtype=torch.float64) if self.margin else None,
            lengths=torch.randint(10, 300, shape, generator=generator).double(),
        )

    def rewards(self, num_rows, seed=0):
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(num_rows, self.num_candidates, generator=generator, dtype=torch.float64)

    def latents(self, seed=0):
        """A draw of the latents from their prior, in constrained space."""
        rewards = self.rewards(1)
        with seeded(seed), following(rewards), PriorRecorder({}) as recorder:
            self.likelihood(rewards, self.comparison(1))
        return {name: value for name, (_, value) in recorder.sites.items()}

    def distribution(self, rewards, comparison, latents):
        """The distribution at given latents, in the library of `rewards`."""
        with following(rewards), Recorder(latents):
            return self.likelihood(rewards, comparison)

    def log_table(self, rewards, comparison, latents):
        """Log probability of each outcome of each row, shape `(rows, outcomes)`, in the library of `rewards`."""
        rows, count = comparison.num_rows, len(self.outcomes())
        index = torch.arange(rows).repeat_interleave(count)
        wide = select(comparison, index)
        outcomes = self.outcomes()[torch.arange(count).repeat(rows)]
        if not torch.is_tensor(rewards):
            index, outcomes = to_jax(index), to_jax(outcomes)
        return self.distribution(rewards[index], wide, latents).log_prob(outcomes).reshape(rows, count)

    def outcomes(self):
        """All outcomes, shape `(outcomes,)` or `(outcomes, depth)`, listed without the likelihood's help."""
        if self.kind == "ranking":
            return torch.tensor(list(itertools.permutations(range(self.num_candidates), self.depth)))
        if self.kind == "choice":
            return torch.arange(self.num_candidates + has_ties(self.likelihood))
        return torch.arange(self.num_levels or 2)

    def reference(self, rewards, comparison, latents, row):
        """Probability of each outcome of one row as mpmath numbers, in the order of `outcomes`."""
        seen = Row(
            comparison=comparison,
            margin=mpmath.mpf(0 if comparison.margin is None else float(comparison.margin[row])),
            lengths=[mpmath.mpf(float(n)) for n in comparison.lengths[row]],
            annotator=int(comparison.annotator[row]),
        )
        exact = {name: [mpmath.mpf(float(v)) for v in value.reshape(-1)] for name, value in latents.items()}
        strengths = [r if isinstance(r, mpmath.mpf) else mpmath.mpf(float(r)) for r in rewards]
        table = probabilities(self.likelihood, strengths, seen, exact)
        return [table[tuple(y) if isinstance(y, list) else y] for y in self.outcomes().tolist()]


@dataclasses.dataclass(frozen=True)
class Row:
    comparison: Comparison
    margin: Any
    lengths: list
    annotator: int


def has_ties(likelihood):
    while hasattr(likelihood, "base"):
        likelihood = likelihood.base
    return isinstance(likelihood, Davidson | RaoKupper)


def select(comparison, index):
    """The rows of `comparison` at `index`, a tensor."""
    changed = {"num_rows": len(index)}
    for field in dataclasses.fields(comparison):
        value = getattr(comparison, field.name)
        if hasattr(value, "shape"):
            changed[field.name] = value[index if torch.is_tensor(value) else to_jax(index)]
    return dataclasses.replace(comparison, **changed)


def to_jax(value):
    """Tensors, comparisons and mappings of tensors as float64 JAX arrays; call it where 64-bit types are enabled."""
    import jax.numpy as jnp

    like = jnp.zeros(0, dtype=jnp.float64)
    if isinstance(value, dict):
        return {k: to_jax(v) for k, v in value.items()}
    if isinstance(value, Comparison):
        arrays = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: convert(v, like) for k, v in arrays.items() if torch.is_tensor(v)})
    return convert(value, like)


# ------------------------------------------------------------------------------------------------------- the reference


def probabilities(likelihood, r, row, latents):
    """Outcome -> probability."""
    exp, one, half = mpmath.exp, mpmath.mpf(1), mpmath.mpf(1) / 2
    match likelihood:
        case BradleyTerry(temperature=t):
            first, second = exp((r[0] - row.margin) / mpmath.mpf(t)), exp(r[1] / mpmath.mpf(t))
            return {0: first / (first + second), 1: second / (first + second)}
        case Thurstone(noise=s):
            # Phi(d / (s sqrt 2)) = erfc(-d / 2s) / 2
            d = (r[0] - r[1] - row.margin) / (2 * mpmath.mpf(s))
            return {0: mpmath.erfc(-d) / 2, 1: mpmath.erfc(d) / 2}
        case Davidson():
            first, second = exp(r[0] - row.margin), exp(r[1])
            tie = latents["tie_weight"][0] * mpmath.sqrt(first * second)
            total = first + second + tie
            return {0: first / total, 1: second / total, 2: tie / total}
        case RaoKupper():
            first, second, theta = exp(r[0] - row.margin), exp(r[1]), exp(latents["tie_threshold"][0])
            a, b = first + theta * second, theta * first + second
            return {0: first / a, 1: second / b, 2: (theta**2 - 1) * first * second / (a * b)}
        case PlackettLuce(temperature=t):
            return plackett_luce([exp(x / mpmath.mpf(t)) for x in r], row.comparison)
        case Ordinal():
            cuts = [latents["first_cutpoint"][0]]
            for gap in latents.get("cutpoint_gaps", []):
                cuts.append(cuts[-1] + gap)
            below = [mpmath.mpf(0), *(one / (one + exp(r[0] - c)) for c in cuts), one]
            return {level: below[level + 1] - below[level] for level in range(len(cuts) + 1)}
        case Approval():
            odds = exp(r[0] - latents["approval_offset"][0])
            return {0: one / (one + odds), 1: odds / (one + odds)}
        case LengthBias():
            b = latents["length_coefficient"][0]
            biased = [x + b * n / mpmath.mpf(likelihood.unit) for x, n in zip(r, row.lengths, strict=True)]
            return probabilities(likelihood.base, biased, row, latents)
        case LabelNoise(flip_rate=None):
            return flipped(probabilities(likelihood.base, r, row, latents), latents["doubled_flip_rate"][0] / 2, row)
        case LabelNoise(flip_rate=rate):
            return flipped(probabilities(likelihood.base, r, row, latents), mpmath.mpf(rate), row)
        case RaterReliability():
            m = latents["reliability_mean"][0]
            s = likelihood.spread or latents["reliability_spread"][0]
            eta = half + half / (one + exp(-m - s * latents["rater_deviation"][row.annotator]))
            return flipped(probabilities(likelihood.base, r, row, latents), one - eta, row)
    raise AssertionError(likelihood)


def plackett_luce(strengths, comparison):
    """Sums the probability of every full order over those that begin with the outcome."""
    depth = 1 if comparison.kind == "choice" else comparison.depth
    table = {}
    for order in itertools.permutations(range(len(strengths))):
        p = mpmath.mpf(1)
        for k in range(len(order)):
            p *= strengths[order[k]] / mpmath.fsum(strengths[i] for i in order[k:])
        key = order[0] if comparison.kind == "choice" else order[:depth]
        table[key] = table.get(key, mpmath.mpf(0)) + p
    return table


def flipped(table, rate, row):
    """(1 - rate) of each probability plus `rate` of its opposite's, or of the average where there is no opposite."""
    c = row.comparison
    if c.kind == "choice" and c.num_candidates == 2:
        opposite = {0: 1, 1: 0, 2: 2}
    elif c.kind == "ranking" and c.depth == c.num_candidates:
        opposite = {order: order[::-1] for order in table}
    elif c.kind in ("rating", "approval"):
        opposite = {level: len(table) - 1 - level for level in table}
    else:
        return {y: (1 - rate) * p + rate / len(table) for y, p in table.items()}
    return {y: (1 - rate) * p + rate * table[opposite[y]] for y, p in table.items()}


# ----------------------------------------------------------------------------------------------------------- the cases

RANKING = {"kind": "ranking", "num_candidates": 4}

PLAIN = [
    Case("bradley_terry", BradleyTerry()),
    Case("bradley_terry-margin-temperature", BradleyTerry(temperature=0.7), margin=True),
    Case("thurstone", Thurstone(noise=0.8)),
    Case("thurstone-margin", Thurstone(), margin=True),
    Case("davidson", Davidson()),
    Case("davidson-margin", Davidson(), margin=True),
    Case("rao_kupper", RaoKupper()),
    Case("rao_kupper-margin", RaoKupper(), margin=True),
    Case("plackett_luce-full", PlackettLuce(), depth=4, **RANKING),
    Case("plackett_luce-partial", PlackettLuce(temperature=1.3), depth=2, **RANKING),
    Case("plackett_luce-top1", PlackettLuce(), depth=1, **RANKING),
    Case("plackett_luce-choice", PlackettLuce(temperature=1.5), num_candidates=3),
    *(Case(f"ordinal-{n}", Ordinal(), "rating", 1, num_levels=n) for n in range(2, 8)),
    Case("approval", Approval(), "approval", 1),
]
_BASES = [
    c
    for c in PLAIN
    if c.name
    in {
        "bradley_terry",
        "thurstone",
        "davidson",
        "rao_kupper-margin",
        "plackett_luce-full",
        "plackett_luce-partial",
        "plackett_luce-choice",
        "ordinal-2",
        "ordinal-5",
        "approval",
    }
]


def _over(name, wrap):
    return [dataclasses.replace(c, name=f"{name}({c.name})", likelihood=wrap(c.likelihood)) for c in _BASES]


CASES = [
    *PLAIN,
    *_over("label_noise-known", lambda base: LabelNoise(base, flip_rate=0.25)),
    *_over("label_noise-learnt", LabelNoise),
    *_over("rater_reliability", RaterReliability),
    Case("length_bias(bradley_terry)", LengthBias(BradleyTerry(), unit=50.0), margin=True),
    Case("length_bias(plackett_luce)", LengthBias(PlackettLuce()), depth=3, **RANKING),
    Case("length_bias(ordinal)", LengthBias(Ordinal()), "rating", 1, num_levels=3),
    Case("rater_reliability(length_bias(davidson))", RaterReliability(LengthBias(Davidson()), spread=None)),
]

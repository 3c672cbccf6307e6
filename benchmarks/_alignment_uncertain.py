"""Alignment to a reward learnt from few noisy comparisons: what becomes of the true reward.

Everything here was fixed before the first run: the worlds, the number of comparisons, the utilities and their strength.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import torch
from _alignment_claims import Size, over_seeds, say
from _alignment_methods import TEMPERATURE
from _alignment_training import Schedule, train
from _alignment_world import Responses, World, bradley_terry, divergence, ngrams
from _common import Claim
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment import Method, projections
from bayesrm.programs import ExponentialTilt
from bayesrm.selection import LowerConfidenceBound, RiskAverse

NUM_COMPARISONS = 60
FLIP_RATE = 0.25
#: What a nat of rarity beyond the reference's mean costs where rare responses are bad, in units of reward.
RARITY_COST = 1.0
TEMPERATURES = torch.logspace(1.5, -2.0, 141, dtype=torch.float64)
INFERENCE = brm.Laplace(structure="full")
#: Divergences at which utilities are compared, and those of the curves.
NATS = (0.5, 1.0, 2.0)
GRID = torch.linspace(0.0, 3.0, 61, dtype=torch.float64)


class Truth(enum.StrEnum):
    """How the truth and the answers differ from what the reward model believes beforehand."""

    AS_BELIEVED = "as believed"
    """Weights from the prior, answers of a Bradley-Terry judge."""
    FLIPPED = "a quarter of answers flipped"
    """The same with answers flipped at `FLIP_RATE`, which the model does not know."""
    RARE_IS_BAD = "flipped, and rare responses are bad"
    """On top of it responses lose `RARITY_COST` for each nat by which they are rarer than the reference's mean, which
    no feature tells."""


#: What stands for the reward at a temperature beta. The strengths are the mirror image of Bayes' rule, b = beta, and
#: one unit of reward or one standard deviation.
UTILITIES: dict[str, Callable[[float], object]] = {
    "mean": lambda beta: brm.beliefs.expected,
    "marginal": lambda beta: "marginal",
    "risk-averse, b = beta": lambda beta: RiskAverse(b=beta),
    "risk-averse, b = 1": lambda beta: RiskAverse(b=1.0),
    "lower bound, k = 1": lambda beta: LowerConfidenceBound(k=1.0),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Learnt:
    """Independent runs, a row each.

    Attributes:
        world: Reference policies and true rewards, which have mean 0 and standard deviation 1 under the reference.
        belief: About all responses.
    """

    world: World
    belief: brm.RewardBelief


def learn(truth: Truth, num_seeds: int) -> Learnt:
    """Draws worlds, asks for comparisons of the reference's own responses and fits the reward model."""
    responses = Responses(4, 3)
    features = ngrams(responses)
    reference, rewards, beliefs = [], [], []
    for seed in range(num_seeds):
        draw = torch.Generator().manual_seed(1000 + seed)
        logits = torch.randn(len(responses.prefixes), responses.num_tokens, generator=draw, dtype=torch.float64)
        log_p0 = responses.log_probs(logits[None])[0]
        p0 = log_p0.exp()
        reward = features @ torch.randn(features.shape[1], generator=draw, dtype=torch.float64)
        if truth is Truth.RARE_IS_BAD:
            surprise = -log_p0
            reward = reward - RARITY_COST * (surprise - (p0 * surprise).sum()).clamp_min(0.0)
        pairs = torch.multinomial(p0, 2 * NUM_COMPARISONS, True, generator=draw).reshape(-1, 2)
        chance = torch.rand(2, NUM_COMPARISONS, generator=draw, dtype=torch.float64)
        answer = (chance[0] > torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])).long()
        if truth is not Truth.AS_BELIEVED:
            answer = torch.where(chance[1] < FLIP_RATE, 1 - answer, answer)
        pairs, answer = pairs[pairs[:, 0] != pairs[:, 1]], answer[pairs[:, 0] != pairs[:, 1]]
        data = brm.Comparisons.from_arrays(features.numpy(), candidates=pairs.numpy(), outcome=answer.numpy())
        model = brm.RewardModel(reward=brm.rewards.Linear(), likelihood=brm.likelihoods.BradleyTerry())
        posterior = brm.fit(model, data, inference=INFERENCE, seed=seed)
        beliefs.append(posterior.predict(candidates=[features.numpy()]))
        mean = (p0 * reward).sum()
        reference.append(logits)
        rewards.append((reward - mean) / (p0 * (reward - mean).square()).sum().sqrt())
    belief = brm.RewardBelief.concatenate(beliefs)
    belief = brm.RewardBelief(belief.mean.double(), belief.root.double())
    true = torch.stack(rewards)
    return Learnt(World(responses, torch.stack(reference), true, bradley_terry(true), num_seeds), belief)


def program(utility: str, temperature: float) -> brm.GoodnessPosterior:
    """The target for one of `UTILITIES`."""
    stands_for: object = UTILITIES[utility](temperature)
    return brm.GoodnessPosterior(ExponentialTilt(temperature), stands_for)  # type: ignore[arg-type]


def path(learnt: Learnt, utility: str) -> tuple[Tensor, Tensor]:
    """KL to the reference and true expected reward of the exact targets, both of shape `(temperatures, seeds)`."""
    world = learnt.world
    candidates = world.candidates(belief=learnt.belief)
    divergences, rewards = [], []
    for temperature in TEMPERATURES.tolist():
        log_target = brm.fit(program(utility, temperature), candidates, inference=brm.Enumeration()).log_weights
        divergences.append(divergence(log_target, world.log_reference))
        rewards.append((log_target.exp() * world.rewards).sum(1))
    return torch.stack(divergences), torch.stack(rewards)


def at_divergence(divergences: Tensor, rewards: Tensor, nats: float) -> Tensor:
    """True reward where each run's path first has that divergence, linear between temperatures, shape `(seeds,)`.

    Not a number for a run that never gets there.
    """
    reached = divergences >= nats
    first = reached.int().argmax(0)
    run = torch.arange(divergences.shape[1])
    before = (first - 1).clamp_min(0)
    low, high = divergences[before, run], divergences[first, run]
    share = torch.where(high > low, (nats - low) / (high - low), 0.0)
    value = rewards[before, run] + share * (rewards[first, run] - rewards[before, run])
    return torch.where(reached.any(0), value, torch.nan)


def uncertain(size: Size) -> tuple[list[Claim], dict[str, Any]]:
    """The true reward at equal divergences, and BRAIn trained on the same beliefs."""
    claims, details = [], {}
    for truth in Truth:
        learnt = learn(truth, size.learnt)
        paths = {utility: path(learnt, utility) for utility in UTILITIES}
        details[truth.value] = {
            utility: {
                "grid": GRID.tolist(),
                "reward": torch.stack([at_divergence(*found, float(d)) for d in GRID]).tolist(),
                "coldest": float(found[1][-1].mean()),
                "best_of_path": float(found[1].mean(1).max()),
            }
            for utility, found in paths.items()
        }
        for nats in NATS:
            base = at_divergence(*paths["mean"], nats)
            claims.append(Claim(f"{truth.value}, mean at {nats:g} nats: true reward", over_seeds(base)))
            for utility in list(UTILITIES)[1:]:
                gain = at_divergence(*paths[utility], nats) - base
                reached = int((~torch.isnan(gain)).sum())
                helps = truth is Truth.RARE_IS_BAD and utility in ("risk-averse, b = 1", "lower bound, k = 1")
                claims.append(
                    Claim(
                        f"{truth.value}, {utility} at {nats:g} nats: true reward less the mean's ({reached} worlds)",
                        over_seeds(gain),
                        minimum=0.0 if helps else None,
                    )
                )
        if truth is Truth.RARE_IS_BAD:
            claims += _trained_too(size, learnt)
        say(claims)
    return claims, details


def _trained_too(size: Size, learnt: Learnt) -> list[Claim]:
    """BRAIn itself on candidates of its own at one temperature, against the exact target."""
    claims = []
    world = learnt.world
    for utility in UTILITIES:
        method = Method(program(utility, TEMPERATURE), projections.ListwiseCrossEntropy())
        run = train(world, method, Schedule(size.rounds // 4, 2, 2.0), seed=0, records=1, belief=learnt.belief)
        log_target = method.weigh(world.candidates(belief=learnt.belief)).log_weights
        gap = divergence(run.last, log_target)
        claims.append(
            Claim(f"BRAIn trained, {utility}, beta = {TEMPERATURE}: KL(policy || exact target)", over_seeds(gap))
        )
        miss = ((run.last.exp() - log_target.exp()) * world.rewards).sum(1)
        claims.append(
            Claim(
                f"BRAIn trained, {utility}, beta = {TEMPERATURE}: true reward less the exact target's", over_seeds(miss)
            )
        )
    return claims

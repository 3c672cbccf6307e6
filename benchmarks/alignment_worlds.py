"""Do alignment methods reach what they say they reach? Worlds in which every response can be listed.

A policy is a table of logits over a prefix tree (3 symbols and an end, at most 3 tokens: 40 responses); rewards are
random n-gram effects, preferences those of a Bradley-Terry judge or cyclic (rock, paper, scissors). Methods are trained
by their own weights and losses on sampled candidates, with plain stochastic gradient descent whose steps fall linearly
to 0, in independent worlds, one for each seed; divergences, exploitabilities and expected rewards are exact sums.
Bounds on the end of a training are derived from its noise and its steps, see `_alignment_methods.expected_end`. Where a
method has no target of its own, the gradient of its sampled loss is compared with that of the expected loss in closed
form, and what it converges to is reported. Intervals redraw seeds.

Then a reward learnt from 60 noisy comparisons: the true reward of the exact targets for several utilities of the
belief, in 40 worlds of 85 responses.

Usage: python benchmarks/alignment_worlds.py [--plots FOLDER] [--json FILE] [--quick]
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _alignment_claims import Size, number, over_seeds, say
from _alignment_conversations import METHOD, MIXED, make_conversations, train_mtpo
from _alignment_estimates import at_target, coverage, lowest_by_pairs, restricted, shrinkage
from _alignment_figures import draw_uncertain, draw_worlds
from _alignment_gradients import bonbon, largest_deviation, lowest, small, without_score_function
from _alignment_methods import BEST_OF, TAU, TEMPERATURE, TILT, entries, exact, expected_end, nash, published
from _alignment_training import Schedule, Trained, to_target, train
from _alignment_uncertain import uncertain
from _alignment_world import World, bradley_terry, divergence, make_world
from _common import Claim, main
from torch import Tensor

import bayesrm as brm
from bayesrm.alignment import Method, games, projections, targets
from bayesrm.diagnostics import Estimate
from bayesrm.programs import ScoredCandidates

NUM_SEEDS = 8
#: The last iterate leaves at most this share of what the reference leaves to a best response.
EXPLOITABILITY_LEFT = 0.1
#: The last iterate of MTPO-tau keeps at most this share of the reference's divergence from where the exact step rests.
DIVERGENCE_LEFT = 0.05


FULL = Size(NUM_SEEDS, 2000, 20_000, 60, 40)
QUICK = Size(5, 120, 20_000, 5, 10)


def exploitability(world: World, log_policy: Tensor) -> Tensor:
    """Of each run's policy, shape `(seeds,)`."""
    found = games.exploitability(world.preferences, log_policy.exp(), world.log_reference.exp(), regularisation=TAU)
    return world.by_seed(found)


def reach_targets(size: Size, worlds: dict[bool, World]) -> tuple[list[Claim], dict[str, Any], dict[str, Trained]]:
    """Trains the methods that have a target of their own."""
    claims, details, trained = [], {}, {}
    for entry in entries():
        world, schedule = worlds[entry.game], entry.schedule(size.rounds)
        began = time.perf_counter()
        bound = expected_end(world, entry, schedule, num_sets=200, seed=1)
        run = train(world, entry.method, schedule, seed=0)
        gaps = to_target(world, run, entry.own_target(world))
        name = f"{entry.name}: KL(policy || own target)"
        claims.append(Claim(name, over_seeds(gaps[-1]), maximum=bound.bound))
        record = {
            "rounds": run.rounds,
            "reward_calls": [r * entry.method.num_candidates for r in run.rounds],
            "divergence": gaps.mean(1).tolist(),
            "bound": dataclasses.asdict(bound) | {"bound": bound.bound},
            "seconds": time.perf_counter() - began,
        }
        if entry.game:
            left = torch.stack([exploitability(world, lp) for lp in run.log_probs])
            record["exploitability"] = left.mean(1).tolist()
            claims.append(
                Claim(
                    f"{entry.name}: exploitability of the last iterate over the reference's",
                    over_seeds(left[-1] / left[0]),
                    maximum=EXPLOITABILITY_LEFT,
                )
            )
        details[entry.name], trained[entry.name] = record, run
        say(claims)
    claims += _soft_q_learning_otherwise(size, worlds[False])
    game = worlds[True]
    rest = next(e for e in entries() if e.name == "Nash-MD").own_target(game)
    claims.append(
        Claim(
            "Nash-MD: KL(where it rests || Nash policy) at this constant step",
            over_seeds(game.by_seed(divergence(rest, nash(game)))),
        )
    )
    return claims, details, trained


class FromTheBest:
    """The tilt with rewards measured from the best of the candidates at hand, which `Method` refuses by its name."""

    def log_density(self, candidates: ScoredCandidates) -> Tensor:
        """Log of the tilt up to a constant that moves with the set."""
        return TILT.log_density(candidates)


def _soft_q_learning_otherwise(size: Size, world: World) -> list[Claim]:
    """Without what the table needs: values that are taught, and rewards that no set of candidates shifts."""
    whole = next(e for e in entries() if e.name == "soft Q-learning")
    soft = functools.partial(published, "soft_q_learning", beta=TEMPERATURE, reference=True, anchor_rate=1.0)
    others = {
        "no reversed roles, as the released code": dataclasses.replace(soft(), target=whole.method.target),
        "rewards measured from the best candidate": dataclasses.replace(soft(reversed_roles=0.5), target=FromTheBest()),
    }
    claims = []
    for name, method in others.items():
        run = train(world, method, whole.schedule(size.rounds // 2), seed=0, records=1)
        gap = to_target(world, run, exact(TILT)(world))[-1]
        claims.append(Claim(f"soft Q-learning, {name}, half the rounds: KL(policy || own target)", over_seeds(gap)))
    return claims


def conversations(size: Size) -> tuple[list[Claim], dict[str, Any]]:
    """MTPO, and MTPO-tau, in which the mixture of policy and reference plays."""
    world = make_conversations(size.seeds)
    rounds, left = train_mtpo(world, Schedule(size.rounds, 1, 0.5), world.exploitability, seed=0)
    name = "MTPO, two turns: exploitability of the last iterate over the reference's"
    claims = [Claim(name, over_seeds(left[-1] / left[0]), maximum=EXPLOITABILITY_LEFT)]
    rest = world.resting()
    _, apart = train_mtpo(
        world, Schedule(size.rounds, 1, 0.5), lambda logits: world.divergence_from(rest, logits), seed=0, method=MIXED
    )
    claims += [
        Claim(
            "MTPO-tau, two turns: KL(where its exact step rests || last iterate) over that of the reference",
            over_seeds(apart[-1] / apart[0]),
            maximum=DIVERGENCE_LEFT,
        ),
        Claim(
            "MTPO-tau, two turns: exploitability where its exact step rests, over the reference's",
            over_seeds(world.exploitability(rest) / left[0]),
        ),
    ]
    say(claims)
    calls = [r * METHOD.num_candidates for r in rounds]
    details = {"exploitability": left.mean(1).tolist(), "mixture": apart.mean(1).tolist()}
    return claims, {"rounds": rounds, "candidates": calls} | details


def descend_their_losses(size: Size) -> list[Claim]:
    """Expected gradients of the methods without a target, against closed forms."""
    world = make_world(range(5), num_symbols=2, length=2)
    # Flatter, so that no response is too rare for the error of a mean to be estimated.
    rewards = 0.5 * world.rewards
    world = dataclasses.replace(
        world, reference=0.5 * world.reference, rewards=rewards, preferences=bradley_terry(rewards)
    )
    claims = []
    for described in small():
        worst, count = largest_deviation(world, described, num_sets=size.sets, seed=3)
        name = f"{described.name}: largest of {count} deviations of the mean gradient from the exact one, in errors"
        claims.append(Claim(name, number(worst), maximum=4.5))
    control = without_score_function()
    worst, _ = largest_deviation(world, control, num_sets=size.sets, seed=3)
    claims.append(Claim(f"control, {control.name}: the same", number(worst), minimum=4.5))
    say(claims)
    return claims


def resting_points(size: Size, world: World) -> tuple[list[Claim], dict[str, Any]]:
    """Where LIRE, J-BOND, SAIL and BoNBoN go in the world of 40 responses."""
    sail = functools.partial(published, "sail", beta=TEMPERATURE, num_candidates=8)
    runs: dict[str, tuple[Method, float]] = {
        "LIRE": (published("lire", reward_temperature=TEMPERATURE, num_candidates=8), 10.0),
        "J-BOND": (published("j_bond"), 0.3),
        "BoNBoN, n=8": (published("bonbon"), 0.02),
        "DPO on the policy's pairs": (sail(score_function=0.0), 20.0),
        "SAIL, score function x 0.1": (sail(score_function=0.1), 20.0),
        "SAIL": (sail(), 10.0),
    }
    compared = {"tilt": exact(TILT)(world)} | {
        f"best of {n}": exact(targets.BestOfN(n))(world) for n in (2, 4, 8, 16, 32, 64)
    }
    best = world.rewards.argmax(1, keepdim=True)

    def described(log_q: Tensor) -> dict[str, float]:
        found = {
            "reward": (log_q.exp() * world.rewards).sum(1),
            "kl_reference": divergence(log_q, world.log_reference),
            "best": log_q.gather(1, best)[:, 0].exp(),
        } | {name: divergence(log_q, other) for name, other in compared.items()}
        return {name: float(values.mean()) for name, values in found.items()}

    claims, details = [], {"the tilt itself": described(compared["tilt"])}
    for name, (method, rate) in runs.items():
        run = train(world, method, Schedule(size.rounds, 1, rate), seed=0, records=4)
        details |= {f"{name}, {r} rounds": described(lp) for r, lp in zip(run.rounds, run.log_probs, strict=True) if r}
        claims.append(
            Claim(
                f"{name}: true reward at the end less the tilt's",
                over_seeds(world.by_seed(((run.last.exp() - compared["tilt"].exp()) * world.rewards).sum(1))),
            )
        )
        if name.startswith("BoNBoN"):
            lowest_point = lowest(world, functools.partial(bonbon, n=8))
            details["BoNBoN, n=8, exact minimum"] = described(lowest_point)
            gap = {"exact minimum": lowest_point, "best of 8": compared["best of 8"]}
            claims += [
                Claim(f"{name}: KL(policy || {k})", over_seeds(world.by_seed(divergence(run.last, v))))
                for k, v in gap.items()
            ]
            far = world.by_seed(divergence(lowest_point, compared["best of 8"]))
            claims.append(Claim(f"{name}: KL(exact minimum || best of 8)", over_seeds(far)))
    say(claims)
    return claims, details


def at_equal_calls(size: Size, world: World, trained: dict[str, Trained]) -> tuple[list[Claim], dict[str, Any]]:
    """BRAIn, DPO, RLOO and BOND with 8 candidates of each prompt a round."""
    dpo = published("dpo", beta=TEMPERATURE, num_candidates=8)
    bond = published("bond", n=BEST_OF, proposal="reference", num_candidates=8)
    runs = {
        "BRAIn": (trained["BRAIn"], TILT),
        "RLOO": (trained["RLHF"], TILT),
        "DPO": (train(world, dpo, Schedule(size.rounds, 2, 20.0), seed=0), TILT),
        "BOND": (train(world, bond, Schedule(size.rounds, 2, 0.5), seed=0), bond.target),
    }
    claims: list[Claim] = []
    details: dict[str, Any] = {"frontier": frontier(world)}
    for name, (run, target) in runs.items():
        gaps = to_target(world, run, exact(target)(world))
        rewards = torch.stack([world.by_seed((lp.exp() * world.rewards).sum(1)) for lp in run.log_probs])
        away = to_target(world, run, world.log_reference)
        details[name] = {
            "reward_calls": [8 * r for r in run.rounds],
            "to_own_target": gaps.mean(1).tolist(),
            "kl_reference": away.mean(1).tolist(),
            "reward": rewards.mean(1).tolist(),
        }
        early = next(place for place, r in enumerate(run.rounds) if r >= size.rounds / 20)
        for place in (early, -1):
            calls = 8 * run.rounds[place]
            claims.append(Claim(f"{name}, {calls} reward calls: KL(policy || own target)", over_seeds(gaps[place])))
        claims.append(Claim(f"{name}, {calls} reward calls: true reward", over_seeds(rewards[-1])))
    say(claims)
    return claims, details


def frontier(world: World) -> list[tuple[float, float]]:
    """KL to the reference and expected reward of the exact tilts, means over rows."""
    points = []
    for temperature in np.geomspace(20.0, 0.1, 40):
        tilt = brm.GoodnessPosterior(brm.programs.ExponentialTilt(float(temperature)))
        log_q = exact(tilt)(world)
        away, reward = divergence(log_q, world.log_reference), (log_q.exp() * world.rewards).sum(1)
        points.append((float(away.mean()), float(reward.mean())))
    return points


def few_candidates(size: Size, world: World) -> tuple[list[Claim], dict[str, Any]]:
    """What self-normalising does to BRAIn at few candidates."""
    claims, details = [], {}
    sets = min(1000, size.sets // 10)
    for proposal in ("reference", "policy"):
        for n in (2, 4, 8, 32):
            label = f"BRAIn, {n} candidates of the {proposal}"
            at_rest = at_target(world, n, proposal, num_sets=50, seed=0)
            claims.append(Claim(f"{label}: largest gradient at the target", number(at_rest), maximum=1e-12))
            share, error = shrinkage(world, n, proposal, num_sets=sets, seed=0)
            step = Estimate(share, share - 1.96 * error, share + 1.96 * error)
            claims.append(Claim(f"{label}: expected step over that of the KL divergence", step))
            excess = restricted(world, n, proposal, Schedule(size.rounds // 2, 1, 1.0), seed=1)
            claims.append(
                Claim(
                    f"{label}, policy that knows places only: KL(target || policy) over the least", over_seeds(excess)
                )
            )
            details[label] = {"gradient_at_target": at_rest, "step": share, "excess": float(excess.mean())}
    least = over_seeds(lowest_by_pairs(world))
    name = "BRAIn, 2 candidates of the reference, policy that knows places only, exact minimum: the same"
    claims.append(Claim(name, least))
    for smooth in (False, True):
        many = Method(TILT, projections.ListwiseCrossEntropy(), proposal="reference", num_candidates=32)
        run = train(world, many, Schedule(size.rounds // 4, 2, 2.0), seed=0, records=1, smooth=smooth)
        gap = to_target(world, run, exact(TILT)(world))[-1]
        how = "with Pareto smoothing of one side" if smooth else "as they are"
        claims.append(
            Claim(f"BRAIn, 32 candidates of the reference, weights {how}: KL(policy || target)", over_seeds(gap))
        )
    say(claims)
    return claims, details


def intervals(size: Size, world: World) -> tuple[list[Claim], dict[str, Any]]:
    """Coverage of the reported errors of self-normalised expectations."""
    half_way = torch.log_softmax(0.5 * (world.log_reference + exact(TILT)(world)), 1)
    claims, details = [], {}
    for name, proposal in (("reference", world.log_reference), ("policy half way to the target", half_way)):
        for n in (8, 32, 128, 512):
            found = coverage(world, proposal, n, repeats=size.repeats, seed=0)
            spread = 1.96 * found["error"]
            held = Estimate(found["coverage"], found["coverage"] - spread, found["coverage"] + spread)
            enough = n >= 128 and proposal is half_way
            label = f"{n} draws of the {name}: coverage of 1.96 errors"
            claims.append(Claim(label, held, minimum=0.9 if enough else None))
            details[label] = found
    say(claims)
    return claims, details


def run(plots: Path | None, quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Everything."""
    size = QUICK if quick else FULL
    worlds = {cyclic: make_world(range(size.seeds), cyclic=cyclic) for cyclic in (False, True)}
    claims, reached, trained = reach_targets(size, worlds)
    details: dict[str, Any] = {"reached": reached}
    claims += descend_their_losses(size)
    parts: dict[str, Callable[[], tuple[list[Claim], dict[str, Any]]]] = {
        "conversations": lambda: conversations(size),
        "resting_points": lambda: resting_points(size, worlds[False]),
        "equal_calls": lambda: at_equal_calls(size, worlds[False], trained),
        "few_candidates": lambda: few_candidates(size, worlds[False]),
        "intervals": lambda: intervals(size, worlds[False]),
        "uncertain": lambda: uncertain(size),
    }
    for name, part in parts.items():
        found, details[name] = part()
        claims += found
    if plots is not None:
        draw_worlds(plots / "alignment_worlds.png", details)
        draw_uncertain(plots / "uncertain_reward_world.png", details["uncertain"])
    return claims, details


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plots", type=Path)
    own, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    sys.exit(main(__doc__.splitlines()[0], functools.partial(run, own.plots), rest))

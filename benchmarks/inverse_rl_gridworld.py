"""AVRIL on gridworlds, against the exact posterior of the same program.

Three fixed 5 x 5 layouts (`_gridworlds.py`) and one whose rewards are drawn from the prior anew for each seed. 10, 50
and 200 demonstrations of at most 15 steps from random squares, by the soft-optimal policy with rationality 3 and
discount 0.9; 10 seeds. The reference is the program with known dynamics, sampled by NUTS; AVRIL and behavioural cloning
(a table with the weights of both other terms 0) see only the steps.

What is measured, set before the first run: correlation over the squares of AVRIL's reward means with the exact ones
and with the truth; the same over visited squares, and for the means projected onto the directions that the data
identify, those in which the exact posterior has less than half of the prior's variance; coverage of central 50% and
90% intervals of the true rewards; correlation of log standard deviations with log(1 + visits); and the share of the
optimal policy's gain over the uniform policy that a policy reaches: the soft-optimal policy of the expected reward in
the known dynamics, AVRIL's own policy, the cloned one and the demonstrator's. Added after a first look at one cell: the
correlation weighted by visits. Means over seeds; intervals redraw seeds.

Networks and exploration are run at 50 demonstrations alone.

Usage: python benchmarks/inverse_rl_gridworld.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Claim, main
from _gridworlds import ACTIONS, SIDE, Gridworld, drawn, layouts
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.diagnostics import bootstrap
from bayesrm.engines import AVRIL
from bayesrm.engines.trajectory_posterior import TrajectoryPosterior
from bayesrm.errors import ConvergenceWarning
from bayesrm.programs import InverseRL

DISCOUNT, RATIONALITY, MAX_STEPS = 0.9, 3.0, 15
SQUARES = np.arange(SIDE**2)
NETWORK = (64, 64)
COUNTS, USUAL = (10, 50, 200), 50
#: Smallest share of the prior's variance that an unidentified direction keeps.
UNIDENTIFIED = 0.5
GOAL = 0.9
EXPLORED = 200


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run AVRIL: hidden layers, settings, and whether the divergence counts once for each state.

    Where it does nothing keeps the standard deviations up but their floor, `min_std`: a low one makes the optimisation
    stiff. Exploration is `EXPLORED` trajectories of the uniform policy that are not imitated: they show the dynamics,
    which the exact posterior is told.
    """

    hidden: tuple[int, ...] = ()
    next_value: str = "trajectory"
    kl_weight: float = 1.0
    constraint_weight: float = 1.0
    min_std: float = 1e-3
    kl_once: bool = False
    explored: bool = False
    num_steps: int = 500
    learning_rate: float = 0.1

    @property
    def everywhere(self) -> bool:
        """Whether it is run at every number of demonstrations."""
        return not (self.hidden or self.explored)


VARIANTS = {
    "published": Variant(),
    "published, network": Variant(NETWORK, num_steps=1000, learning_rate=3e-3),
    "soft values": Variant((), "soft"),
    "soft values, network": Variant(NETWORK, "soft", num_steps=1000, learning_rate=3e-3),
    "soft values, divergence once": Variant((), "soft", min_std=0.1, kl_once=True, num_steps=2000, learning_rate=5e-2),
    "the same, and exploration": Variant(
        (), "soft", min_std=0.1, kl_once=True, explored=True, num_steps=2000, learning_rate=5e-2
    ),
}


def avril(world: Gridworld, data: brm.data.Trajectories, variant: Variant, seed: int) -> TrajectoryPosterior:
    """Fits a variant."""
    program = InverseRL(
        brm.rewards.StateReward(ACTIONS, SIDE**2, variant.hidden), discount=DISCOUNT, rationality=RATIONALITY
    )
    engine = AVRIL(
        next_value=variant.next_value, kl_weight=variant.kl_weight, constraint_weight=variant.constraint_weight,
        num_steps=variant.num_steps, learning_rate=variant.learning_rate, min_std=variant.min_std,
        kl_once=variant.kl_once,
    )  # fmt: skip
    return brm.fit(program, data, inference=engine, seed=seed)


def with_exploration(world: Gridworld, data: brm.data.Trajectories, seed: int) -> brm.data.Trajectories:
    """The demonstrations, and trajectories of the uniform policy that are none."""
    other = world.mdp.demonstrate(
        np.zeros(SIDE**2), EXPLORED, max_steps=MAX_STEPS, discount=DISCOUNT, rationality=RATIONALITY, seed=2000 + seed
    )
    parts = [(d, np.cumsum(d.lengths)[:-1]) for d in (data, other)]
    return brm.data.Trajectories.from_arrays(
        [s for d, cuts in parts for s in np.split(d.states, cuts)],
        [a for d, cuts in parts for a in np.split(d.actions, cuts)],
        ended=np.concatenate([data.ended, other.ended]), demonstrated=[True] * len(data) + [False] * len(other),
    )  # fmt: skip


def exact(world: Gridworld, data: brm.data.Trajectories, seed: int) -> TrajectoryPosterior:
    """The exact posterior."""
    reward = brm.rewards.StateReward(ACTIONS, SIDE**2, dynamics=world.mdp)
    program = InverseRL(reward, discount=DISCOUNT, rationality=RATIONALITY)
    engine = brm.NUTS(num_chains=2, num_warmup=400, num_samples=600, mass_matrix="dense")
    posterior = brm.fit(program, data, inference=engine, seed=seed)
    assert isinstance(posterior, TrajectoryPosterior)
    return posterior


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson correlation; 0 where one side does not vary."""
    return 0.0 if x.std() == 0.0 or y.std() == 0.0 else float(np.corrcoef(x, y)[0, 1])


def gain(world: Gridworld, policy: NDArray[np.float64]) -> float:
    """Value of a policy, 0 for the uniform one and 1 for the optimal one."""

    def value(of: NDArray[np.float64]) -> float:
        return world.mdp.policy_value(of, world.rewards, discount=DISCOUNT)

    best = np.asarray(world.mdp.policy(torch.as_tensor(world.rewards), discount=DISCOUNT, rationality=1e4))
    low = value(np.full((SIDE**2, ACTIONS), 1.0 / ACTIONS))
    return (value(policy) - low) / (value(best) - low)


def planned(world: Gridworld, mean: NDArray[np.float64]) -> float:
    """Gain of the policy that is soft-optimal for a reward."""
    policy = world.mdp.policy(torch.as_tensor(mean), discount=DISCOUNT, rationality=RATIONALITY)
    return gain(world, np.asarray(policy))


def measured(
    world: Gridworld, found: TrajectoryPosterior, reference: TrajectoryPosterior, visits: NDArray[np.int64]
) -> dict[str, float]:
    """The numbers of one fit; `reference` is the exact posterior."""
    mean, std = (np.asarray(m) for m in found.reward(SQUARES))
    true_mean = np.asarray(reference.reward(SQUARES)[0])
    draws = reference.rewards.draws(SQUARES)
    assert draws is not None
    eigenvalues, directions = np.linalg.eigh(np.cov(draws.numpy().T))
    known = directions[:, eigenvalues < UNIDENTIFIED]
    own = found.rewards.draws(SQUARES)
    inside = {}
    for level in (50, 90):
        if own is None:
            half = torch.special.ndtri(torch.tensor(0.5 + level / 200)).item() * std
            low, high = mean - half, mean + half
        else:
            low, high = np.quantile(own.numpy(), [0.5 - level / 200, 0.5 + level / 200], axis=0)
        inside[f"coverage {level}%"] = float(((low <= world.rewards) & (world.rewards <= high)).mean())
    return inside | {
        "correlation with exact": correlation(mean, true_mean),
        "identified": correlation(known.T @ mean, known.T @ true_mean),
        "weighted by visits": correlation(np.repeat(mean, visits), np.repeat(true_mean, visits)),
        "visited": correlation(mean[visits > 0], true_mean[visits > 0]),
        "correlation with truth": correlation(mean, world.rewards),
        "mean std": float(std.mean()),
        "std against visits": correlation(np.log(std), np.log1p(visits)),
        "gain, planned": planned(world, mean),
        "gain, own policy": gain(world, np.asarray(found.policy(SQUARES))),
    }


def cell(name: str, count: int, seed: int, cache: Path | None) -> dict[str, dict[str, float]]:
    """All methods on one data set; `name` is that of the world."""
    kept = None if cache is None else cache / f"{name}-{count}-{seed}.json"
    if kept is not None and kept.exists():
        results: dict[str, dict[str, float]] = json.loads(kept.read_text())
        return results
    world = drawn(seed) if name == "drawn" else next(w for w in layouts() if w.name == name)
    with warnings.catch_warnings():
        # The largest R-hat of every fit goes into the results.
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = compared(world, count, seed)
    if kept is not None:
        kept.write_text(json.dumps(results))
    return results


def compared(world: Gridworld, count: int, seed: int) -> dict[str, dict[str, float]]:
    """All methods on one data set."""
    data = world.mdp.demonstrate(
        world.rewards, count, max_steps=MAX_STEPS, discount=DISCOUNT, rationality=RATIONALITY, seed=1000 + seed
    )
    visits = np.bincount(data.states, minlength=SIDE**2)
    reference = exact(world, data, seed)
    results = {"exact": measured(world, reference, reference, visits)}
    results["exact"]["r_hat"] = float(reference.report.diagnostics["r_hat"])
    for name, variant in VARIANTS.items():
        if count != USUAL and not variant.everywhere:
            continue
        seen = with_exploration(world, data, seed) if variant.explored else data
        found = avril(world, seen, variant, seed)
        results[name] = measured(world, found, reference, visits)
        results[name]["gradient norm"] = found.report.gradient_norm
    cloned = avril(world, data, Variant(kl_weight=0.0, constraint_weight=0.0), seed)
    expert = world.mdp.policy(torch.as_tensor(world.rewards), discount=DISCOUNT, rationality=RATIONALITY)
    results["cloning, table"] = {"gain, own policy": gain(world, np.asarray(cloned.policy(SQUARES)))}
    results["the demonstrator"] = {"gain, own policy": gain(world, np.asarray(expert))}
    return results


def run(cache: Path | None, quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Every layout, number of demonstrations and seed."""
    torch.set_num_threads(1)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    claims, details = [], {}
    for name in ["goal"] if quick else [*(w.name for w in layouts()), "drawn"]:
        for count in (USUAL,) if quick or name == "drawn" else COUNTS:
            cells = [cell(name, count, seed, cache) for seed in range(2 if quick else 10)]
            details[f"{name}, {count}"] = cells
            print(f"{name}, {count}", file=sys.stderr, flush=True)
            for method in cells[0]:
                for quantity in cells[0][method]:
                    values = np.array([c[method][quantity] for c in cells])
                    estimate = bootstrap(lambda i, v=values: float(v[i].mean()), np.arange(len(values)))
                    minimum = GOAL if quantity == "correlation with exact" and method == "published" else None
                    claims.append(Claim(f"{name}, {count}: {method}: {quantity}", estimate, minimum=minimum))
    return claims, {"cells": details}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    own, rest = parser.parse_known_args()
    sys.exit(main(__doc__.splitlines()[0], functools.partial(run, own.cache), rest))

"""AVRIL against behavioural cloning on classic control, from few demonstrations.

CartPole-v1 (gymnasium): the expert pushes towards where `angle + angular velocity + 0.1 position + 0.3 velocity`
points, which holds the pole for all 500 steps. Acrobot-v1: the expert swings with the velocity of the lower joint, and
ends the episode in about 90 steps (return -90). 15 demonstrations; for CartPole also 1, since 15 are enough for either
method. Both methods have the same Q-network (2 layers of 64), initial weights, steps and batches; cloning is AVRIL with
the weights of its other terms 0. Both act greedily. 10 seeds of demonstrations and training; the return of a seed is
the mean over 10 episodes, the same ones for both methods. Intervals redraw seeds.

Usage: python benchmarks/inverse_rl_control.py [--json FILE] [--quick]
"""

import functools
import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from _common import Claim, main
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.data import Trajectories
from bayesrm.diagnostics import Estimate, bootstrap
from bayesrm.engines import AVRIL
from bayesrm.programs import InverseRL

DISCOUNT, NUM_STEPS, EPISODES, BATCH = 0.99, 1000, 10, 64
#: Name, number of demonstrations, steps that are kept of each.
CASES = (("CartPole-v1", 15, 500), ("CartPole-v1", 1, 100), ("Acrobot-v1", 15, 500))


def expert(name: str, states: NDArray[np.float64]) -> NDArray[np.int64]:
    """Actions of a controller written by hand, for states of shape `(N, D)`."""
    if name == "CartPole-v1":
        push = states @ np.array([0.1, 0.3, 1.0, 1.0])
        return (push > 0).astype(np.int64)
    # Pump energy in: torque along the velocity of the lower joint.
    return np.where(states[:, 5] > 0, 2, 0)


def episodes(name: str, act: Any, seeds: list[int]) -> tuple[list[NDArray[np.float64]], list[NDArray[np.int64]], Any]:
    """States and actions of one episode a seed, side by side, whether each ended by itself, and the returns."""
    environments = [gymnasium.make(name) for _ in seeds]
    now = [e.reset(seed=s)[0] for e, s in zip(environments, seeds, strict=True)]
    states: list[list[NDArray[np.float64]]] = [[] for _ in seeds]
    actions: list[list[int]] = [[] for _ in seeds]
    ended, returns, going = np.zeros(len(seeds), bool), np.zeros(len(seeds)), list(range(len(seeds)))
    while going:
        chosen = act(np.stack([now[i] for i in going]).astype(np.float64))
        remaining = []
        for i, action in zip(going, chosen, strict=True):
            states[i].append(np.asarray(now[i], dtype=np.float64))
            actions[i].append(int(action))
            now[i], reward, terminated, truncated, _ = environments[i].step(int(action))
            returns[i] += float(reward)
            ended[i] = terminated
            if not terminated and not truncated:
                remaining.append(i)
        going = remaining
    return [np.stack(s) for s in states], [np.array(a) for a in actions], (ended, returns)


def demonstrations(name: str, count: int, keep: int, seed: int) -> Trajectories:
    """Episodes of the expert, cut after `keep` steps."""
    states, actions, (ended, _) = episodes(
        name, functools.partial(expert, name), [10_000 + 100 * seed + i for i in range(count)]
    )
    whole = [len(a) <= keep for a in actions]
    return Trajectories.from_arrays([s[:keep] for s in states], [a[:keep] for a in actions], ended=ended & whole)


def trained(name: str, data: Trajectories, weight: float, next_value: str, steps: int, seed: int) -> float:
    """Mean return of the greedy policy; with weight 0 it is cloned."""
    num_actions = 2 if name == "CartPole-v1" else 3
    program = InverseRL(brm.rewards.StateReward(num_actions), discount=DISCOUNT)
    engine = AVRIL(
        next_value=next_value, kl_weight=weight, constraint_weight=weight, num_steps=steps, batch_size=BATCH,
        learning_rate=1e-3,
    )  # fmt: skip
    posterior: Any = brm.fit(program, data, inference=engine, seed=seed)

    def act(states: Any) -> Any:
        return posterior.action_values(states).argmax(1).numpy()

    return float(episodes(name, act, [50_000 + i for i in range(EPISODES)])[2][1].mean())


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Every case and seed."""
    torch.set_num_threads(1)
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    for name, count, keep in CASES[:1] if quick else CASES:
        found: dict[str, list[float]] = {"cloning": [], "AVRIL": [], "AVRIL, soft values": []}
        own = [50_000 + i for i in range(EPISODES)]
        best = float(episodes(name, functools.partial(expert, name), own)[2][1].mean())
        for seed in range(2 if quick else 10):
            data = demonstrations(name, count, keep, seed)
            steps = 200 if quick else NUM_STEPS
            found["cloning"].append(trained(name, data, 0.0, "trajectory", steps, seed))
            found["AVRIL"].append(trained(name, data, 1.0, "trajectory", steps, seed))
            found["AVRIL, soft values"].append(trained(name, data, 1.0, "soft", steps, seed))
            print(name, count, seed, {k: v[-1] for k, v in found.items()}, file=sys.stderr, flush=True)
        where = f"{name}, {count} demonstrations"
        details[where] = {"expert": best} | found
        claims.append(Claim(f"{where}: return of the expert", Estimate(best, best, best)))
        values = {method: np.array(v) for method, v in found.items()}
        for method in list(values)[1:]:
            values[f"{method} less cloning"] = values[method] - values["cloning"]
        for method, v in values.items():
            estimate = bootstrap(lambda i, v=v: float(v[i].mean()), np.arange(len(v)))
            claims.append(Claim(f"{where}: return of {method}", estimate))
    return claims, {"returns": details}


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], run))

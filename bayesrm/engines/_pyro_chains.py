"""Chains of Pyro's no-U-turn sampler: no JAX needed, slow."""

from typing import TYPE_CHECKING, Any

import pyro.infer
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..backend import seeded
from ._problem import Problem

if TYPE_CHECKING:
    from .nuts import NUTS


def run_chains(
    settings: "NUTS", problem: Problem, starts: Tensor, covariance: Tensor | None, *, seed: int, progress: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `_numpyro_chains.run_chains`."""
    draws, stats = [], []
    total = settings.num_warmup + settings.num_samples
    with tqdm(total=total * settings.num_chains, unit="step", disable=not progress) as bar:
        for chain, start in enumerate(starts):
            with seeded(seed + 7919 * chain):
                found, records = _run_chain(settings, problem, start, covariance, bar)
            draws.append(found)
            stats.append(records)
    return torch.cat(draws), {name: torch.cat([s[name] for s in stats]) for name in stats[0]}


def _run_chain(
    settings: "NUTS", problem: Problem, start: Tensor, covariance: Tensor | None, bar: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    # A fixed metric is the same as unit masses in coordinates y with x = root y.
    root = None if covariance is None else torch.linalg.cholesky(covariance)
    counts: list[int] = [0]
    recorded: dict[str, list[float]] = {"num_steps": [], "accept_prob": []}

    def to_x(y: Tensor) -> Tensor:
        return y if root is None else y @ root.T

    def potential(point: dict[str, Tensor]) -> Tensor:
        counts[0] += 1
        return -problem.log_joints(to_x(point["y"][None]))[0]

    def hook(kernel: Any, _point: Any, stage: str, step: int) -> None:
        bar.update(1)
        if "warmup" not in stage.lower():
            # Pyro keeps the running mean alone.
            recorded["accept_prob"].append((step + 1) * kernel._mean_accept_prob - sum(recorded["accept_prob"]))
            recorded["num_steps"].append(float(counts[0]))
        counts[0] = 0

    kernel = pyro.infer.NUTS(
        potential_fn=potential,
        adapt_mass_matrix=covariance is None,
        full_mass=settings.mass_matrix == "dense",
        target_accept_prob=settings.target_accept,
        max_tree_depth=settings.max_tree_depth,
    )
    begin = start if root is None else torch.linalg.solve_triangular(root, start[:, None], upper=False)[:, 0]
    chain = pyro.infer.MCMC(
        kernel,
        num_samples=settings.num_samples,
        warmup_steps=settings.num_warmup,
        initial_params={"y": begin.clone()},
        hook_fn=hook,
        disable_progbar=True,
    )
    chain.run()
    diverging = torch.zeros(settings.num_samples, dtype=torch.bool)
    # `chain.diagnostics()` shows the same, but computes R-hat on the way and stops where chains are too short for it.
    diverging[chain._diagnostics[0]["divergences"]] = True
    stats = {name: torch.tensor(values, dtype=torch.float64) for name, values in recorded.items()}
    return to_x(chain.get_samples()["y"]), {"diverging": diverging, "num_steps": stats["num_steps"].long()} | {
        "accept_prob": stats["accept_prob"]
    }

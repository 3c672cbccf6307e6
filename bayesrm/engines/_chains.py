"""Convergence of Markov chains in a few numbers, and the sentences that go with them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin

from .._typing import Tensor

#: Above this, chains disagree (Vehtari et al. 2021, 1903.08008), where they have too few effective draws.
R_HAT = 1.01
#: Above this they disagree however many those are; the largest R-hat of hundreds of quantities passes 1.01 by chance.
R_HAT_OF_MANY = 1.05
#: Fewer effective draws than this a chain make R-hat itself unreliable (Vehtari et al. 2021).
ESS_PER_CHAIN = 100
#: Below this, momenta explore the energies too slowly (Betancourt 2016, 1604.00695).
E_BFMI = 0.3


def chain_summary(x: Tensor, stats: Mapping[str, Tensor], num_chains: int, most_steps: int) -> dict[str, Any]:
    """Largest rank-normalised split R-hat and smallest bulk effective sample size over the coordinates, and the rest.

    Args:
        x: Draws, shape `(S, D)`, chain after chain.
        stats: `diverging`, `num_steps`, `accept_prob` and, where the sampler tells it, `energy`; shape `(S,)` each.
        num_chains: Number of chains.
        most_steps: Longest trajectory.

    Returns:
        `divergences`, `r_hat` (NaN for one chain, or fewer than 8 draws), `ess`, `e_bfmi`, `saturated` (share of
        trajectories of full length), `mean_accept`, `leapfrog_steps`, and `problems`, a list of sentences.
    """
    chains = x.reshape(num_chains, -1, x.shape[1])
    r_hat = ess = bfmi = float("nan")
    if chains.shape[1] >= 8:
        scores = _normal_scores(x).reshape(chains.shape)
        ess = float(effective_sample_size(scores, chain_dim=0, sample_dim=1).min())
        if "energy" in stats:
            energy = stats["energy"].reshape(num_chains, -1)
            bfmi = float((energy.diff().square().mean(1) / energy.var(1, correction=0).clamp_min(1e-300)).min())
        if num_chains > 1:
            folded = _normal_scores((x - x.median(0).values).abs()).reshape(chains.shape)
            r_hat = max(float(split_gelman_rubin(c, chain_dim=0, sample_dim=1).max()) for c in (scores, folded))
    found: dict[str, Any] = {
        "divergences": int(stats["diverging"].sum()),
        "r_hat": r_hat,
        "ess": ess,
        "e_bfmi": bfmi,
        "saturated": float((stats["num_steps"] >= most_steps).double().mean()),
        "mean_accept": float(stats["accept_prob"].mean()),
        "leapfrog_steps": int(stats["num_steps"].sum()),
    }
    return found | {"problems": _problems(found, num_chains, len(x))}


def _normal_scores(x: Tensor) -> Tensor:
    """Normal scores of the ranks of each column, shape `(S, D)`."""
    ranks = x.argsort(0).argsort(0).to(x.dtype)
    scores: Tensor = torch.special.ndtri((ranks + 0.625) / (len(x) + 0.25))
    return scores


def _problems(found: Mapping[str, Any], num_chains: int, draws: int) -> list[str]:
    problems = []
    if found["divergences"]:
        problems.append(
            f"{found['divergences']} of {draws} draws diverged: the posterior has regions the sampler cannot enter; "
            "raise `target_accept`, or declare latents in a non-centred form"
        )
    needed = ESS_PER_CHAIN * num_chains
    limit = R_HAT if found["ess"] < needed else R_HAT_OF_MANY
    longer = math.ceil(1.2 * draws / num_chains * needed / max(found["ess"], 1.0) / 100) * 100
    if found["r_hat"] > limit:
        problems.append(
            f"the largest R-hat is {found['r_hat']:.3f}, above {limit}: chains disagree; run them longer, with "
            "`num_warmup` and `num_samples` doubled at least"
        )
    if found["ess"] < min(ESS_PER_CHAIN, draws / num_chains / 4) * num_chains:
        problems.append(
            f"the smallest effective sample size is {found['ess']:.0f} of {draws} draws; about `num_samples={longer}` "
            f"would give {needed}"
        )
    if found["e_bfmi"] < E_BFMI:
        problems.append(f"E-BFMI is {found['e_bfmi']:.2f}, below {E_BFMI}: tails are explored too slowly")
    if found["saturated"] > 0.05:
        problems.append(
            f"{found['saturated']:.0%} of the trajectories reached `max_tree_depth`; raise it, or change `mass_matrix`"
        )
    return problems

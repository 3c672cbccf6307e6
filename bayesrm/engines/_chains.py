"""Convergence of Markov chains in a few numbers, and the sentences that go with them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.ops.stats import split_gelman_rubin

from .._typing import Tensor

#: Above this, chains disagree (Vehtari et al. 2021, 1903.08008), where they have too few effective draws.
R_HAT = 1.01
#: Above this they disagree however many those are; the largest R-hat of hundreds of quantities passes 1.01 by chance.
R_HAT_OF_MANY = 1.05
#: Fewer effective draws than this a chain make R-hat itself unreliable (Vehtari et al. 2021).
ESS_PER_CHAIN = 100
#: Halves of shorter chains are too short to judge anything by.
MIN_DRAWS = 8
#: Below this, momenta explore the energies too slowly (Betancourt 2016, 1604.00695).
E_BFMI = 0.3


def r_hat_limit(ess: float, num_chains: int) -> float:
    """The largest R-hat that chains of so many effective draws may have."""
    return R_HAT_OF_MANY if ess >= ESS_PER_CHAIN * num_chains else R_HAT


def bulk_ess(chains: Tensor) -> Tensor:
    """Effective sample size for the mean of each of D quantities, shape `(D,)`, at most S log10(S).

    Vehtari et al. (2021): split chains, Geyer's initial monotone sequence (1992) over the autocorrelations of all
    chains together. For the bulk, give normal scores of the draws.

    Args:
        chains: Shape `(chains, draws, D)`, at least 4 draws.
    """
    half = chains.shape[1] // 2
    halves = torch.cat([chains[:, :half], chains[:, -half:]])
    size = halves.shape[0] * half
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * half, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * half, dim=1)[:, :half].mean(0) / half
    within = covariance[0] * half / (half - 1)
    total = covariance[0] + halves.mean(1).var(0)
    correlation = 1.0 - (within - covariance) / total
    correlation[0] = 1.0
    pairs = correlation[: half - half % 2].reshape(-1, 2, correlation.shape[1]).sum(1)
    kept = (pairs > 0).cumprod(0)
    monotone = pairs.cummin(0).values * kept
    # The even lag of the first pair that is left out still counts where it is positive (Stan).
    following = torch.nn.functional.pad(correlation[0::2][: len(pairs)], (0, 0, 0, 1))
    first_left = kept.sum(0, keepdim=True)
    extra = following.gather(0, first_left)[0].clamp_min(0.0)
    time = -1.0 + 2.0 * monotone.sum(0) + extra
    # Of antithetic chains it may be negative: they are better than independent draws.
    effective: Tensor = size / time.clamp_min(1.0 / math.log10(size))
    return effective


def chain_summary(x: Tensor, stats: Mapping[str, Tensor], num_chains: int, most_steps: int) -> dict[str, Any]:
    """Largest rank-normalised split R-hat and smallest bulk effective sample size over the coordinates, and the rest.

    Args:
        x: Draws, shape `(S, D)`, chain after chain.
        stats: `diverging`, `num_steps`, `accept_prob` and, where the sampler tells it, `energy`; shape `(S,)` each.
        num_chains: Number of chains.
        most_steps: Longest trajectory.

    Returns:
        `divergences`, `r_hat` (NaN for one chain, or fewer than 8 draws each), `ess` (NaN for fewer than 8 draws each),
        `e_bfmi`, `saturated` (share of trajectories of full length), `mean_accept`, `leapfrog_steps`, and `problems`, a
        list of sentences.
    """
    chains = x.reshape(num_chains, -1, x.shape[1])
    r_hat = ess = bfmi = float("nan")
    if chains.shape[1] >= MIN_DRAWS:
        scores = _normal_scores(x).reshape(chains.shape)
        ess = float(bulk_ess(scores).min())
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
    problems, length = [], draws // num_chains
    if num_chains == 1:
        problems.append("one chain cannot show whether chains agree; run at least 2, better 4")
    if length < MIN_DRAWS:
        problems.append(
            f"{length} draws a chain are too few to judge the chains by; `num_samples` should be {ESS_PER_CHAIN} at "
            "least"
        )
    if found["divergences"]:
        problems.append(
            f"{found['divergences']} of {draws} draws diverged: the posterior has regions the sampler cannot enter; "
            "raise `target_accept`, or declare latents in a non-centred form"
        )
    needed = ESS_PER_CHAIN * num_chains
    limit = r_hat_limit(found["ess"], num_chains)
    if found["r_hat"] > limit:
        problems.append(
            f"the largest R-hat is {found['r_hat']:.3f}, above {limit}: chains disagree; run them longer, with "
            "`num_warmup` and `num_samples` doubled at least"
        )
    if found["ess"] < min(ESS_PER_CHAIN, length / 4) * num_chains:
        longer = math.ceil(1.2 * length * needed / found["ess"] / 100) * 100
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

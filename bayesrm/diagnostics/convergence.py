"""Did the Markov chains converge? R-hat, effective sample sizes, and the sampler's own warnings."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _arviz
from .._typing import Tensor
from ..data import Comparisons
from ..engines import Posterior
from ..engines._chains import E_BFMI, ESS_PER_CHAIN, R_HAT, R_HAT_OF_MANY
from ..engines.draws_posterior import DrawsPosterior
from ..errors import ArgumentError

#: Each half of a chain needs two draws for a variance.
MIN_DRAWS = 4
#: Share of trajectories of full length that costs little.
_MOST_SATURATED = 0.05

#: What tells whether another engine did its work.
_INSTEAD = {
    "MAP": "look at `report.gradient_norm`",
    "Laplace": "look at `report.gradient_norm`, and at the k-hat of `diagnostics.loo` or of ImportanceSampling",
    "SVI": "look at `report.diagnostics`, and at the k-hat of `diagnostics.loo` or of ImportanceSampling",
    "ImportanceSampling": "look at `k_hat` and `ess` in `report.diagnostics`",
    "Ensemble": "look at calibration on held-out prompts",
}


@dataclasses.dataclass(frozen=True)
class Convergence:
    """What chains tell about their convergence; quantities are reward differences and latents.

    Attributes:
        names: Name of each quantity, for instance `"reward[3] - reward[0]"` (items) or `"tie_width"`.
        mean: Posterior mean of each, shape `(n,)`.
        mcse: Monte Carlo standard error of the mean, shape `(n,)`.
        r_hat: Rank-normalised split R-hat, shape `(n,)`; NaN with a single chain.
        ess_bulk: Effective sample size for the bulk, shape `(n,)`.
        ess_tail: The smaller of those of the 5% and 95% quantiles, shape `(n,)`.
        num_chains: Number of chains.
        num_draws: Draws of each chain.
        divergences: Number of divergent transitions, or `None` if the sampler records none.
        e_bfmi: Energy Bayesian fraction of missing information of each chain, or `None` without energies.
        saturated: Number of trajectories that stopped at the largest tree depth, or `None` when it is unknown.
        num_left_out: Reward differences that were not looked at, since there are so many.
        problems: What is wrong, a sentence each; empty when nothing is.
    """

    names: tuple[str, ...]
    mean: Tensor
    mcse: Tensor
    r_hat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    num_chains: int
    num_draws: int
    divergences: int | None
    e_bfmi: Tensor | None
    saturated: int | None
    num_left_out: int
    problems: list[str]

    @property
    def converged(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.num_chains} chains of {self.num_draws} draws, {len(self.names)} quantities"
        if not self.names:
            return "\n".join([head, *self.problems])
        figures = (
            f"largest R-hat {_worst(self.r_hat, np.max):.3f}, smallest bulk ESS {_worst(self.ess_bulk, np.min):.0f}, "
            f"tail ESS {_worst(self.ess_tail, np.min):.0f}"
        )
        return "\n".join([f"{head}: {figures}", *(self.problems or ["no sign of trouble"])])


def convergence(posterior: Posterior, data: Comparisons | None = None, *, max_differences: int = 500) -> Convergence:
    """Checks Markov chains by what is identified: differences of rewards inside each prompt, and the latents.

    The rewards themselves are looked at where the likelihood sees more than differences (ratings, approvals). At least
    100 effective draws a chain are wanted, which `report.converged` does not ask of chains shorter than 400 draws.

    Args:
        posterior: A posterior of NUTS.
        data: Whose items' rewards to look at; without it the coordinates that the sampler moved in are.
        max_differences: Largest number of rewards or differences, spread evenly over the prompts.

    Raises:
        ArgumentError: The posterior has no Markov chains, so that R-hat would mean nothing, or they have fewer than
            four draws.
        EngineError: ArviZ is not installed.
    """
    name = str(posterior.report.engine["name"])
    if not isinstance(posterior, DrawsPosterior) or (
        posterior.num_chains == 1 and "diverging" not in posterior.sample_stats
    ):
        raise ArgumentError(
            f"the posterior comes from {name}, whose draws are not a Markov chain: R-hat would be near 1 however wrong "
            f"they are; {_INSTEAD.get(name, 'see what its report tells')}"
        )
    if data is None:
        names = [f"z[{i}]" for i in range(posterior.z.shape[1])]
        latents = posterior.latents(len(posterior))
        left_out, values = 0, posterior.z
    else:
        draws = posterior.draw(data, num_samples=len(posterior))
        density = posterior._density_of(data)
        names, left_out, values = _rewards(draws.rewards, data, density.only_differences(), max_differences)
        latents = density.constrain(draws.latents)
    for site, drawn in latents.items():
        names += [site + _index(i, drawn.shape[1:]) for i in range(drawn[0].numel())]
    values = torch.cat([values, *(drawn.reshape(len(values), -1) for drawn in latents.values())], dim=1)
    depth = posterior.report.engine.get("settings", {}).get("max_tree_depth")
    return of_chains(
        values,
        names,
        num_chains=posterior.num_chains,
        sample_stats=posterior.sample_stats,
        max_tree_depth=depth,
        num_left_out=left_out,
    )


def of_chains(
    values: Tensor,
    names: Sequence[str],
    *,
    num_chains: int,
    sample_stats: Mapping[str, Tensor] | None = None,
    max_tree_depth: int | None = None,
    num_left_out: int = 0,
) -> Convergence:
    """Checks draws of any quantities, for instance of a sampler of your own.

    Quantities that never change (differences of equal items) are left aside, unless none changes.

    Args:
        values: Draws, shape `(S, n)`, chain after chain.
        names: Name of each quantity.
        num_chains: Number of chains.
        sample_stats: What the sampler recorded: `diverging`, `energy`, `num_steps`, each of shape `(S,)`.
        max_tree_depth: Depth at which trajectories stop.
        num_left_out: Quantities that were not looked at.

    Raises:
        ArgumentError: The chains have fewer than four draws.
        EngineError: ArviZ is not installed.

    Example:
        >>> draws = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> of_chains(draws, ["theta"], num_chains=4).converged
        True
        >>> of_chains(draws.sort(0).values, ["theta"], num_chains=4).converged
        False
    """
    stats = sample_stats or {}
    length = len(values) // num_chains
    if length < MIN_DRAWS:
        raise ArgumentError(f"chains have {length} draws; R-hat needs at least {MIN_DRAWS}")
    if len(names) != values.shape[1]:
        raise ArgumentError(f"`names` has {len(names)} entries for {values.shape[1]} quantities")
    broken = ~torch.isfinite(values).all(0)
    moves = broken | ((values.amax(0) - values.amin(0)) > 1e-12 * values.abs().amax(0))
    used = moves if bool(moves.any()) else torch.ones_like(moves)
    chains = values[:, used].reshape(num_chains, length, -1).detach().cpu().double().numpy()
    constant = not bool(moves.any()) and values.shape[1] > 0

    def measured(measure: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Tensor:
        return torch.full((chains.shape[2],), torch.nan).double() if constant else torch.from_numpy(measure(chains))

    energies = stats["energy"].reshape(num_chains, -1) if "energy" in stats else None
    steps = stats.get("num_steps")
    result = Convergence(
        names=tuple(n for n, keep in zip(names, used.tolist(), strict=True) if keep),
        mean=torch.from_numpy(chains.mean((0, 1))),
        mcse=measured(_arviz.mcse_mean),
        r_hat=measured(_arviz.r_hat) if num_chains > 1 else torch.full((chains.shape[2],), torch.nan).double(),
        ess_bulk=measured(_arviz.ess_bulk),
        ess_tail=measured(_arviz.ess_tail),
        num_chains=num_chains,
        num_draws=length,
        divergences=int(stats["diverging"].sum()) if "diverging" in stats else None,
        e_bfmi=None if energies is None else energies.diff(dim=1).square().mean(1) / energies.var(1),
        saturated=None if steps is None or max_tree_depth is None else int((steps >= 2**max_tree_depth - 1).sum()),
        num_left_out=num_left_out,
        problems=[],
    )
    return dataclasses.replace(result, problems=_problems(result))


def _rewards(rewards: Tensor, data: Comparisons, only_differences: bool, most: int) -> tuple[list[str], int, Tensor]:
    """Names, number left out and draws of what is identified: differences to each prompt's first item, or rewards."""
    labels = [str(i) for i in range(data.num_items)] if data.ids is None else list(data.ids)
    prompt = np.asarray(data.prompt_of_item)
    _, first, owner = np.unique(prompt, return_index=True, return_inverse=True)
    base = first[owner.reshape(-1)]
    items = np.flatnonzero(base != np.arange(len(base))) if only_differences else np.arange(len(base))
    left_out = max(0, len(items) - most)
    if left_out:
        items = items[np.linspace(0, len(items) - 1, most).round().astype(int)]
    if not only_differences:
        return [f"reward[{labels[i]}]" for i in items], left_out, rewards[:, items]
    names = [f"reward[{labels[i]}] - reward[{labels[base[i]]}]" for i in items]
    return names, left_out, rewards[:, items] - rewards[:, base[items]]


def _index(position: int, shape: torch.Size) -> str:
    return "" if not shape else "[" + ", ".join(str(i) for i in np.unravel_index(position, shape)) + "]"


def _problems(c: Convergence) -> list[str]:
    problems = []
    if c.num_chains == 1:
        problems.append("One chain cannot show whether chains agree; run at least 2, better 4.")
    broken = [name for name, mean in zip(c.names, c.mean.tolist(), strict=True) if not math.isfinite(mean)]
    if broken:
        shown = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        problems.append(f"{len(broken)} of {len(c.names)} quantities have draws that are no finite numbers: {shown}.")
    if c.names and not broken and bool(torch.isnan(c.mcse).all()):
        problems.append("The chains never moved: all draws are equal.")
    disagree = torch.where(torch.isnan(c.r_hat), 0.0, c.r_hat)
    few = ~(c.ess_bulk >= ESS_PER_CHAIN * c.num_chains)
    limit = torch.where(few, R_HAT, R_HAT_OF_MANY)
    if bool((disagree > limit).any()):
        problems.append(
            f"R-hat is above {R_HAT} for {_count(disagree > R_HAT, c)} (largest {float(disagree.max()):.3f}, of "
            f"{c.names[int(disagree.argmax())]}): chains disagree; run them longer."
        )
    for name, ess, doubtful in (("bulk", c.ess_bulk, "means"), ("tail", c.ess_tail, "interval ends")):
        known = torch.where(torch.isnan(ess), torch.inf, ess)
        least = ESS_PER_CHAIN * c.num_chains
        if bool((known < least).any()):
            problems.append(
                f"The {name} effective sample size is below {least} for {_count(known < least, c)} (smallest "
                f"{float(known.min()):.1f} of {c.num_chains * c.num_draws} draws, of {c.names[int(known.argmin())]}): "
                f"{doubtful} are uncertain; run longer chains."
            )
    if c.divergences:
        problems.append(
            f"{c.divergences} of {c.num_chains * c.num_draws} draws diverged: the posterior has a region that the "
            "sampler cannot enter; raise `target_accept`, or declare latents in a non-centred form."
        )
    if c.e_bfmi is not None and bool((c.e_bfmi < E_BFMI).any()):
        problems.append(
            f"E-BFMI is below {E_BFMI} in {int((c.e_bfmi < E_BFMI).sum())} chains (smallest "
            f"{float(c.e_bfmi.min()):.2f}): tails are explored too slowly; declare latents with heavy tails in "
            "another form."
        )
    if c.saturated and c.saturated > _MOST_SATURATED * c.num_chains * c.num_draws:
        problems.append(
            f"{c.saturated} trajectories stopped at the largest tree depth: draws are less independent than they could "
            "be; raise `max_tree_depth`."
        )
    return problems


def _count(bad: Tensor, c: Convergence) -> str:
    return f"{int(bad.sum())} of {len(c.names)} quantities"


def _worst(values: Tensor, worst: Callable[[NDArray[np.float64]], float]) -> float:
    known = values[~torch.isnan(values)]
    return float(worst(known.numpy())) if len(known) else float("nan")

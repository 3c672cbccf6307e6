"""Simulation-based calibration: does an engine, run on data of known origin, find the truth as often as it should?"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.ops.stats import effective_sample_size
from tqdm import tqdm

from .._typing import Tensor
from ..data import Comparisons
from ..engines import DrawsPosterior, Engine, Posterior, fit
from ..engines._digest import feedback_digest
from ..engines._pairwise import bound_pairs
from ..errors import ArgumentError, EngineError
from ..programs import RewardModel
from ..rewards import PairwiseHead, PairwisePreference
from ..rewards.pairwise_preference import check_choices
from ._sbc_checkpoint import Checkpoint, Replicate, described
from ._sbc_quantities import DefaultQuantities, Quantities
from ._sbc_ranks import holm, normal_scores, uniformity_p_values

#: Fewer ranks than this say nothing.
_LEAST_REPLICATES = 10
#: Adjusted p-values below this are reported as a wrong posterior.
_DOUBT = 0.01
#: Fewer replicates than this show gross faults alone.
_FEW_REPLICATES = 100
#: A larger share of refused fits leaves no verdict.
_MOST_REFUSED = 0.02


@dataclasses.dataclass(frozen=True)
class SBC:
    """Ranks of truths among posterior draws, and whether they are uniform.

    Attributes:
        names: The quantities.
        ranks: Number of draws below the truth, 0 to `num_draws`, shape `(replicates, quantities)`.
        num_draws: Number of draws each truth was ranked among.
        p_values: Probability of ranks so uneven under the right posterior, by quantity, shape `(quantities,)`.
        adjusted: The same, adjusted for the number of quantities (Holm 1979); the least of them is the verdict.
        shift: Mean normal score of the ranks: how far truths lie above the posterior, in its standard deviations.
        spread: Standard deviation of the normal scores: above 1 the posterior is too narrow, below 1 too wide.
        refusals: Why the engine refused to fit a replicate, one sentence each. Refused replicates have no ranks: were
            refusals to depend on the truth, ranks would be uneven under the right posterior too, and even under a wrong
            one. Above 2% of the replicates there is no verdict.
        num_unconverged: Fits that say they did not converge; their ranks count.
        num_autocorrelated: Markov chains whose effective sample size is below `num_draws`; their ranks count, and are
            more often extreme than those among independent draws.
    """

    names: tuple[str, ...]
    ranks: NDArray[np.int64]
    num_draws: int
    p_values: NDArray[np.float64]
    adjusted: NDArray[np.float64]
    shift: NDArray[np.float64]
    spread: NDArray[np.float64]
    refusals: tuple[str, ...] = ()
    num_unconverged: int = 0
    num_autocorrelated: int = 0

    @property
    def p_value(self) -> float:
        """The smallest adjusted p-value: that of the hypothesis that all quantities are calibrated."""
        return float(self.adjusted.min())

    @property
    def share_refused(self) -> float:
        """Share of the replicates that the engine refused to fit."""
        return len(self.refusals) / (len(self.refusals) + len(self.ranks))

    def __str__(self) -> str:
        worst = int(self.adjusted.argmin())
        verdict = "no sign of a wrong posterior"
        if len(self.ranks) < _FEW_REPLICATES:
            # Four standard errors of the standard deviation of n normal scores, sqrt(1 / 2n).
            seen = 4.0 * math.sqrt(0.5 / len(self.ranks))
            verdict += f"; so few show only gross faults, such as standard deviations {seen:.0%} off"
        if self.share_refused > _MOST_REFUSED:
            verdict = (
                f"the posterior cannot be judged, for {self.share_refused:.0%} of the fits were refused (at most "
                f"{_MOST_REFUSED:.0%} may be), and ranks of the rest are uneven if refusals depend on the truth"
            )
        elif self.p_value < _DOUBT:
            verdict = (
                f"the posterior is wrong, most clearly about {self.names[worst]}: truths lie {self.shift[worst]:+.2f} "
                f"of its standard deviations off, and spread {self.spread[worst]:.2f} times as wide as it says"
            )
        lines = [f"{len(self.ranks)} simulations, smallest adjusted p = {self.p_value:.2g}: {verdict}"]
        width = max(len(name) for name in self.names)
        lines += [
            f"  {name:<{width}}  shift {shift:+.3f}  spread {spread:.3f}  p = {p:.2g}"
            for name, shift, spread, p in zip(self.names, self.shift, self.spread, self.p_values, strict=True)
        ]
        counts = (
            (len(self.refusals), "fits were refused and have no ranks"),
            (self.num_unconverged, "fits did not converge"),
            (self.num_autocorrelated, "chains have fewer effective draws than were ranked"),
        )
        return "\n".join(lines + [f"  {count} {what}" for count, what in counts if count])

    def plot(self) -> Any:
        """A matplotlib figure: for each quantity the ranks' distribution less the uniform one, with its band.

        `diagnostics.plots.plot_ranks` and `plot_ecdf_difference` draw one quantity.
        """
        from matplotlib.figure import Figure

        from .plots import plot_ecdf_difference

        columns = min(3, len(self.names))
        rows = -(-len(self.names) // columns)
        figure = Figure(figsize=(4.0 * columns, 3.0 * rows), dpi=130, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes, name, ranks in zip(grid, self.names, self.ranks.T, strict=False):
            plot_ecdf_difference(ranks, self.num_draws, axes, label=name)
        for axes in grid[len(self.names) :]:
            axes.set_axis_off()
        return figure


def simulation_based_calibration(
    program: RewardModel,
    design: Comparisons,
    engine: Engine,
    *,
    num_replicates: int = 500,
    num_draws: int = 99,
    quantities: Quantities | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> SBC:
    """Draws truths from the prior and feedback from them, fits, and ranks each truth among posterior draws.

    Under the right posterior ranks are uniform, whatever the model and however few the data (Talts et al. 2018,
    1804.06788). Uniform ranks of some quantities do not prove a posterior right; the default ones include the log joint
    because it depends on the feedback: a posterior equal to the prior is calibrated for all that does not (Modrak et
    al. 2023, 2211.02383). Uniformity is tested by the statistic of Saeilynoja et al. (2022, 2103.10522).

    Posteriors made of draws are thinned evenly to `num_draws`, so that those of a Markov chain are nearly independent;
    give the engine some five times as many. The engine must keep the declared prior: one that tunes it is judged by a
    prior it did not use.

    Args:
        program: The reward model, with a head or a `PairwisePreference`.
        design: Which items are compared, by whom, in which kind of feedback; outcomes are ignored. Weights are 0 or 1.
        engine: The engine.
        num_replicates: Number of simulations.
        num_draws: Draws each truth is ranked among; `num_draws + 1` should have many divisors, for histograms.
        quantities: A function of draws of the items' rewards `(S, items)` and constrained latents `(S, *site)` that
            returns the quantities to rank by name, each of shape `(S,)`; by default reward differences of three rows,
            up to four components of each latent, and the log joint. With a `PairwisePreference` it gets the scores of
            the rows' first responses against their second, `(S, rows)`, in the place of rewards.
        seed: Seed. Replicate i depends on it and on i alone.
        checkpoint: File that keeps finished replicates, and from which a stopped run, or one of fewer replicates, goes
            on, in another process too. It knows a likelihood, engine and quantities of your own by their source, and
            quantities by their names: those of another calibration are refused.
        progress: Whether to show progress.

    Raises:
        ArgumentError: A number is too small, the weights are not 0 or 1, the posterior holds too few draws, or
            `quantities` returns other names in one replicate than in another.
        DataError: A pairwise preference meets a row that is no choice between two responses.
        EngineError: The engine refused every replicate.
        PersistenceError: The checkpoint holds another calibration or cannot be read.

    Example:
        >>> import bayesrm as brm
        >>> design = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1], [1, 2]], outcome=[0, 0])
        >>> head = brm.rewards.Linear(standardize=False)
        >>> model = brm.RewardModel(head, brm.likelihoods.BradleyTerry())
        >>> found = simulation_based_calibration(model, design, brm.Laplace(), num_replicates=20)
        >>> found.names
        ('reward[0] - reward[1]', 'reward[1] - reward[2]', 'log joint')
    """
    if num_replicates < _LEAST_REPLICATES:
        raise ArgumentError(f"`num_replicates` is {num_replicates}; fewer than {_LEAST_REPLICATES} ranks say nothing")
    if num_draws < 1:
        raise ArgumentError(f"`num_draws` is {num_draws}; at least 1 draw is needed")
    weights = torch.cat([g.weight for g in design.groups()])
    if bool(((weights != 0) & (weights != 1)).any()):
        raise ArgumentError("`design` has weights other than 0 and 1; feedback is simulated without weights")
    identity = {
        "program": described(program),
        "design": feedback_digest(design),
        "engine": described(engine),
        "num_draws": num_draws,
        "seed": seed,
        "quantities": described(quantities),
    }
    pairs = None
    if isinstance(program.reward, PairwisePreference | PairwiseHead):
        # Scores of pairs stand where rewards of items do; which pairs and features there are, no outcome changes.
        pairs = _pairs_of_rows(design)
        program, design = bound_pairs(program, design, progress=progress)
        quantities = None if quantities is None else _of_scores(quantities, _pairs_of_rows(design))
    if checkpoint is not None and quantities is not None:
        identity["names"] = _names(program, design, quantities, seed)
    done = Checkpoint(checkpoint, identity)
    default = DefaultQuantities(program, design, pairs) if quantities is None else None
    # Refused replicates carry no ranks, and are made up for by none: that would favour what is easy to fit.
    for index in tqdm(range(len(done.replicates), num_replicates), unit="fit", disable=not progress):
        done.add(_replicate(program, design, engine, num_draws, quantities or default, seed, index))
    return _collect(done.replicates[:num_replicates], num_draws)


def _names(program: RewardModel, design: Comparisons, quantities: Quantities, seed: int) -> list[str]:
    """Names of what is ranked, from the quantities of a truth."""
    truth = program.simulate(design, seed=seed)
    return list(quantities(truth.rewards[None], {site: value[None] for site, value in truth.latents.items()}))


def _pairs_of_rows(data: Comparisons) -> Tensor:
    """The two items of each row, shape `(rows, 2)`, of data that hold nothing but choices between two responses."""
    check_choices(data)
    pairs = torch.zeros(len(data), 2, dtype=torch.int64)
    for group in data.groups():
        pairs[group.rows] = group.items
    return pairs


def _of_scores(quantities: Quantities, pairs: Tensor) -> Quantities:
    """The quantities as a function of the rewards of items that are pairs, and a pair of nothing for each prompt."""

    def measured(rewards: Tensor, latents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return quantities(rewards[:, pairs[:, 0]] - rewards[:, pairs[:, 1]], latents)

    return measured


def _replicate(
    program: RewardModel,
    design: Comparisons,
    engine: Engine,
    num_draws: int,
    quantities: Any,
    seed: int,
    index: int,
) -> Replicate:
    truth_seed, fit_seed, draw_seed, tie_seed = (
        int(s) for s in np.random.SeedSequence([seed, index]).generate_state(4)
    )
    simulation = program.simulate(design, seed=truth_seed)
    try:
        posterior = fit(program, simulation.data, inference=engine, seed=fit_seed)
    except EngineError as error:
        return Replicate(None, str(error))
    density = posterior._density_of(simulation.data)

    def measured(rewards: Tensor, latents: Tensor) -> dict[str, Tensor]:
        constrained = density.constrain(latents)
        if isinstance(quantities, DefaultQuantities):
            return quantities(rewards, constrained, density, latents)
        return dict(quantities(rewards, constrained))

    true = measured(simulation.rewards[None], density.unconstrain(simulation.latents)[None])
    held = len(posterior) if isinstance(posterior, DrawsPosterior) else num_draws
    if held < num_draws:
        raise ArgumentError(f"`num_draws` is {num_draws}, and the posterior holds {held} draws; ask for fewer")
    draws = posterior.draw(simulation.data, num_samples=held, seed=draw_seed)
    values = measured(draws.rewards, draws.latents)
    rng = np.random.default_rng(tie_seed)
    kept = ((torch.arange(num_draws) + 0.5) * held / num_draws).long()
    ranks = {}
    for name, value in values.items():
        thinned, at = value[kept], true[name]
        ties = int((thinned == at).sum())
        ranks[name] = int((thinned < at).sum()) + int(rng.integers(0, ties + 1))
    independent = _effective(posterior, values) >= num_draws
    return Replicate(ranks, None, posterior.report.converged, independent)


def _effective(posterior: Posterior, values: dict[str, Tensor]) -> float:
    """Smallest effective sample size of the quantities; infinite for draws that no Markov chain made."""
    if not isinstance(posterior, DrawsPosterior) or "diverging" not in posterior.sample_stats:
        return float("inf")
    chains = torch.stack(list(values.values()), dim=1).reshape(posterior.num_chains, -1, len(values))
    return float(effective_sample_size(chains, chain_dim=0, sample_dim=1).min())


def _collect(replicates: list[Replicate], num_draws: int) -> SBC:
    refusals = tuple(r.refusal for r in replicates if r.refusal is not None)
    ranked = [r for r in replicates if r.ranks is not None]
    if not ranked:
        raise EngineError(f"the engine refused all {len(replicates)} simulations; the first: {refusals[0]}")
    names = tuple(ranked[0].ranks or {})
    for r in ranked:
        if set(r.ranks or {}) != set(names):
            raise ArgumentError(
                f"`quantities` gave {sorted(names)} in one replicate and {sorted(r.ranks or {})} in another; return "
                "the same names each time"
            )
    ranks = np.array([[(r.ranks or {})[name] for name in names] for r in ranked], dtype=np.int64)
    p_values = uniformity_p_values(ranks, num_draws)
    scores = normal_scores(ranks, num_draws)
    return SBC(
        names,
        ranks,
        num_draws,
        p_values,
        holm(p_values),
        scores.mean(0),
        scores.std(0),
        refusals,
        sum(not r.converged for r in ranked),
        sum(not r.independent for r in ranked),
    )

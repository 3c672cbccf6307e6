"""Leave one prompt out, without refitting: how well does a model predict feedback on a prompt that it has not seen?"""

import dataclasses
import enum
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from .._arviz import ess_mean
from .._typing import Tensor
from ..data import Comparisons
from ..engines import Posterior
from ..engines._density import FeedbackDensity
from ..engines._digest import feedback_digest
from ..engines._evaluation import evaluations
from ..engines._settings import check_choice
from ..engines.draws import JointDraws
from ..engines.psis import MIN_DRAWS, k_hat_threshold, pareto_smooth
from ..errors import ArgumentError, EngineError, ParetoWarning

#: Engines whose draws are not draws of a posterior that importance weights could move.
_UNWEIGHABLE = {"MAP": "a point estimate", "Ensemble": "an ensemble, whose members follow no known density"}


class LeaveOut(enum.StrEnum):
    """What is left out at a time."""

    PROMPT = "prompt"
    """All rows about one prompt: predicts feedback on new prompts."""
    ROW = "row"
    """One row: predicts another answer about prompts that were seen."""


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Expected log predictive density under leave-one-out, in nats.

    Attributes:
        elpd: Sum of `pointwise`.
        se: Its standard error over units, sqrt(n var(pointwise)), with n - 1 in the variance.
        p_loo: Effective number of parameters: log density of the feedback when nothing is left out, minus `elpd`.
        pointwise: For each unit left out log p(its rows | all others), rows weighted, shape `(n,)`.
        mcse: Monte Carlo standard error of each, shape `(n,)`; of little meaning where `k_hat` is above `threshold`.
        k_hat: Shape of the tail of each unit's importance weights, shape `(n,)`. Of refitted units: of the weights that
            correct the refit, or of the densities that are averaged if theirs is heavier; 0 for fewer than 25 draws.
        threshold: Largest reliable k-hat.
        refitted: Which units were refitted, shape `(n,)`.
        units: Which prompts (or rows) they are, as the data number them, shape `(n,)`.
        weight: Summed weight of the rows of each, shape `(n,)`.
        by: What is left out at a time.
        num_draws: Number of draws.
        data_digest: Digest of the feedback.
    """

    elpd: float
    se: float
    p_loo: float
    pointwise: Tensor
    mcse: Tensor
    k_hat: Tensor
    threshold: float
    refitted: Tensor
    units: NDArray[np.int64]
    weight: Tensor
    by: LeaveOut
    num_draws: int
    data_digest: str

    @property
    def num_unreliable(self) -> int:
        """Number of units whose importance weights cannot be trusted."""
        return int((self.k_hat > self.threshold).sum())

    def __str__(self) -> str:
        parts = [f"elpd {self.elpd:.1f} +- {self.se:.1f} over {len(self.units)} {self.by}s", f"p_loo {self.p_loo:.1f}"]
        if bool(self.refitted.any()):
            parts.append(f"{int(self.refitted.sum())} refitted")
        parts.append(f"k-hat above {self.threshold:.2f} for {self.num_unreliable}")
        return ", ".join(parts)


def loo(
    posterior: Posterior,
    data: Comparisons,
    by: str = "prompt",
    *,
    num_samples: int = 4000,
    seed: int = 0,
    refit: Callable[[Comparisons], Posterior] | None = None,
) -> LeaveOneOut:
    """Leave-one-prompt-out by Pareto-smoothed importance sampling.

    A draw theta of the posterior is weighted by 1 / p(rows of the prompt | theta), and where the engine is approximate
    also by p(feedback, theta) / q(theta), which corrects it (Vehtari, Gelman & Gabry 2017, arXiv 1507.04544; Magnusson
    et al. 2019, arXiv 1904.10679). The result is about the *exact* posterior of the model whichever of Laplace,
    SVI, NUTS or ImportanceSampling made the draws, with the prior precision that the fit used. After Laplace on a head
    that is not linear, or on adapters, the model is the linear one at the mode, not the network: the other engines'
    results are about the network.

    A prompt with many rows moves the posterior so far that weights cannot follow; its k-hat is then above the threshold
    and its estimate is too high as a rule. `refit` fits those prompts anew without their rows, for instance
    `refit=lambda rest: brm.fit(model, rest)`. Rows count with their weights, as in the fit.

    Args:
        posterior: The posterior.
        data: The feedback it was fitted on.
        by: `"prompt"` or `"row"`, what is left out at a time.
        num_samples: Number of draws; a posterior made of draws gives those it has, at most as many.
        seed: Seed of the draws.
        refit: Fits a posterior to the remaining data. It is called for each unreliable unit; for every unit when the
            posterior is a point or an ensemble, which importance weights cannot move.

    Raises:
        ArgumentError: The data are not those of the fit, there are fewer than two units, or the posterior cannot be
            weighted and `refit` is not given.
        EngineError: ArviZ is not installed.

    Warns:
        ParetoWarning: Some units have a k-hat above the threshold.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> pairs = np.arange(40).reshape(20, 2)
        >>> data = brm.Comparisons.from_arrays(rng.normal(size=(40, 2)), candidates=pairs, outcome=[0, 1] * 10)
        >>> posterior = brm.fit(brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry()), data)
        >>> result = loo(posterior, data)
        >>> len(result.pointwise), result.num_unreliable, result.elpd < 0
        (20, 0, True)
    """
    check_choice("by", by, LeaveOut)
    unit = LeaveOut(by)
    known, digest = posterior.report.data_digest, feedback_digest(data)
    if known is not None and known != digest:
        raise ArgumentError(
            "`data` are not the feedback that the posterior was fitted on, which leave-one-out takes apart; "
            "score other data with `posterior.predict_feedback`"
        )
    draws = posterior.weighted_draws(data, num_samples=num_samples, seed=seed)
    num_draws = len(draws.rewards)
    obstacle = _UNWEIGHABLE.get(str(posterior.report.engine["name"]))
    if obstacle is None and num_draws < MIN_DRAWS:
        obstacle = f"made of {num_draws} draws, fewer than the {MIN_DRAWS} from which weights can be judged"
    if obstacle is not None and refit is None:
        raise ArgumentError(
            f"the posterior is {obstacle}; pass `refit`, which fits it anew without each {unit}, or use Laplace, SVI "
            "or NUTS"
        )
    owner = np.asarray(data.prompt_of_row) if unit is LeaveOut.PROMPT else np.arange(len(data))
    units, weight, log_lik = _by_unit(posterior._density_of(data), draws, owner)
    if len(units) < 2:
        raise ArgumentError(f"the rows that count are about {len(units)} {unit}; leaving one out needs at least 2")
    threshold = k_hat_threshold(max(num_draws, MIN_DRAWS))
    scores = [_weighted(column, draws) if obstacle is None else None for column in log_lik.T]
    refitted = [refit is not None and (s is None or s.k_hat > threshold) for s in scores]
    if refit is not None:
        for i in np.flatnonzero(refitted):
            scores[i] = _refitted(refit, data, owner == units[i], num_samples, seed)
    elpd, mcse, k_hat = torch.tensor([dataclasses.astuple(s) for s in scores if s is not None], dtype=torch.float64).T
    full = torch.logsumexp(log_lik + _log_weights(draws)[:, None], dim=0)
    result = LeaveOneOut(
        elpd=float(elpd.sum()),
        se=math.sqrt(len(units) * float(elpd.var())),
        p_loo=float((full - elpd).sum()),
        pointwise=elpd,
        mcse=mcse,
        k_hat=k_hat,
        threshold=threshold,
        refitted=torch.tensor(refitted),
        units=units,
        weight=weight,
        by=unit,
        num_draws=num_draws,
        data_digest=digest,
    )
    if result.num_unreliable:
        hint = "" if refit is not None else "; pass `refit` to fit the model anew without them"
        warnings.warn(
            f"the importance weights of {result.num_unreliable} of {len(units)} {unit}s have a k-hat above "
            f"{threshold:.2f} (largest {float(k_hat.max()):.2f}): their estimates are not reliable{hint}",
            ParetoWarning,
            stacklevel=2,
        )
    return result


@dataclasses.dataclass(frozen=True)
class _Score:
    """Of one unit: log predictive density, its Monte Carlo standard error, k-hat."""

    elpd: float
    mcse: float
    k_hat: float


def _by_unit(
    density: FeedbackDensity, draws: JointDraws, owner: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Tensor, Tensor]:
    """The units with rows that count, the summed weight of each, and its weighted log likelihood `(draws, units)`."""
    weight_of_row = torch.zeros(len(owner), dtype=torch.float64)
    for g in density.groups:
        weight_of_row[g.rows] = g.weight
    counted = weight_of_row > 0
    units, place = np.unique(owner[counted.numpy()], return_inverse=True)
    place_of_row = torch.full((len(owner),), -1)
    place_of_row[counted] = torch.from_numpy(place.reshape(-1))
    weight = torch.zeros(len(units), dtype=torch.float64)
    weight.index_add_(0, place_of_row[counted], weight_of_row[counted])
    total = torch.zeros(len(draws.rewards), len(units), dtype=torch.float64)
    for part in evaluations(density, draws):
        for g, values in zip(density.groups, part.log_probs, strict=True):
            keep = g.weight > 0
            total[part.draws] = total[part.draws].index_add(
                1, place_of_row[g.rows[keep]], g.weight[keep] * values[:, keep]
            )
    return units, weight, total


def _log_weights(draws: JointDraws) -> Tensor:
    """Log weights that make the draws those of the exact posterior, summing to 1, shape `(S,)`."""
    count = len(draws.rewards)
    if draws.log_ratio is None or count < MIN_DRAWS:
        return torch.full((count,), -math.log(count), dtype=torch.float64)
    return pareto_smooth(draws.log_ratio).log_weights


def _weighted(log_lik: Tensor, draws: JointDraws) -> _Score:
    """The score of a unit with the given log likelihood, shape `(S,)`, from draws that have seen it."""
    log_weights = -log_lik if draws.log_ratio is None else draws.log_ratio - log_lik
    efficiency = _relative_efficiency(log_lik, draws)
    smooth = pareto_smooth(log_weights, relative_efficiency=efficiency)
    return _averaged(log_lik, smooth.log_weights, smooth.k_hat, efficiency)


def _averaged(log_lik: Tensor, log_weights: Tensor, k_hat: float, efficiency: float) -> _Score:
    elpd = torch.logsumexp(log_weights + log_lik, dim=0)
    # Delta method for the logarithm of a self-normalised average (Vehtari et al. 2024, arXiv 1507.02646).
    variance = (2 * log_weights).exp() @ torch.expm1(log_lik - elpd).square() / efficiency
    return _Score(float(elpd), math.sqrt(float(variance)), k_hat)


def _relative_efficiency(log_lik: Tensor, draws: JointDraws) -> float:
    """Effective over actual number of draws for the mean of the likelihood; 1 for independent draws."""
    if draws.num_chains == 1 and "diverging" not in draws.sample_stats:
        return 1.0
    likelihood = (log_lik - log_lik.max()).exp().reshape(draws.num_chains, -1, 1).numpy()
    return min(1.0, float(ess_mean(likelihood)[0]) / len(log_lik))


def _refitted(
    refit: Callable[[Comparisons], Posterior],
    data: Comparisons,
    inside: NDArray[np.bool_],
    num_samples: int,
    seed: int,
) -> _Score:
    """The score of rows `inside` from a posterior fitted to the others; an approximate one is corrected by weights."""
    rest, held_out = data.select(~inside), data.select(inside)
    posterior = refit(rest)
    # Draws of one seed are draws of the same parameters whatever the data, so the ratio of the training data applies.
    trained = posterior.weighted_draws(rest, num_samples=num_samples, seed=seed)
    draws = posterior.weighted_draws(held_out, num_samples=num_samples, seed=seed)
    if not torch.equal(trained.latents, draws.latents):
        raise EngineError("the posterior that `refit` returned draws other latents for other data from the same seed")
    _, _, each = _by_unit(posterior._density_of(held_out), draws, np.zeros(len(held_out), dtype=np.int64))
    log_lik, log_weights = each[:, 0], _log_weights(trained)
    k_hat = 0.0
    if len(log_lik) >= MIN_DRAWS:
        # Few draws may carry the average of a density that the held-out rows change much.
        integrand = pareto_smooth(log_weights + log_lik).k_hat
        ratio = 0.0 if trained.log_ratio is None else pareto_smooth(trained.log_ratio).k_hat
        k_hat = max(integrand, ratio)
    return _averaged(log_lik, log_weights, k_hat, _relative_efficiency(log_lik, draws))

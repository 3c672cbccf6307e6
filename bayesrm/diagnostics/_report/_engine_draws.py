"""Checks of the engine that need its draws: importance weights of an approximation, and Markov chains."""

import numpy as np

from ...data import Comparisons
from ...engines import Posterior
from ...engines._chains import R_HAT_OF_MANY
from ...engines._digest import feedback_digest
from ...engines.psis import pareto_smooth
from ...errors import EngineError
from ..convergence import MIN_DRAWS, convergence
from ._engine import Check, judged, k_hat_check
from ._evidence import Evidence
from ._section import Status, several


def draw_checks(posterior: Posterior, evidence: Evidence, train: Comparisons | None, *, seed: int) -> list[Check]:
    """Checks that go beyond the report of the fit, where the engine, the data at hand and ArviZ allow them."""
    try:
        return [*_chains(posterior, evidence), *_weights(posterior, train, seed)]
    except EngineError as error:
        return [Check("draws", "not checked", "-", Status.NOTE, str(error))]


def _chains(posterior: Posterior, evidence: Evidence) -> list[Check]:
    if not is_markov_chain(posterior) or posterior._default_draws < MIN_DRAWS * posterior._num_chains:
        return []
    found = convergence(posterior, evidence.data)
    value = f"{len(found.names)} quantities of {several(found.num_chains, 'chain')}"
    r_hat = 1.0
    if len(found.names):
        value += f": smallest ESS {float(np.nanmin(found.ess_bulk.numpy())):.0f}"
    if len(found.names) and found.num_chains > 1:
        r_hat = float(np.nanmax(found.r_hat.numpy()))
        value += f", largest R-hat {r_hat:.3f}"
    grave = r_hat > R_HAT_OF_MANY or bool(found.divergences)
    return [
        judged(
            "rewards of these data",
            value,
            "no problem",
            None if found.converged else Status.PROBLEM if grave else Status.CAUTION,
            ". ".join(problem.rstrip(".") for problem in found.problems) + ".",
            "Run longer chains with a longer warm-up; divergences call for a higher target acceptance rate or "
            "non-centred latents.",
        )
    ]


def is_markov_chain(posterior: Posterior) -> bool:
    """Whether the posterior is made of chains, so that R-hat means something."""
    return posterior._num_chains > 1 or "diverging" in getattr(posterior, "sample_stats", {})


def _weights(posterior: Posterior, train: Comparisons | None, seed: int) -> list[Check]:
    known = posterior.report.diagnostics.get("k_hat") is not None
    if train is None or known or feedback_digest(train) != posterior.report.data_digest:
        return []
    log_ratio = posterior.draw(train, num_samples=2000, seed=seed).log_ratio
    if log_ratio is None:
        return []
    smoothed = pareto_smooth(log_ratio)
    return [k_hat_check(smoothed.k_hat, smoothed.ess, smoothed.threshold, posterior.report.num_coordinates)]

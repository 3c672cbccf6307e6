"""How a posterior came about."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class FitReport:
    """How a posterior came about: what `summary` prints and `save_pretrained` keeps.

    Attributes:
        engine: Name and settings of the engine.
        seed: Seed of the fit.
        seconds: Wall time of the fit.
        num_rows: Rows of feedback; steps of trajectories.
        num_items: Unique items; distinct states.
        num_prompts: Unique prompts; trajectories.
        num_parameters: Parameters of the reward function, P.
        num_coordinates: Coordinates the engine worked in, R.
        converged: Whether the optimiser reached its gradient tolerance.
        gradient_norm: Gradient norm at the end, in whitened coordinates; NaN where it was not computed.
        iterations: Optimiser steps.
        log_evidence: Laplace's approximation of log p(feedback), when computed.
        curvature: Which curvature was used (`observed`, `fisher`, `fisher-draws`), when one was.
        prior_precision: Prior precision, given or tuned, by parameter site or one number.
        tuned: Whether it was tuned by the marginal likelihood.
        structure_check: Comparison of an approximate structure with `full` on a probe set: median `variance_ratio` of
            the structure's variances over the full ones, `rank_correlation`, `num_probes`.
        refinement: Where a network's trained weights stand relative to the mode that was found: `trained_gradient_norm`
            and `distance` in units of the prior standard deviation, `log_joint_gain` in nats, and root mean squares of
            the training items' rewards, `reward_scale` before and `reward_change` on the way.
        training: Of a trained network: steps, planned steps, whether it was stopped early.
        diagnostics: What an engine of draws or a variational one found about itself: `k_hat` and `ess` of importance
            weights; `divergences`, `r_hat` (largest), `ess` (smallest) of Markov chains; `elbo`, `elbo_std_error`;
            `linearised_prior_share`, of Laplace on a network the prior standard deviation of reward differences under
            the linear model over that of the network.
        data_digest: Digest of the feedback that was fitted, so that leave-one-out knows its own data again.
    """

    engine: dict[str, Any]
    seed: int
    seconds: float
    num_rows: int
    num_items: int
    num_prompts: int
    num_parameters: int
    num_coordinates: int
    converged: bool
    gradient_norm: float
    iterations: int
    log_evidence: float | None = None
    curvature: str | None = None
    prior_precision: float | Mapping[str, float] = 1.0
    tuned: bool = False
    structure_check: Mapping[str, float] | None = None
    refinement: Mapping[str, float] | None = None
    training: Mapping[str, Any] | None = None
    diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_digest: str | None = None

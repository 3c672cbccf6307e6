"""Maximum a posteriori: the mode alone."""

import dataclasses
import time

import torch

from ..data import Comparisons
from ..programs import RewardModel
from ._curvature import CurvatureKind
from ._gaussian_fit import OptimiserSettings, PriorPrecision, fit_mode
from ._settings import check_choice, check_optimiser, make_report
from ._tangent import Coordinates
from .gaussian_posterior import GaussianPosterior


@dataclasses.dataclass(frozen=True)
class MAP:
    """The mode of (parameters, unconstrained likelihood latents), with no uncertainty: the usual reward model.

    Linear heads by Newton's method, others by L-BFGS; both stop at a stated gradient norm and warn when they miss it.

    Attributes:
        prior_precision: `"given"`, or `"marginal_likelihood"` to tune a common factor on the declared precisions.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> brm.fit(model, data, inference=MAP()).predict(candidates=[np.eye(2)]).std.max().item()
        0.0
    """

    prior_precision: str = "given"
    gradient_tolerance: float = 1e-6
    max_iterations: int = 1000
    memory_gib: float = 8.0

    def __post_init__(self) -> None:
        check_choice("prior_precision", self.prior_precision, PriorPrecision)
        check_optimiser(self.gradient_tolerance, self.max_iterations, self.memory_gib)

    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> GaussianPosterior:
        """The mode as a posterior of zero width, see `bayesrm.fit`."""
        begin = time.perf_counter()
        settings = OptimiserSettings(
            self.gradient_tolerance, self.max_iterations, Coordinates.AUTO, self.memory_gib, CurvatureKind.AUTO
        )
        fitted = fit_mode(program, data, settings, PriorPrecision(self.prior_precision), seed=seed, progress=progress)
        report = make_report(self, fitted, data, seed, time.perf_counter() - begin)
        mode = torch.cat([fitted.mode.z, fitted.mode.latents])
        return GaussianPosterior(
            fitted.program, fitted.schema, report, fitted.expansion, fitted.whitening, mode, factor=None
        )

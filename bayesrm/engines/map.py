"""Maximum a posteriori: the mode alone."""

import dataclasses
import time
import warnings

import torch

from ..data import Comparisons, Corrections
from ..errors import ConvergenceWarning, EngineError
from ..programs import LanguageFeedback, RewardModel
from ..rewards import LoRA
from ._curvature import CurvatureKind
from ._gaussian_fit import OptimiserSettings, PriorPrecision, fit_mode
from ._lora_fit import point_fit, settle_point, train_network
from ._settings import check_choice, check_optimiser, make_report
from ._tangent import Coordinates
from .gaussian_posterior import GaussianPosterior
from .posterior import Posterior
from .training import Training


@dataclasses.dataclass(frozen=True)
class MAP:
    """The mode of (parameters, unconstrained likelihood latents), with no uncertainty: the usual reward model.

    Linear heads by Newton's method, others by L-BFGS; both stop at a stated gradient norm and warn when they miss it.
    LoRA rewards and correctors by stochastic gradient descent (`Training`), which ends near a mode at best: the report
    has the gradient norm at the end, in units of the prior standard deviation, and a run that was stopped early warns.

    Attributes:
        prior_precision: `"given"`, or `"marginal_likelihood"` to tune a common factor on the declared precisions.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How LoRA weights are trained.

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
    training: Training = dataclasses.field(default_factory=Training)

    #: Programs that the engine serves.
    programs = (RewardModel, LanguageFeedback)

    def __post_init__(self) -> None:
        check_choice("prior_precision", self.prior_precision, PriorPrecision)
        check_optimiser(self.gradient_tolerance, self.max_iterations, self.memory_gib)

    def fit(
        self,
        program: RewardModel | LanguageFeedback,
        data: Comparisons | Corrections,
        *,
        seed: int,
        progress: bool,
    ) -> Posterior:
        """The mode as a posterior of zero width, see `bayesrm.fit`."""
        if isinstance(program, LanguageFeedback):
            from ._language_feedback import fit_mode as fit_corrector

            return fit_corrector(self, program, data, seed=seed, progress=progress)
        assert isinstance(data, Comparisons)
        begin = time.perf_counter()
        if isinstance(program.reward, LoRA):
            return self._train(program, data, seed=seed, progress=progress)
        settings = OptimiserSettings(
            self.gradient_tolerance, self.max_iterations, Coordinates.AUTO, self.memory_gib, CurvatureKind.AUTO
        )
        fitted = fit_mode(program, data, settings, PriorPrecision(self.prior_precision), seed=seed, progress=progress)
        report = make_report(self, fitted, data, seed, time.perf_counter() - begin)
        mode = torch.cat([fitted.mode.z, fitted.mode.latents])
        return GaussianPosterior(
            fitted.program, fitted.schema, report, fitted.expansion, fitted.whitening, mode, factor=None
        ).plug_in()

    def _train(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> GaussianPosterior:
        begin = time.perf_counter()
        if self.prior_precision != "given":
            raise EngineError(
                "`prior_precision='marginal_likelihood'` needs the curvature for a LoRA reward; "
                "use prior_precision='given', or Laplace(...) and the posterior's `plug_in()`"
            )
        trained = train_network(program, data, self.training, seed=seed, progress=progress)
        batch_size = 2 * self.training.batch_size
        latents, norm = settle_point(trained, program, data, batch_size)
        posterior = point_fit(trained, program, latents, batch_size)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        run = trained.report.summary()
        posterior.report = dataclasses.replace(
            posterior.report,
            engine={"name": "MAP", "settings": settings | {"training": self.training.to_config()}},
            seed=seed,
            num_rows=len(data),
            num_items=data.num_items,
            num_prompts=data.num_prompts,
            converged=norm <= self.gradient_tolerance,
            gradient_norm=norm,
            iterations=trained.report.steps,
            prior_precision=program.prior.precision,
            training=run,
            seconds=time.perf_counter() - begin,
        )
        if trained.report.stopped_early:
            warnings.warn(
                f"training stopped after {run['steps']} of {run['planned_steps']} steps (gradient norm {norm:.1e}): "
                "the weights are no mode of the declared posterior; Laplace(...) finds the tangent's mode",
                ConvergenceWarning,
                stacklevel=4,
            )
        return posterior

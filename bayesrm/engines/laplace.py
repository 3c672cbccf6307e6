"""Laplace's approximation: a Gaussian at the mode with the curvature there."""

import dataclasses
import enum
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from .._typing import Tensor
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ApproximationWarning, ArgumentError, EngineError
from ..programs import RewardModel
from ..rewards import LoRA
from ._curvature import Curvature, CurvatureKind
from ._gaussian_fit import Fitted, OptimiserSettings, PriorPrecision, fit_mode
from ._lora_fit import fit_tangent
from ._newton import evidence
from ._settings import check_choice, check_optimiser, check_positive, make_report
from ._tangent import CHUNK, Coordinates, joint_precision, row_space
from .gaussian_posterior import GaussianPosterior
from .training import Training

#: Below this share of the prior's standard deviation a linear model says nothing of what the feedback leaves open.
SMALLEST_PRIOR_SHARE = 0.1


class Structure(enum.StrEnum):
    """How much of the posterior precision is kept."""

    FULL = "full"
    """All of it: exact for the tangent model."""
    SKETCH = "sketch"
    """LoRA: all of it among leading directions of every weight matrix, the prior outside. Scales with any data size."""
    LAST_LAYER = "last_layer"
    """LoRA: all of it for the layer that returns the reward, the adapters fixed. Prediction costs a forward pass."""
    KRON = "kron"
    """LoRA: a Kronecker product for every weight matrix, through laplace-torch. Latents are held at their mode."""
    DIAG = "diag"
    """Its diagonal in the parameters. Cheap, and wrong where features are correlated. For LoRA as for `kron`."""


class PrecisionGroups(enum.StrEnum):
    """Which parameter sites of a LoRA reward share one factor on their prior precisions.

    The derivatives come from weights that were trained on the same answers: those in an A matrix are multiples
    of the trained B. A group of its own can be scaled up until it repeats what training memorised, and the evidence
    praises it for that; on 300 human choices `module` gained 48 nats of evidence and lost 0.05 nats a held-out choice.
    Compare held-out prompts before relying on more groups than one.
    """

    ONE = "one"
    """All of them."""
    MODULE = "module"
    """The same matrix of every layer, such as `query.lora_A`; the head apart."""
    LAYER = "layer"
    """All of a layer; the head apart."""


@dataclasses.dataclass(frozen=True)
class Laplace:
    """Gaussian approximation at the mode of (parameters, likelihood latents), for linear heads and linearised ones.

    Where parameters outnumber rows, its approximation of the marginal likelihood prefers priors that are too tight
    (Kuss & Rasmussen 2005; measured in docs/results.md): `ImportanceSampling` reports one without that bias.

    The marginal likelihood tunes well when rows are new evidence. When an answer occurs in many rows and features tell
    answers apart, it pays for weights that memorise answers: give such feedback as one ranking a prompt, or compare
    precisions on held-out prompts (`diagnostics.cross_validate`).

    The latents are in the posterior, in unconstrained space with the log Jacobian. Non-linear heads are linearised at
    their mode (Immer et al., 2008.08400). A `LoRA` reward is trained first, then linearised at its trained weights
    (Yang et al., 2308.13111, 2402.13210) and *refined*: Newton's method finds the mode of the tangent model, wherever
    training ended, and the report says how far that was.

    Attributes:
        structure: A `Structure`; heads know `"full"` and `"diag"`. Structures that approximate are compared with `full`
            on comparisons given to neither, see `FitReport.structure_check`.
        prior_precision: `"given"`, or `"marginal_likelihood"` to tune factors on the declared precisions.
        precision_groups: For LoRA, which sites share a factor: `"one"` for all, `"module"` (the same kind of matrix in
            every layer) or `"layer"`.
        sketch_rank: Directions on each side of a weight matrix that `sketch` keeps.
        training: How LoRA weights are trained. With its `output_dir`, derivatives go there too, so that a killed fit
            goes on, and stay there for further fits around the same weights.
        jacobian_batch_size: Sequences that are differentiated together.
        coordinates: `"primal"`, `"dual"` (row space; cheaper when comparisons are fewer than parameters) or `"auto"`.
        curvature: `"auto"`, `"observed"` or `"fisher"`, see `FitReport.curvature`.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this. Derivatives of LoRA weights go to disk first.
        disk_gib: The same for disk.

    Raises:
        ArgumentError: A setting is not one of the known values.

    Warns:
        ApproximationWarning: When fitting a head that is not linear: at the mode it hardly reacts to its parameters, so
            that the linear model takes for certain what the feedback leaves open.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> posterior = brm.fit(model, data, inference=Laplace(structure="full"))
        >>> posterior.report.curvature
        'observed'
    """

    structure: str = "full"
    prior_precision: str = "given"
    coordinates: str = "auto"
    curvature: str = "auto"
    gradient_tolerance: float = 1e-6
    max_iterations: int = 1000
    memory_gib: float = 8.0
    disk_gib: float = 64.0
    precision_groups: str = "one"
    sketch_rank: int = 16
    training: Training = dataclasses.field(default_factory=Training)
    jacobian_batch_size: int = 16

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, Structure)
        check_choice("prior_precision", self.prior_precision, PriorPrecision)
        check_choice("coordinates", self.coordinates, Coordinates)
        check_choice("curvature", self.curvature, CurvatureKind)
        check_choice("precision_groups", self.precision_groups, PrecisionGroups)
        check_optimiser(self.gradient_tolerance, self.max_iterations, self.memory_gib)
        check_positive("sketch_rank", self.sketch_rank)
        check_positive("jacobian_batch_size", self.jacobian_batch_size)
        if self.structure == "diag" and self.coordinates == "dual":
            raise ArgumentError(
                "`structure='diag'` is a diagonal in the parameters; use coordinates='primal' or 'auto'"
            )

    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> GaussianPosterior:
        """The posterior, see `bayesrm.fit`."""
        posterior = self.proposal(program, data, seed=seed, progress=progress)
        share = posterior.report.diagnostics.get("linearised_prior_share")
        if share is not None and share < SMALLEST_PRIOR_SHARE:
            warnings.warn(
                f"at the mode {type(program.head).__name__} hardly reacts to its parameters: its linear model has "
                f"{share:.1g} of the prior's standard deviation of reward differences, so that what the feedback "
                "leaves open looks certain; use Ensemble, NUTS or ImportanceSampling, whose target is the head itself, "
                "or more feedback",
                ApproximationWarning,
                stacklevel=3,
            )
        return posterior

    def proposal(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> GaussianPosterior:
        """As `fit`, for whoever corrects the posterior: without a warning of what it misses."""
        begin = time.perf_counter()
        if isinstance(program.reward, LoRA):
            return self._fit_lora(program, data, seed=seed, progress=progress)
        if self.structure not in ("full", "diag"):
            raise EngineError(
                f"`structure='{self.structure}'` is for LoRA rewards; for {type(program.reward).__name__} use 'full' "
                "or 'diag'"
            )
        if self.precision_groups != "one":
            raise EngineError("`precision_groups` is for LoRA rewards; heads have one common factor")
        diag = self.structure == "diag"
        settings = OptimiserSettings(
            self.gradient_tolerance,
            self.max_iterations,
            Coordinates.PRIMAL if diag else Coordinates(self.coordinates),
            self.memory_gib,
            CurvatureKind(self.curvature),
        )
        fitted = fit_mode(program, data, settings, PriorPrecision(self.prior_precision), seed=seed, progress=progress)
        c = fitted.curvature(settings.curvature, seed)
        if diag:
            factor = diagonal_precision(fitted.design, fitted.density.groups, c).sqrt()
            log_evidence = evidence(fitted.mode, torch.diag(factor))
            check = _compare_with_full(fitted, c, seed)
        else:
            factor = _cholesky(joint_precision(fitted.design, fitted.density.groups, c))
            log_evidence, check = evidence(fitted.mode, factor), None
        report = make_report(self, fitted, data, seed, time.perf_counter() - begin)
        report = dataclasses.replace(report, log_evidence=log_evidence, curvature=c.kind, structure_check=check)
        if fitted.prior_share is not None:
            report = dataclasses.replace(
                report, diagnostics={**report.diagnostics, "linearised_prior_share": fitted.prior_share}
            )
        mode = torch.cat([fitted.mode.z, fitted.mode.latents])
        return GaussianPosterior(
            fitted.program, fitted.schema, report, fitted.expansion, fitted.whitening, mode, factor
        )

    def _fit_lora(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> GaussianPosterior:
        begin = time.perf_counter()
        found, trained = fit_tangent(self, program, data, seed=seed, progress=progress)
        fitted = found.fitted
        report = make_report(self, fitted, data, seed, 0.0)
        log_evidence = factor = None
        if self.structure not in ("kron", "diag"):
            c = fitted.curvature(CurvatureKind(self.curvature), seed)
            factor = _cholesky(joint_precision(fitted.design, fitted.density.groups, c))
            log_evidence = evidence(fitted.mode, factor)
        report = dataclasses.replace(
            report,
            seconds=time.perf_counter() - begin,
            num_parameters=found.plan.parameters,
            num_coordinates=found.plan.coordinates if factor is None else fitted.whitening.size,
            log_evidence=log_evidence,
            curvature=found.curvature,
            prior_precision=found.prior.precision,
            structure_check=found.structure_check,
            refinement=found.refinement,
            training=trained.report.summary(),
        )
        mode = torch.cat([fitted.mode.z, fitted.mode.latents])
        return GaussianPosterior(
            fitted.program, trained.schema, report, fitted.expansion, fitted.whitening, mode, factor
        )


def _cholesky(precision: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(precision)
    if int(info) != 0:
        raise EngineError(
            "the posterior precision at the mode is not positive definite: "
            "the prior of the likelihood's latents curves the wrong way there; "
            "declare the latents in a non-centred form, or give them a tighter prior"
        )
    result: Tensor = factor
    return result


def diagonal_precision(design: Tensor, groups: Sequence[FeedbackGroup], c: Curvature) -> Tensor:
    """Diagonal of the posterior precision of (z, latents), shape `(P + Q,)`, without forming the matrix."""
    total = torch.ones(design.shape[1], dtype=design.dtype, device=design.device)
    for group, block in zip(groups, c.rewards, strict=True):
        step = max(1, CHUNK // max(1, block.shape[1] * design.shape[1]))
        for start in range(0, len(block), step):
            rows = design[group.items[start : start + step]]
            total += ((block[start : start + step] @ rows) * rows).sum((0, 1))
    latents = (c.latents + c.prior).diagonal()
    if bool((latents <= 0).any()):
        raise EngineError("the curvature of a latent at the mode is not positive; use structure='full'")
    return torch.cat([total, latents])


def _compare_with_full(fitted: Fitted, c: Curvature, seed: int) -> dict[str, float]:
    """Variances of reward differences under the diagonal against those under `full`, on up to 256 training comparisons.

    With more parameters than 4,096 and more comparisons than 1,024, both are built on a random subset of these.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, blocks = list(fitted.density.groups), c
    if min(len(fitted.whitening.scale), sum(g.items.numel() for g in groups)) > 4096:
        keep = [torch.randperm(len(g.items), generator=generator)[: max(1, 1024 // len(groups))] for g in groups]
        groups = [
            dataclasses.replace(g, items=g.items[i], outcome=g.outcome[i], weight=g.weight[i], rows=g.rows[i])
            for g, i in zip(groups, keep, strict=True)
        ]
        blocks = dataclasses.replace(
            c,
            rewards=[b[i] for b, i in zip(c.rewards, keep, strict=True)],
            cross=[x[i] for x, i in zip(c.cross, keep, strict=True)],
        )
    w = fitted.whitening
    dual = row_space(fitted.jacobian, groups, w.center, w.scale, Coordinates.AUTO, fitted.density.only_differences())
    full_factor = _cholesky(joint_precision(dual.design(fitted.jacobian), groups, blocks))
    rows = []
    for g in groups:
        items = g.items[torch.randperm(len(g.items), generator=generator)[:256]]
        first = fitted.jacobian[items[:, 0]]
        rows.append(first - fitted.jacobian[items[:, 1]] if items.shape[1] > 1 else first)
    probe = torch.cat(rows)
    padded = torch.nn.functional.pad(dual.design(probe), (0, len(full_factor) - dual.size))
    exact = torch.linalg.solve_triangular(full_factor, padded.T, upper=False).square().sum(0)
    outside = dual.complement(probe)
    exact = exact if outside is None else exact + outside.square().sum(1)
    diagonal = diagonal_precision(fitted.design, groups, blocks)[: len(w.scale)]
    approximate = ((probe * w.scale).square() / diagonal).sum(1)
    ratio = float(np.median((approximate / exact).numpy()))
    ranks = torch.stack([v.argsort().argsort() for v in (exact, approximate)]).double()
    correlation = float(torch.corrcoef(ranks)[0, 1]) if len(probe) > 1 else float("nan")
    return {"variance_ratio": ratio, "rank_correlation": correlation, "num_probes": float(len(probe))}

"""The shared path of MAP and Laplace: features, mode, coordinates, prior precision."""

import dataclasses
import enum
import math
import warnings
from collections.abc import Callable

import torch

from .._typing import Tensor
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ConvergenceWarning, DataError, EngineError
from ..programs import RewardModel
from ..rewards.heads import unflatten
from ..rewards.tangent import Tangent
from ._curvature import Curvature, CurvatureKind, curvature
from ._density import FeedbackDensity
from ._newton import Mode, evidence, find_mode, log_normal
from ._optimise import initial_parameters, lbfgs_mode
from ._schema import FeedbackSchema
from ._tangent import Coordinates, Whitening, joint_precision, row_space
from .gaussian_posterior import Expansion

_GIB = 2**30
#: Tuning searches log precision within this distance of the declared one.
_SEARCH = 16.0
#: Rounds of (mode, tuned precision) for heads that are not linear.
_ROUNDS = 10
#: A change of log precision below which they end.
_SETTLED = 0.05


class PriorPrecision(enum.StrEnum):
    """Where the prior precision of the reward parameters comes from."""

    GIVEN = "given"
    """As declared in the program."""
    MARGINAL_LIKELIHOOD = "marginal_likelihood"
    """A common factor on the declared ones, by Laplace's approximation of the marginal likelihood (MacKay 1992)."""


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """How a mode is found; the engines share these."""

    tolerance: float
    max_iterations: int
    coordinates: Coordinates
    memory_gib: float
    curvature: CurvatureKind


@dataclasses.dataclass
class Fitted:
    """A mode and all that is needed around it; `prior_share` is `_share_of_prior`, `None` for linear heads."""

    program: RewardModel
    schema: FeedbackSchema
    density: FeedbackDensity
    expansion: Expansion
    whitening: Whitening
    jacobian: Tensor
    design: Tensor
    offset: Tensor
    mode: Mode
    prior_share: float | None = None

    @property
    def iterations(self) -> int:
        """Optimiser steps taken so far, those of tuning included."""
        return self.mode.iterations

    @property
    def rewards(self) -> Tensor:
        """Rewards of the training items at the mode, shape `(items,)`."""
        return self.offset + self.design @ self.mode.z

    def curvature(self, kind: CurvatureKind, seed: int) -> Curvature:
        """Curvature of the feedback at the mode."""
        return curvature(self.density, self.density.gather(self.rewards), self.mode.latents, kind, seed=seed)


def fit_mode(
    program: RewardModel,
    data: Comparisons,
    settings: OptimiserSettings,
    prior: PriorPrecision,
    *,
    seed: int,
    progress: bool,
) -> Fitted:
    """Finds the mode of a program, tuning its prior precision on the way if asked."""
    schema, density, raw = prepare(program, data, prior, progress=progress)
    _check_memory(len(raw), _num_parameters(program, raw), density.groups, settings)
    return fit_mode_on(program, density, schema, raw, density.initial_latents, settings, prior, seed=seed)


def prepare(
    program: RewardModel, data: Comparisons, prior: PriorPrecision, *, progress: bool
) -> tuple[FeedbackSchema, FeedbackDensity, Tensor]:
    """Checks that program and data fit together; the density of the feedback, and features of the items in float64."""
    _check_tangent(program, prior)
    groups = data.groups()
    if not any(bool((g.weight > 0).any()) for g in groups):
        raise DataError("every row has weight 0; there is no feedback to learn from")
    schema = FeedbackSchema.of(data, groups)
    # Checks that the likelihood fits the feedback before the long work of encoding texts.
    density = FeedbackDensity(program, groups)
    raw = program.encode(data, progress=progress).double()
    bad = ~torch.isfinite(raw).all(1)
    if bool(bad.any()):
        raise DataError(f"features of item {int(bad.nonzero()[0, 0])} are not finite")
    return schema, density, raw


def _check_tangent(program: RewardModel, prior: PriorPrecision) -> None:
    """Refuses what would leave the part of a tangent's prior that is outside its coordinates behind."""
    if not isinstance(program.head, Tangent):
        return
    if program.head.subspace is None:
        raise EngineError(
            "this tangent has no coordinates (that of a MAP, `kron` or `diag` posterior), so that there is nothing to "
            "fit; use the program of a `full`, `sketch` or `last_layer` posterior"
        )
    if prior is not PriorPrecision.GIVEN or program.prior.precision != 1.0:
        raise EngineError(
            "a tangent holds its prior in its own scale: its program takes Gaussian(1.0) and prior_precision='given'; "
            "tune the precision when fitting the LoRA program"
        )


def fit_mode_on(
    program: RewardModel,
    density: FeedbackDensity,
    schema: FeedbackSchema,
    raw: Tensor,
    latents: Tensor,
    settings: OptimiserSettings,
    prior: PriorPrecision,
    *,
    seed: int,
) -> Fitted:
    """Finds the mode of a program on items with the given features, shape `(items, D)`, starting from `latents`."""
    fitted = _locate(program, density, schema, raw, None, latents, settings, seed)
    if prior is PriorPrecision.MARGINAL_LIKELIHOOD:
        fitted = _tuned(fitted, raw, settings, seed)
    if not program.head.is_linear:
        return dataclasses.replace(fitted, prior_share=_share_of_prior(fitted, raw, seed))
    mode = find_mode(
        density, fitted.design, fitted.offset, fitted.mode.z, fitted.mode.latents,
        tolerance=settings.tolerance, max_iterations=settings.max_iterations,
    )  # fmt: skip
    return dataclasses.replace(fitted, mode=dataclasses.replace(mode, iterations=mode.iterations + fitted.iterations))


def _share_of_prior(fitted: Fitted, raw: Tensor, seed: int) -> float:
    """Prior standard deviation of reward differences under the linear model at the mode, over that of the head itself.

    Near 0 where the mode is a point in which the network does not react to its weights, such as all weights zero: the
    linear model then knows every reward, whatever the feedback. Root mean square over up to 256 items, 64 prior draws.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(raw), generator=generator)[:256].to(raw.device)
    scale, shapes = prior_scale(fitted.program, raw), fitted.program.head.parameter_shapes(raw.shape[1])
    scaled = fitted.expansion.scaled(raw[chosen])
    drawn = []
    for _ in range(64):
        noise = torch.randn(len(scale), generator=generator, dtype=torch.float64).to(scale.device)
        drawn.append(fitted.program.head.apply(unflatten(scale * noise, shapes), scaled))
    linear = fitted.jacobian[chosen] * scale
    declared = torch.stack(drawn)
    deviations = [x - x.mean(dim, keepdim=True) for x, dim in ((linear, 0), (declared, 1))]
    variance = deviations[1].square().mean()
    return float((deviations[0].square().sum(1).mean() / variance).sqrt()) if variance > 0 else 1.0


def _locate(
    program: RewardModel,
    density: FeedbackDensity,
    schema: FeedbackSchema,
    raw: Tensor,
    point: Tensor | None,
    latents: Tensor,
    settings: OptimiserSettings,
    seed: int,
) -> Fitted:
    """The tangent at the mode of the network, found from `point`; a linear head is its own tangent, taken at zero."""
    center, spread = program.standardisation(raw, density.groups)
    scale = prior_scale(program, raw)
    norm, steps = float("inf"), 0
    if point is None:
        point = initial_parameters(program, raw.shape[1], scale, seed=seed)
    if not program.head.is_linear:
        point, latents, norm, steps = lbfgs_mode(
            program, density, (raw - center) / spread, scale, point, latents,
            tolerance=settings.tolerance, max_iterations=settings.max_iterations,
        )  # fmt: skip
    expansion = Expansion(program, point, center, spread)
    jacobian = expansion.jacobian(raw)
    whitening = row_space(
        jacobian, density.groups, torch.zeros_like(point), scale, settings.coordinates, density.only_differences()
    )
    offset = expansion.rewards(raw) - jacobian @ point
    z = point / scale if whitening.basis is None else whitening.basis.T @ (point / scale)
    design = whitening.design(jacobian)
    value, _, _ = density.value_and_gradient(offset + design @ z, latents)
    mode = Mode(z, latents, value + log_normal(z), norm, steps, norm <= settings.tolerance)
    return Fitted(program, schema, density, expansion, whitening, jacobian, design, offset, mode)


def _tuned(fitted: Fitted, raw: Tensor, settings: OptimiserSettings, seed: int) -> Fitted:
    """`fitted` with its prior scaled to the largest evidence, and located again under that prior."""
    for _ in range(_ROUNDS):
        factor, z, latents, steps = _tune(fitted, settings, seed)
        program = dataclasses.replace(fitted.program, prior=fitted.program.prior.scaled(factor))
        before = fitted.iterations + steps
        if program.head.is_linear:
            mode = dataclasses.replace(fitted.mode, z=z, latents=latents, iterations=before)
            return dataclasses.replace(
                fitted,
                program=program,
                expansion=dataclasses.replace(fitted.expansion, program=program),
                whitening=fitted.whitening.rescaled(factor),
                design=fitted.design * factor**-0.5,
                mode=mode,
            )
        # The mode of the network moves with its prior: find it again, and tune again around it if it moved far.
        point = fitted.expansion.point
        fitted = _locate(program, fitted.density, fitted.schema, raw, point, fitted.mode.latents, settings, seed)
        fitted.mode = dataclasses.replace(fitted.mode, iterations=fitted.mode.iterations + before)
        if abs(math.log(factor)) <= _SETTLED:
            return fitted
    warnings.warn(f"the prior precision still moved after {_ROUNDS} rounds of tuning", ConvergenceWarning, stacklevel=5)
    return fitted


def _num_parameters(program: RewardModel, raw: Tensor) -> int:
    return sum(math.prod(shape) for shape in program.head.parameter_shapes(raw.shape[1]).values())


def prior_scale(program: RewardModel, raw: Tensor) -> Tensor:
    """Prior standard deviation of every parameter, shape `(P,)`."""
    parts = [
        torch.full((int(torch.Size(shape).numel()),), program.prior.of(site) ** -0.5, dtype=torch.float64)
        for site, shape in program.head.parameter_shapes(raw.shape[1]).items()
    ]
    return torch.cat(parts)


def _check_memory(items: int, parameters: int, groups: list[FeedbackGroup], settings: OptimiserSettings) -> None:
    rows = sum(g.items.numel() for g in groups)
    primal = settings.coordinates is Coordinates.PRIMAL or (
        settings.coordinates is Coordinates.AUTO and rows >= parameters
    )
    size = parameters if primal else min(rows, parameters)
    needed = 8.0 * (2 * items * parameters + 4 * size * size + 2 * parameters * (0 if primal else size))
    if needed > settings.memory_gib * _GIB:
        raise EngineError(
            f"this fit needs about {needed / _GIB:.1f} GiB "
            f"({items} items, {parameters} parameters, {size} coordinates), "
            f"above `memory_gib={settings.memory_gib}`; "
            "use fewer comparisons or features, a narrower head, or raise `memory_gib`"
        )


def _tune(fitted: Fitted, settings: OptimiserSettings, seed: int) -> tuple[float, Tensor, Tensor, int]:
    """The factor on the prior precision with the largest evidence of the tangent, the mode there, and steps taken."""
    density, design, offset = fitted.density, fitted.design, fitted.offset
    warm = {"theta": fitted.mode.z, "latents": fitted.mode.latents}
    modes: list[Mode] = []

    def negative(log_factor: float) -> float:
        scale = math.exp(-0.5 * log_factor)
        mode = find_mode(
            density, design * scale, offset, warm["theta"] / scale, warm["latents"],
            tolerance=max(settings.tolerance, 1e-5), max_iterations=settings.max_iterations, warn=False,
        )  # fmt: skip
        modes.append(mode)
        warm["theta"], warm["latents"] = mode.z * scale, mode.latents
        rewards = density.gather(offset + design @ warm["theta"])
        c = curvature(density, rewards, mode.latents, settings.curvature, seed=seed)
        factor = torch.linalg.cholesky(joint_precision(design * scale, density.groups, c))
        return -evidence(mode, factor)

    found = maximise_bracketed(negative, _SEARCH)
    missed = sum(not mode.converged for mode in modes)
    if missed:
        warnings.warn(
            f"the prior precision was tuned on the evidence at {len(modes)} points, {missed} of which are no modes; "
            "raise `max_iterations` or `gradient_tolerance`",
            ConvergenceWarning,
            stacklevel=6,
        )
    if abs(found) > _SEARCH - 0.1:
        direction = "infinity: the data prefer no reward at all" if found > 0 else "zero"
        warnings.warn(
            f"the marginal likelihood still grows as the prior precision goes to {direction}; "
            f"stopped at e^{found:+.0f} times the declared one",
            ConvergenceWarning,
            stacklevel=6,
        )
    scale = math.exp(-0.5 * found)
    return math.exp(found), warm["theta"] / scale, warm["latents"], sum(mode.iterations for mode in modes)


def maximise_bracketed(negative: Callable[[float], float], bound: float) -> float:
    """Argument in [-bound, bound] that minimises `negative`: a walk from 0 to a bracket, then Brent's method."""
    from scipy.optimize import minimize_scalar

    values = {0.0: negative(0.0)}

    def at(x: float) -> float:
        if x not in values:
            values[x] = negative(x)
        return values[x]

    step = 2.0 if at(2.0) < at(0.0) else -2.0
    x = step if at(step) < at(0.0) else 0.0
    while x and abs(x + step) <= bound and at(x + step) < at(x):
        x += step
    if abs(x) + abs(step) > bound:
        return math.copysign(bound, x)
    result = minimize_scalar(at, bounds=(x - 2.0, x + 2.0), method="bounded", options={"xatol": 5e-3})
    return float(result.x)

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
from ._curvature import Curvature, CurvatureKind, curvature
from ._density import FeedbackDensity
from ._newton import Mode, evidence, find_mode, log_normal
from ._optimise import initial_parameters, lbfgs_mode
from ._tangent import Coordinates, Whitening, joint_precision, row_space
from .gaussian_posterior import Expansion
from .posterior import FeedbackSchema

_GIB = 2**30
#: Tuning searches log precision within this distance of the declared one.
_SEARCH = 16.0
#: Rounds of (mode, tuned precision) for heads that are not linear.
_ROUNDS = 10


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
    """A mode and all that is needed around it."""

    program: RewardModel
    schema: FeedbackSchema
    density: FeedbackDensity
    expansion: Expansion
    whitening: Whitening
    jacobian: Tensor
    design: Tensor
    offset: Tensor
    mode: Mode
    iterations: int
    converged: bool
    gradient_norm: float

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
    center, scale = program.standardisation(raw, groups)
    sizes = {s: int(torch.Size(shape).numel()) for s, shape in program.reward.parameter_shapes(raw.shape[1]).items()}
    _check_memory(len(raw), sum(sizes.values()), groups, settings)
    differences = density.only_differences()
    features = (raw - center) / scale
    latents = density.initial_latents
    point = initial_parameters(program, raw.shape[1], _prior_scale(program, sizes), seed=seed)
    iterations = 0
    for _ in range(_ROUNDS):
        norm, converged = 0.0, True
        if not program.reward.is_linear:
            point, latents, norm, steps = lbfgs_mode(
                program, density, features, _prior_scale(program, sizes), point, latents,
                tolerance=settings.tolerance, max_iterations=settings.max_iterations,
            )  # fmt: skip
            iterations += steps
            converged = norm <= settings.tolerance
        expansion = Expansion(program, point, center, scale)
        jacobian = expansion.jacobian(raw)
        prior_scale = _prior_scale(program, sizes)
        whitening = row_space(jacobian, groups, torch.zeros_like(point), prior_scale, settings.coordinates, differences)
        offset = expansion.rewards(raw) - jacobian @ point
        start = point / prior_scale
        z = start if whitening.basis is None else whitening.basis.T @ start
        design = whitening.design(jacobian)
        if prior is PriorPrecision.MARGINAL_LIKELIHOOD:
            factor, z, latents = _tune(density, design, offset, z, latents, settings, seed)
            program = dataclasses.replace(program, prior=program.prior.scaled(factor))
            whitening, design = whitening.rescaled(factor), design * factor**-0.5
            if not program.reward.is_linear and abs(math.log(factor)) > 0.05:
                # The mode of the network moves with its prior; tune again around the new one.
                continue
        break
    else:
        warnings.warn(
            f"the prior precision still moved after {_ROUNDS} rounds of tuning", ConvergenceWarning, stacklevel=4
        )
    if program.reward.is_linear:
        mode = find_mode(
            density, design, offset, z, latents, tolerance=settings.tolerance, max_iterations=settings.max_iterations
        )
        iterations, norm, converged = iterations + mode.iterations, mode.gradient_norm, mode.converged
    else:
        # The mode of the network itself, which is also the mode of its tangent there.
        value, _, _ = density.value_and_gradient(offset + design @ z, latents)
        mode = Mode(z, latents, value + log_normal(z), norm, iterations, converged)
    expansion = dataclasses.replace(expansion, program=program)
    return Fitted(
        program, schema, density, expansion, whitening, jacobian, design, offset, mode, iterations, converged, norm
    )  # fmt: skip


def _prior_scale(program: RewardModel, sizes: dict[str, int]) -> Tensor:
    parts = [torch.full((n,), program.prior.of(site) ** -0.5, dtype=torch.float64) for site, n in sizes.items()]
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


def _tune(
    density: FeedbackDensity,
    design: Tensor,
    offset: Tensor,
    z: Tensor,
    latents: Tensor,
    settings: OptimiserSettings,
    seed: int,
) -> tuple[float, Tensor, Tensor]:
    """The factor on the prior precision that maximises Laplace's evidence of the tangent model, and the mode there."""
    warm = {"theta": z, "latents": latents}

    def negative(log_factor: float) -> float:
        scale = math.exp(-0.5 * log_factor)
        mode = find_mode(
            density, design * scale, offset, warm["theta"] / scale, warm["latents"],
            tolerance=max(settings.tolerance, 1e-5), max_iterations=settings.max_iterations, warn=False,
        )  # fmt: skip
        warm["theta"], warm["latents"] = mode.z * scale, mode.latents
        c = curvature(
            density, density.gather(offset + design @ warm["theta"]), mode.latents, settings.curvature, seed=seed
        )
        factor = torch.linalg.cholesky(joint_precision(design * scale, density.groups, c))
        return -evidence(mode, factor)

    found = maximise_bracketed(negative, _SEARCH)
    if abs(found) > _SEARCH - 0.1:
        direction = "infinity: the data prefer no reward at all" if found > 0 else "zero"
        warnings.warn(
            f"the marginal likelihood still grows as the prior precision goes to {direction}; "
            f"stopped at e^{found:+.0f} times the declared one",
            ConvergenceWarning,
            stacklevel=5,
        )
    scale = math.exp(-0.5 * found)
    return math.exp(found), warm["theta"] / scale, warm["latents"]


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

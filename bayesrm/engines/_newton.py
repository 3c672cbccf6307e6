"""Newton's method to the mode of the tangent model, likelihood latents included."""

import dataclasses
import warnings

import torch

from .._typing import Tensor
from ..errors import ConvergenceWarning, EngineError
from ._curvature import fisher_curvature, observed_curvature
from ._density import FeedbackDensity
from ._tangent import joint_precision


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode of the posterior of the tangent model.

    Attributes:
        z: Whitened coordinates, shape `(R,)`.
        latents: Unconstrained latents, shape `(Q,)`.
        log_joint: log p(feedback, latents | z) + log N(z; 0, I), the latents in unconstrained space with Jacobian.
        gradient_norm: Euclidean norm of the gradient in (z, latents). The prior of z has unit precision, so for latents
            known it bounds the distance from the mode in prior standard deviations.
        iterations: Newton steps taken.
        converged: Whether the norm is below the tolerance.
    """

    z: Tensor
    latents: Tensor
    log_joint: float
    gradient_norm: float
    iterations: int
    converged: bool


def log_normal(z: Tensor) -> float:
    """The log density log N(z; 0, I)."""
    return float(-0.5 * (z @ z) - 0.5 * z.numel() * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)))


def find_mode(
    density: FeedbackDensity,
    design: Tensor,
    offset: Tensor,
    z: Tensor,
    latents: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    warn: bool = True,
) -> Mode:
    """Maximises the log joint from a starting point.

    Each step uses the Hessian of the log joint where it is negative definite, else the Fisher information, and a
    backtracking line search on the log joint.

    Args:
        density: The feedback.
        design: Derivative of the items' rewards in z, shape `(items, R)`.
        offset: Rewards of the items at z = 0, shape `(items,)`.
        z: Start, shape `(R,)`.
        latents: Start, shape `(Q,)`, unconstrained.
        tolerance: Gradient norm at which to stop.
        max_iterations: Most steps to take.
        warn: Whether to warn when the tolerance is not reached.
    """
    size = len(z)
    rewards = offset + design @ z
    value, g_items, g_u = density.value_and_gradient(rewards, latents)
    value += log_normal(z)
    iteration = 0
    while True:
        gradient = torch.cat([design.T @ g_items - z, g_u])
        norm = float(gradient.norm())
        if not torch.isfinite(gradient).all():
            raise EngineError(
                "the gradient of the log joint is not finite; check the likelihood at extreme rewards and latents"
            )
        if norm <= tolerance or iteration == max_iterations:
            break
        step = _ascent(density, design, rewards, latents, gradient)
        step_rewards = design @ step[:size]
        slope = float(gradient @ step)
        t, accepted = 1.0, False
        while t > 1e-10:
            new_z, new_u = z + t * step[:size], latents + t * step[size:]
            new_rewards = rewards + t * step_rewards
            new_value, new_g, new_gu = density.value_and_gradient(new_rewards, new_u)
            new_value += log_normal(new_z)
            # Near the mode the change drowns in rounding; there a step that shrinks the gradient is as good.
            flat = abs(new_value - value) <= 1e-10 * (1.0 + abs(value))
            if flat:
                accepted = float(torch.cat([design.T @ new_g - new_z, new_gu]).norm()) < norm
            else:
                accepted = new_value >= value + 1e-4 * t * slope
            if accepted:
                break
            t *= 0.5
        if not accepted:
            break
        z, latents, rewards, value, g_items, g_u = new_z, new_u, new_rewards, new_value, new_g, new_gu
        iteration += 1
    converged = norm <= tolerance
    if not converged and warn:
        warnings.warn(
            f"Newton stopped after {iteration} steps at gradient norm {norm:.2e}, above the tolerance {tolerance:.0e}: "
            "the point is not the mode of the posterior; raise `max_iterations` or `gradient_tolerance`",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Mode(z, latents, value, norm, iteration, converged)


def _ascent(
    density: FeedbackDensity, design: Tensor, item_rewards: Tensor, latents: Tensor, gradient: Tensor
) -> Tensor:
    rewards = density.gather(item_rewards)
    for find in (observed_curvature, fisher_curvature):
        precision = joint_precision(design, density.groups, find(density, rewards, latents))
        factor, info = torch.linalg.cholesky_ex(precision)
        if int(info) == 0:
            return torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    # Only the latents' prior can still be indefinite here: step along the positive part of the curvature.
    values, vectors = torch.linalg.eigh(precision)
    result: Tensor = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-3))
    return result


def evidence(mode: Mode, precision_factor: Tensor) -> float:
    """Laplace's approximation of log p(feedback): the log joint at the mode plus the log volume around it.

    Args:
        mode: The mode.
        precision_factor: Cholesky factor of the posterior precision there, shape `(R + Q, R + Q)`.
    """
    dimension = precision_factor.shape[0]
    log_volume = 0.5 * dimension * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    return mode.log_joint + float(log_volume) - float(precision_factor.diagonal().log().sum())

"""L-BFGS to the mode of a head whose rewards are not linear in its parameters."""

import warnings

import numpy as np
import torch

from .._typing import Tensor
from ..errors import ConvergenceWarning
from ..programs import RewardModel
from ..rewards.heads import unflatten
from ._density import FeedbackDensity


def lbfgs_mode(
    program: RewardModel,
    density: FeedbackDensity,
    features: Tensor,
    scale: Tensor,
    start: Tensor,
    latents: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, float, int]:
    """Maximises the log joint in (parameters, unconstrained latents), parameters whitened by their prior.

    Args:
        program: The reward model.
        density: Its feedback.
        features: Features of the items, shape `(items, D)`, float64.
        scale: Prior standard deviation of the parameters, shape `(P,)`; the prior mean is zero.
        start: Parameters to start from, shape `(P,)`.
        latents: Latents to start from, shape `(Q,)`.
        tolerance: Euclidean gradient norm (whitened coordinates) at which to stop.
        max_iterations: Most iterations.

    Returns:
        Parameters, latents, gradient norm, iterations.
    """
    shapes = program.head.parameter_shapes(features.shape[-1])
    size = len(start)

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x).to(features.device).requires_grad_(True)
        parameters = unflatten(point[:size] * scale, shapes)
        rewards = program.head.apply(parameters, features)
        value = density.log_joint(density.gather(rewards), point[size:]) - 0.5 * (point[:size] @ point[:size])
        (gradient,) = torch.autograd.grad(-value, [point])
        return float(-value.detach()), gradient.cpu().numpy()

    from scipy.optimize import minimize

    x = torch.cat([start / scale, latents]).cpu().numpy()
    done = 0
    norm = float("inf")
    while done < max_iterations:
        options = {"maxiter": max_iterations - done, "maxfun": 2 * max_iterations, "ftol": 0.0, "maxcor": 30}
        options["gtol"] = tolerance / np.sqrt(len(x))
        result = minimize(negative, x, jac=True, method="L-BFGS-B", options=options)
        before, x, norm = norm, result.x, float(np.linalg.norm(result.jac))
        done += max(1, int(result.nit))
        # A line search that fails to rounding ends a run early; fresh curvature memory may still make progress.
        if norm <= tolerance or norm > 0.5 * before:
            break
    if norm > tolerance:
        warnings.warn(
            f"L-BFGS stopped after {done} iterations at gradient norm {norm:.2e}, above the tolerance {tolerance:.0e}: "
            "the point is not the mode of the posterior; raise `max_iterations` or `gradient_tolerance`",
            ConvergenceWarning,
            stacklevel=3,
        )
    point = torch.from_numpy(x).to(features.device)
    return point[:size] * scale, point[size:], norm, done


def initial_parameters(program: RewardModel, num_features: int, scale: Tensor, *, seed: int) -> Tensor:
    """A start away from the symmetric point zero: a prior draw shrunk to a tenth, shape `(P,)`."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(len(scale), generator=generator, dtype=torch.float64).to(scale.device)
    return 0.1 * scale * draw if not program.head.is_linear else torch.zeros_like(scale)

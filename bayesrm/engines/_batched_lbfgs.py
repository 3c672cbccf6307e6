"""L-BFGS for many problems at once: each has its own curvature pairs and line search, evaluations are shared."""

import dataclasses
from collections.abc import Callable

import torch

from .._typing import Tensor

#: Curvature pairs that are kept.
_HISTORY = 20
#: Halvings of a step before a problem gives up.
_HALVINGS = 30
#: Sufficient decrease of a step (Armijo).
_DECREASE = 1e-4


@dataclasses.dataclass(frozen=True)
class Minima:
    """Where the problems ended.

    Attributes:
        x: Points, shape `(M, D)`.
        gradient_norm: Gradient norms there, shape `(M,)`.
        iterations: Iterations of the slowest.
    """

    x: Tensor
    gradient_norm: Tensor
    iterations: int


def minimise(
    objective: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, tolerance: float, max_iterations: int
) -> Minima:
    """Minimises M functions of D variables from M starts (Nocedal & Wright 2006, algorithm 7.5).

    Only problems that still search are evaluated: one that has ended, or whose step was good, costs nothing more.

    Args:
        objective: Values `(K,)` at points `(K, D)` of the functions whose numbers `(K,)` are its second argument.
        x: Starts, shape `(M, D)`.
        tolerance: A problem has ended when its gradient's Euclidean norm is at most this.
        max_iterations: Most iterations.
    """

    def evaluate(point: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        point = point.detach().requires_grad_(True)
        value = objective(point, which)
        (gradient,) = torch.autograd.grad(value.sum(), [point])
        return value.detach(), gradient

    value, gradient = evaluate(x, torch.arange(len(x)))
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    stuck = torch.zeros(len(x), dtype=torch.bool)
    iteration = 0
    while iteration < max_iterations:
        active = (gradient.norm(dim=1) > tolerance) & ~stuck
        if not bool(active.any()):
            break
        direction = -_apply_inverse(gradient, steps, changes)
        slope = (direction * gradient).sum(1)
        # Where the pairs have led astray, steepest descent starts over.
        uphill = slope >= 0
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.square().sum(1), slope)
        # Without pairs the gradient tells no length.
        t = torch.ones_like(value) if steps else 1.0 / gradient.norm(dim=1).clamp_min(1.0)
        searching = active.nonzero()[:, 0]
        new_x, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        for _ in range(_HALVINGS):
            i = searching
            trial = x[i] + t[i, None] * direction[i]
            found, slopes = evaluate(trial, i)
            # Near a minimum the change drowns in rounding; there a step that shrinks the gradient is as good.
            flat = (found - value[i]).abs() <= 1e-11 * (1.0 + value[i].abs())
            good = torch.isfinite(found) & (
                (found <= value[i] + _DECREASE * t[i] * slope[i])
                | (flat & (slopes.norm(dim=1) < gradient[i].norm(dim=1)))
            )
            taken = i[good]
            new_x[taken], new_value[taken], new_gradient[taken] = trial[good], found[good], slopes[good]
            searching = i[~good]
            if not len(searching):
                break
            t[searching] *= 0.5
        stuck[searching] = True
        steps.append(new_x - x)
        changes.append(new_gradient - gradient)
        if len(steps) > _HISTORY:
            steps.pop(0)
            changes.pop(0)
        x, value, gradient = new_x, new_value, new_gradient
        iteration += 1
    return Minima(x, gradient.norm(dim=1), iteration)


def _apply_inverse(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The inverse Hessians that the pairs imply, times the gradients: the two-loop recursion, useless pairs skipped."""
    q = gradient.clone()
    rho, alphas = [], []
    for s, y in zip(steps, changes, strict=True):
        product = (s * y).sum(1)
        useful = product > 1e-12 * y.square().sum(1)
        rho.append(torch.where(useful, 1.0 / torch.where(useful, product, 1.0), 0.0))
    for s, y, r in zip(reversed(steps), reversed(changes), reversed(rho), strict=True):
        alpha = r * (s * q).sum(1)
        q = q - alpha[:, None] * y
        alphas.append(alpha)
    if steps:
        s, y = steps[-1], changes[-1]
        scale = (s * y).sum(1) / y.square().sum(1).clamp_min(1e-300)
        q = q * torch.where(rho[-1] > 0, scale, 1.0)[:, None]
    for s, y, r, alpha in zip(steps, changes, rho, reversed(alphas), strict=True):
        q = q + (alpha - r * (y * q).sum(1))[:, None] * s
    return q

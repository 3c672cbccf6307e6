"""Laplace's approximation with the whole covariance: the first choice, exact for linear models and tangents.

A Gaussian at the mode with the curvature there; heads that are not linear are linearised at their mode (Immer et al.,
2008.08400), adapters at their trained weights (Yang et al., 2308.13111), of which Newton's method then finds the mode.
The prior precision is tuned by the marginal likelihood (MacKay 1992).
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    precision_groups: str = "one",
    coordinates: str = "auto",
    curvature: str = "auto",
    gradient_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
    **training: Any,
) -> brm.Laplace:
    """Makes the engine.

    Args:
        prior_precision: marginal_likelihood tunes factors on the program's precision; given leaves it.
        precision_groups: Adapters that share a factor: one (all), module or layer.
        coordinates: primal, dual (cheaper when comparisons are fewer than parameters) or auto.
        curvature: observed, fisher or auto.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`.
    """
    return brm.Laplace(
        prior_precision=prior_precision, precision_groups=precision_groups, coordinates=coordinates,
        curvature=curvature, gradient_tolerance=gradient_tolerance, max_iterations=max_iterations,
        memory_gib=memory_gib, training=brm.engines.training_settings(**training),
    )  # fmt: skip

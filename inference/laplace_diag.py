"""Laplace's approximation with a diagonal precision: cheap for many parameters, wrong where features are correlated.

The fit compares it with the whole covariance on a probe set and reports variance ratio and rank correlation. The
diagonal is the baseline of Daxberger et al., "Laplace redux", 2106.14806.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    curvature: str = "auto",
    gradient_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
    **training: Any,
) -> brm.Laplace:
    """Makes the engine.

    Args:
        prior_precision: marginal_likelihood tunes factors on the program's precision; given leaves it.
        curvature: observed, fisher or auto.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`.
    """
    return brm.Laplace(
        structure="diag", prior_precision=prior_precision, curvature=curvature, gradient_tolerance=gradient_tolerance,
        max_iterations=max_iterations, memory_gib=memory_gib, training=brm.engines.training_settings(**training),
    )  # fmt: skip

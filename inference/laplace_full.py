"""Laplace's approximation with the whole covariance: the first choice for heads on features.

A Gaussian at the mode with the curvature there; heads that are not linear are linearised at their mode (Immer et al.,
2008.08400). The prior precision is tuned by the marginal likelihood (MacKay 1992).
"""

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    coordinates: str = "auto",
    curvature: str = "auto",
    gradient_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
) -> brm.Laplace:
    """Makes the engine.

    Args:
        prior_precision: marginal_likelihood tunes a common factor on the program's precision; given leaves it.
        coordinates: primal, dual (cheaper when comparisons are fewer than parameters) or auto.
        curvature: observed, fisher or auto.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
    """
    return brm.Laplace(
        structure="full",
        prior_precision=prior_precision,
        coordinates=coordinates,
        curvature=curvature,
        gradient_tolerance=gradient_tolerance,
        max_iterations=max_iterations,
        memory_gib=memory_gib,
    )

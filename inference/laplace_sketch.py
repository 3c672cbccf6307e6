"""Laplace's approximation on adapters, among the leading directions of every weight matrix: for many comparisons.

One covariance over all matrices in the directions that comparisons move most, the prior outside; the fit compares it
with the whole covariance. Linearised Laplace on adapters: Yang et al., 2308.13111; as reward model: 2402.13210.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    precision_groups: str = "one",
    sketch_rank: int = 16,
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
        sketch_rank: Directions on each side of a matrix.
        curvature: observed, fisher or auto.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`.
    """
    return brm.Laplace(
        structure="sketch", prior_precision=prior_precision, precision_groups=precision_groups,
        sketch_rank=sketch_rank, curvature=curvature, gradient_tolerance=gradient_tolerance,
        max_iterations=max_iterations, memory_gib=memory_gib, training=brm.engines.training_settings(**training),
    )  # fmt: skip

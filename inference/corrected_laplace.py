"""Laplace's approximation, corrected by Pareto-smoothed importance sampling: exact where k-hat allows it, else refused.

Vehtari, Simpson, Gelman, Yao & Gabry, 1507.02646. For heads and for tangents of few coordinates.
"""

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    num_samples: int = 4000,
    degrees_of_freedom: float | None = None,
    max_k_hat: float | None = None,
    gradient_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
) -> brm.ImportanceSampling:
    """Makes the engine.

    Args:
        prior_precision: marginal_likelihood tunes a factor on the program's precision; given leaves it.
        num_samples: Draws of the proposal.
        degrees_of_freedom: Of a Student t proposal; None for 5 in up to 20 dimensions and a normal one beyond.
        max_k_hat: Refuse above this; None for the threshold of the source.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
    """
    laplace = brm.Laplace(
        prior_precision=prior_precision, gradient_tolerance=gradient_tolerance, max_iterations=max_iterations,
        memory_gib=memory_gib,
    )  # fmt: skip
    return brm.ImportanceSampling(
        laplace, num_samples=num_samples, degrees_of_freedom=degrees_of_freedom, max_k_hat=max_k_hat
    )

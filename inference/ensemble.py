"""An ensemble of randomly perturbed modes, whose disagreement is the uncertainty.

Randomised priors (Osband et al., 1806.03335) and bootstrap weights; members of adapters share one backbone.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    num_members: int = 20,
    randomisation: str = "both",
    gradient_tolerance: float = 1e-4,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
    **training: Any,
) -> brm.Ensemble:
    """Makes the engine.

    Args:
        num_members: Number of members.
        randomisation: both, anchored or bootstrap.
        gradient_tolerance: Gradient norm of a member's mode.
        max_iterations: Most iterations.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`.
    """
    return brm.Ensemble(
        num_members=num_members, randomisation=randomisation, gradient_tolerance=gradient_tolerance,
        max_iterations=max_iterations, memory_gib=memory_gib, training=brm.engines.training_settings(**training),
    )  # fmt: skip

"""Maximum a posteriori: the mode alone, no uncertainty. The usual reward model, and the baseline of the others.

The objective is that of the reward model in Christiano et al., "Deep reinforcement learning from human preferences",
1706.03741, with the prior as weight decay.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    prior_precision: str = "marginal_likelihood",
    gradient_tolerance: float = 1e-6,
    max_iterations: int = 1000,
    memory_gib: float = 8.0,
    **training: Any,
) -> brm.MAP:
    """Makes the engine.

    Args:
        prior_precision: marginal_likelihood tunes a common factor on the program's precision; given leaves it.
        gradient_tolerance: Gradient norm of the mode, parameters in units of their prior standard deviation.
        max_iterations: Most optimiser steps.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`; they need prior_precision given.
    """
    return brm.MAP(
        prior_precision=prior_precision,
        gradient_tolerance=gradient_tolerance,
        max_iterations=max_iterations,
        memory_gib=memory_gib,
        training=brm.engines.training_settings(**training),
    )

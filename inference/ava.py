"""Variational inverse reinforcement learning on language models, in the manner of AVA.

Cai et al., 2411.09341, after AVRIL (Chan and van der Schaar, 2102.06483). The weight of the temporal-difference term is
ours: with the 1 of AVRIL's code the posterior of the rewards loses its entropy, see `bayesrm.engines.AVRIL`.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    next_value: str = "trajectory",
    kl_weight: float = 1.0,
    constraint_weight: float = 0.1,
    num_particles: int = 32,
    **training: Any,
) -> brm.AVRIL:
    """Makes the engine.

    Args:
        next_value: Value of the next state in the temporal difference, trajectory or soft.
        kl_weight: Weight of the divergence from the prior.
        constraint_weight: Weight of the temporal-difference term.
        num_particles: Draws by which the likelihood of preferences is averaged.
        training: How the language model is trained, see `bayesrm.engines.training_settings`.
    """
    return brm.AVRIL(
        next_value=next_value, kl_weight=kl_weight, constraint_weight=constraint_weight, num_particles=num_particles,
        training=brm.engines.training_settings(**training),
    )  # fmt: skip

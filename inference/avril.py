"""A normal distribution for the reward of each step, and action values that agree with it by temporal differences.

Chan and van der Schaar, 2102.06483; for text see `ava`.
"""

import bayesrm as brm


def build(
    *,
    next_value: str = "trajectory",
    kl_weight: float = 1.0,
    constraint_weight: float = 1.0,
    min_std: float = 1e-3,
    kl_once: bool = False,
    num_particles: int = 32,
    num_steps: int = 5000,
    learning_rate: float = 1e-3,
    batch_size: int | None = None,
) -> brm.engines.AVRIL:
    """Makes the engine.

    Args:
        next_value: trajectory (of the action taken, as published) or soft.
        kl_weight: Weight of the divergence from the prior.
        constraint_weight: Weight of the temporal-difference term.
        min_std: Smallest standard deviation, in units of the prior's.
        kl_once: Whether the divergence counts once for each distinct reward, not for each step (published).
        num_particles: Draws that preferences are averaged over.
        num_steps: Steps of the optimiser.
        learning_rate: Its first step size.
        batch_size: Steps of trajectories an update takes; all of them by default.
    """
    return brm.engines.AVRIL(
        next_value=next_value, kl_weight=kl_weight, constraint_weight=constraint_weight, min_std=min_std,
        kl_once=kl_once, num_particles=num_particles, num_steps=num_steps, learning_rate=learning_rate,
        batch_size=batch_size,
    )  # fmt: skip

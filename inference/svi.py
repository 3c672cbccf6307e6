"""Variational inference: the closest normal posterior; on adapters a mean-field posterior over the weights themselves.

Roeder et al., 1703.09194; for adapters as in Wang et al., 2406.11675.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    guide: str | None = None,
    num_steps: int = 1000,
    guide_learning_rate: float = 0.02,
    num_particles: int = 8,
    rows_a_step: int | None = None,
    rank: int = 10,
    num_samples: int | None = None,
    memory_gib: float = 8.0,
    **training: Any,
) -> brm.SVI:
    """Makes the engine.

    Args:
        guide: full_rank (of heads by default), low_rank or mean_field (of adapters).
        num_steps: Steps of the optimiser for heads.
        guide_learning_rate: Its first step size.
        num_particles: Draws a step.
        rows_a_step: Rows a step; all of them by default.
        rank: Columns of low_rank.
        num_samples: Draws kept, where there are draws.
        memory_gib: Refuse to start work that needs more memory than this.
        training: How adapters are trained, see `bayesrm.engines.training_settings`.
    """
    return brm.SVI(
        guide=guide, num_steps=num_steps, learning_rate=guide_learning_rate, num_particles=num_particles,
        batch_size=rows_a_step, rank=rank, num_samples=num_samples, memory_gib=memory_gib,
        training=brm.engines.training_settings(**training),
    )  # fmt: skip

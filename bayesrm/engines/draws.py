"""Joint draws of rewards and latents: what ArviZ, leave-one-out and predictive checks work from."""

import dataclasses
from collections.abc import Mapping

from .._typing import Tensor
from ..errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class JointDraws:
    """Posterior draws of the rewards of all items of a data set, jointly with the likelihood's latents.

    Attributes:
        rewards: Shape `(S, items)`, float64; chain after chain.
        latents: Unconstrained latents of the same draws, shape `(S, Q)`.
        log_ratio: log p(feedback, theta) - log q(theta) of each draw up to a constant, shape `(S,)`, where the draws
            come from an approximation q whose density is known and the data are those of the fit. `None` otherwise.
        num_chains: Number of Markov chains, each `S / num_chains` draws long.
        sample_stats: What the sampler recorded for each draw, each of shape `(S,)`.
    """

    rewards: Tensor
    latents: Tensor
    log_ratio: Tensor | None = None
    num_chains: int = 1
    sample_stats: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        size = len(self.rewards)
        if len(self.latents) != size or (self.log_ratio is not None and len(self.log_ratio) != size):
            raise ArgumentError("`rewards`, `latents` and `log_ratio` must have one entry for each draw")
        if self.num_chains < 1 or size % self.num_chains:
            raise ArgumentError(f"`num_chains` is {self.num_chains}; it must divide the {size} draws")

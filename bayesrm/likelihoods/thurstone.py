"""Thurstone-Mosteller: choices with normal instead of logistic noise."""

import dataclasses
import math

from .._typing import Array
from ..backend import dist, ops
from ..data.groups import Comparison
from ..errors import ArgumentError
from .base import register, require_pairs
from .bradley_terry import advantage


@register("thurstone")
@dataclasses.dataclass(frozen=True)
class Thurstone:
    """P(first preferred) = Phi((r_0 - r_1 - margin) / (sqrt(2) noise)), case V (Thurstone 1927; Mosteller 1951).

    Attributes:
        noise: Standard deviation of the noise on each candidate's reward, in units of reward.

    Raises:
        ArgumentError: The noise is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> pair = brm.data.Comparison(kind="choice", num_rows=1, num_candidates=2)
        >>> Thurstone()(torch.tensor([[1.0, 0.0]]), pair).probs
        tensor([[0.7602, 0.2398]])
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ArgumentError(f"`noise` is {self.noise}; it must be positive")

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over {0: first chosen, 1: second chosen}."""
        require_pairs("Thurstone", comparison)
        d = advantage(rewards, comparison) / (math.sqrt(2.0) * self.noise)
        return dist.Categorical(logits=ops.stack([ops.log_ndtr(d), ops.log_ndtr(-d)], axis=-1))

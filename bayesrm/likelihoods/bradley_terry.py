"""Bradley-Terry: the standard model of a choice between two responses."""

import dataclasses

from .._typing import Array
from ..backend import dist, ops
from ..data.groups import Comparison
from ..errors import ArgumentError
from .base import register, require_pairs


def advantage(rewards: Array, comparison: Comparison) -> Array:
    """Reward of candidate 0 minus that of candidate 1 minus the margin, shape `(rows,)`."""
    difference = rewards[..., 0] - rewards[..., 1]
    return difference if comparison.margin is None else difference - comparison.margin


@register("bradley_terry")
@dataclasses.dataclass(frozen=True)
class BradleyTerry:
    """P(first preferred) = sigmoid((r_0 - r_1 - margin) / temperature), no ties (Bradley & Terry, Biometrika 1952).

    The margin of a row is a known handicap of candidate 0 in units of reward; since readers put the chosen response
    first, the log likelihood of a chosen/rejected row is the margin loss of Llama 2 and TRL, yet the two outcomes still
    sum to one.

    Attributes:
        temperature: Scale of the noise of a choice in units of reward. It multiplies with the scale of the prior, so it
            is a setting, not a latent.

    Raises:
        ArgumentError: The temperature is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> pair = brm.data.Comparison(kind="choice", num_rows=1, num_candidates=2)
        >>> BradleyTerry()(torch.tensor([[1.0, 0.0]]), pair).probs
        tensor([[0.7311, 0.2689]])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ArgumentError(f"`temperature` is {self.temperature}; it must be positive")

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over {0: first chosen, 1: second chosen}."""
        require_pairs("BradleyTerry", comparison)
        half = 0.5 * advantage(rewards, comparison) / self.temperature
        return dist.Categorical(logits=ops.stack([half, -half], axis=-1))

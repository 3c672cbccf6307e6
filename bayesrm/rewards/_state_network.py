"""The networks behind a `StateReward`."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StateNetwork(nn.Module):
    """Action values, and mean and log standard deviation of the reward, of states.

    Attributes:
        center: What is subtracted from features, shape `(D,)`.
        spread: What they are divided by, shape `(D,)`.
    """

    center: Tensor
    spread: Tensor

    def __init__(
        self, num_features: int, num_actions: int, hidden: Sequence[int], *, by_action: bool, one_hot: bool
    ) -> None:
        super().__init__()
        self._num_rewards = num_actions if by_action else 1
        self._by_action = by_action
        self.values = _layers(num_features, hidden, num_actions, bias=not one_hot)
        self.reward = _layers(num_features, hidden, 2 * self._num_rewards, bias=not one_hot)
        self.register_buffer("center", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_features, dtype=torch.float64))

    def standardise(self, inputs: Float[Tensor, "states features"]) -> None:
        """Sets `center` and `spread` to those of training states."""
        deviation = inputs.std(0, correction=0)
        # A feature that never varies carries nothing; dividing by its rounding would blow it up elsewhere.
        constant = deviation <= 1e-12 * inputs.abs().amax(0).clamp_min(1e-300)
        self.center.copy_(inputs.mean(0))
        self.spread.copy_(torch.where(constant, 1.0, deviation))

    def action_values(self, inputs: Float[Tensor, "states features"]) -> Float[Tensor, "states actions"]:
        """Q(s, .), shape `(S, A)`."""
        values: Tensor = self.values((inputs - self.center) / self.spread)
        return values

    def rewards(
        self, inputs: Float[Tensor, "states features"]
    ) -> tuple[Float[Tensor, "states *actions"], Float[Tensor, "states *actions"]]:
        """Mean and log standard deviation of the reward, each `(S,)`, or `(S, A)` where the action counts."""
        mean, log_std = self.reward((inputs - self.center) / self.spread).split(self._num_rewards, dim=1)
        return (mean, log_std) if self._by_action else (mean[:, 0], log_std[:, 0])


def _layers(num_inputs: int, hidden: Sequence[int], num_outputs: int, *, bias: bool) -> nn.Sequential:
    if not hidden:
        # Each state of a table has entries of its own; a bias would tie them together.
        table = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=torch.float64)
        for parameter in table.parameters():
            nn.init.zeros_(parameter)
        return nn.Sequential(table)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([num_inputs, *hidden]):
        layers += [nn.Linear(before, after, dtype=torch.float64), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], num_outputs, dtype=torch.float64))

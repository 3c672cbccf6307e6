"""Copies of a policy's trainable weights: the reference, a moving anchor, the previous policy."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._typing import Tensor
from ..errors import ArgumentError, PersistenceError

if TYPE_CHECKING:
    from .policy import Policy


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """Values of the trainable weights of a policy at some moment.

    It takes as much memory as the trainable weights: that of the adapters where the policy has adapters, that of the
    whole model otherwise (twice that after `moved_towards`, if the model is in half precision).

    Attributes:
        values: A tensor for each trainable parameter, by its name in the model.

    Example:
        >>> import torch
        >>> Snapshot({"weight": torch.zeros(2, 3)}).num_parameters
        6
    """

    values: Mapping[str, Tensor]

    @property
    def num_parameters(self) -> int:
        """Number of trainable weights, P."""
        return sum(value.numel() for value in self.values.values())

    def moved_towards(self, policy: "Policy", rate: float) -> "Snapshot":
        """The anchor after one step of an exponential moving average: `(1 - rate) * anchor + rate * policy`.

        The result is in float32 at least: in half precision steps of a small rate would round to nothing.

        Args:
            policy: A policy with the parameters of this snapshot, at its present weights.
            rate: Share of the policy, between 0 (stay) and 1 (jump).

        Raises:
            ArgumentError: The rate is outside [0, 1], or the parameters are others.
        """
        if not 0.0 <= rate <= 1.0:
            raise ArgumentError(f"`rate` is {rate}; it lies between 0 and 1")
        self._check(policy.trainable)
        moved = {}
        for name, parameter in policy.trainable.items():
            old, new = _precise(self.values[name]), parameter.detach()
            moved[name] = torch.lerp(old, new.to(old), rate)
        return Snapshot(moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the snapshot into a safetensors file.

        Raises:
            PersistenceError: The file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in self.values.items()}, os.fspath(path))
        except (OSError, SafetensorError) as error:
            raise PersistenceError(f"cannot write a snapshot to {os.fspath(path)}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> "Snapshot":
        """Reads what `save` wrote.

        Raises:
            PersistenceError: The file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(load_file(os.fspath(path), device=str(device)))
        except (OSError, SafetensorError) as error:
            raise PersistenceError(f"cannot read a snapshot from {os.fspath(path)}: {error}") from error

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        different = sorted(set(self.values) ^ set(parameters)) or [
            name for name, value in self.values.items() if value.shape != parameters[name].shape
        ]
        if different:
            raise ArgumentError(
                f"the snapshot is of another model: {different[0]!r} is not in both, or has another shape "
                f"({len(different)} parameters differ)"
            )


def take_snapshot(parameters: Mapping[str, Tensor], device: str | torch.device | None) -> Snapshot:
    """A copy of the parameters, on their own device or on `device`."""
    with torch.no_grad():
        return Snapshot(
            {
                name: p.detach().to(device=p.device if device is None else device, copy=True)
                for name, p in parameters.items()
            }
        )


def assign(parameters: Mapping[str, torch.nn.Parameter], snapshot: Snapshot) -> None:
    """Writes a snapshot into the parameters."""
    snapshot._check(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(snapshot.values[name])


@contextlib.contextmanager
def swapped(parameters: Mapping[str, torch.nn.Parameter], snapshot: Snapshot) -> Iterator[None]:
    """The parameters have the snapshot's values inside the block, and the very tensors they had before after it."""
    snapshot._check(parameters)
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = snapshot.values[name].to(device=parameter.device, dtype=parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _precise(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()

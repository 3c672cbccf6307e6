"""The trainable weights of a network as one vector."""

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float

from .._typing import Tensor
from ..errors import ArgumentError


class FlatWeights(torch.nn.Module):
    """A network whose trainable weights are read and written as one vector; a base class.

    Attributes:
        model: The model, in peft's wrapping where it has adapters.
        initial: Prior mean of each parameter site.
        lock: Held by whatever changes the weights or hooks of the modules for a while, so that threads can share a
            network; re-entrant. Methods that read or write weights take it themselves.
    """

    model: Any
    initial: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # A lock cannot be copied, and a copy of the network needs its own.
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = threading.RLock()

    @cached_property
    def sites(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by site name, in the order of the flat vector `theta`."""
        return {site_of(name): p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(iter(self.sites.values())).device

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters, P."""
        return sum(p.numel() for p in self.sites.values())

    def theta(self) -> Tensor:
        """All trainable parameters in one vector, shape `(P,)`, a copy."""
        with self.lock:
            return torch.cat([p.detach().reshape(-1) for p in self.sites.values()])

    def set_theta(self, vector: Tensor) -> None:
        """Writes a vector of shape `(P,)` into the trainable parameters."""
        parts = self.split(vector)
        with self.lock, torch.no_grad():
            for site, p in self.sites.items():
                p.copy_(parts[site])

    def initial_theta(self) -> Tensor:
        """Prior mean of all trainable parameters, shape `(P,)`."""
        return torch.cat([value.reshape(-1) for value in self.initial.values()])

    def set_initial(self, vector: Tensor) -> None:
        """Sets the prior mean of all trainable parameters, shape `(P,)`."""
        for site, part in self.split(vector).items():
            self.initial[site] = part.to(self.initial[site])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector of shape `(P,)` by sites.

        Raises:
            ArgumentError: It has another shape.
        """
        if vector.shape != (self.num_parameters,):
            raise ArgumentError(
                f"`vector` has shape {tuple(vector.shape)}; the network has {self.num_parameters} parameters"
            )
        parts = vector.split([p.numel() for p in self.sites.values()])
        return {site: part.reshape(p.shape) for (site, p), part in zip(self.sites.items(), parts, strict=True)}

    def apply_parameters(self, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Float[Tensor, "n"]:
        """What the network says of a collated batch under other parameters, shape `(n,)`; differentiable in them."""
        values = {
            f"model.{name}": parameters[site_of(name)] for name, p in self.model.named_parameters() if p.requires_grad
        }
        with self.lock:
            result: Tensor = torch.func.functional_call(self, values, kwargs=dict(batch))
        return result

    @contextlib.contextmanager
    def weights(self, vector: Tensor) -> Iterator[None]:
        """Inside the block the trainable parameters are those of a vector of shape `(P,)`; no other thread reads."""
        with self.lock:
            own = self.theta()
            self.set_theta(vector)
            try:
                yield
            finally:
                self.set_theta(own)


def site_of(name: str) -> str:
    """Turns `base_model.model.a.lora_A.default.weight` into `a.lora_A`, a head's name likewise."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return re.sub(r"\.(lora_\w+)\.default(\.weight)?$", r".\1", name)

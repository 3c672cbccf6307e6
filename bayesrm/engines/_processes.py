"""The processes of a distributed run, as accelerate sees them: one where nothing was launched."""

import dataclasses
import os

import torch

from .._typing import Tensor


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        index: Rank of this process.
        count: Number of processes.
        device: Device of messages between them.
    """

    index: int = 0
    count: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> "Processes":
        """The processes that `torchrun` or `accelerate launch` started, or this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, state.device)

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def share(self, tensor: Tensor, owner: int) -> Tensor:
        """The tensor of process `owner`, on every process."""
        if self.count == 1:
            return tensor
        message = tensor.to(self.device).contiguous()
        torch.distributed.broadcast(message, src=owner)
        return message.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on every process."""
        if self.count == 1:
            return tensor
        message = tensor.to(self.device).contiguous()
        torch.distributed.all_reduce(message)
        return message.to(tensor.device)

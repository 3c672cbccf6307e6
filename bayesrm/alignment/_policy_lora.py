"""Adapters of a policy."""

import dataclasses

from ..errors import ArgumentError
from ..rewards._checks import check_integer


@dataclasses.dataclass(frozen=True)
class PolicyLoRA:
    """Low-rank adapters on a policy's frozen weights (Hu et al. 2021, 2106.09685), through peft.

    Attributes:
        rank: Rank of the adapters.
        alpha: Adapters are multiplied by `alpha / rank`.
        dropout: Dropout on the input of the adapters in training mode. Above 0, the policy that is trained is not the
            one that draws and scores, and importance weights are no longer exact.
        target_modules: Names (endings) of the modules that get adapters, or "all-linear"; by default what peft knows
            for the architecture.

    Raises:
        ArgumentError: A setting has a value that cannot be used.

    Example:
        >>> PolicyLoRA(rank=4).alpha
        16.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        if not self.alpha > 0:
            raise ArgumentError(f"`alpha` is {self.alpha}; it is a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ArgumentError(f"`dropout` is {self.dropout}; it is a probability below 1")

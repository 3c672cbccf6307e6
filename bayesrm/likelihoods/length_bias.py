"""Length bias: judges favour longer (or shorter) responses beyond their worth."""

import dataclasses

from .._typing import Array
from ..backend import dist, sample
from ..data.groups import Comparison
from ..errors import ArgumentError, LikelihoodError
from .base import Likelihood, register


@register("length_bias")
@dataclasses.dataclass(frozen=True)
class LengthBias:
    """The base likelihood at rewards r_i + b length_i / unit: b is learnt here and stays out of the reward.

    Only differences of length matter to comparisons. Beliefs about the reward are free of the bias.

    Attributes:
        base: Likelihood of the unbiased answer.
        unit: Words that make one unit of length; b is in units of reward per `unit` words.
        scale: Prior standard deviation of b (mean 0).

    Latents:
        length_coefficient: b, shape `()`.

    Raises:
        ArgumentError: `unit` is not positive.

    Example:
        >>> import torch, bayesrm as brm
        >>> lengths = torch.tensor([[200.0, 100.0]])
        >>> rows = brm.data.Comparison(kind="choice", num_rows=1, num_candidates=2, lengths=lengths)
        >>> with brm.backend.Recorder({"length_coefficient": torch.tensor(1.0)}):
        ...     LengthBias(brm.likelihoods.BradleyTerry())(torch.zeros(1, 2), rows).probs
        tensor([[0.7311, 0.2689]])
    """

    base: Likelihood
    unit: float = 100.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.unit > 0:
            raise ArgumentError(f"`unit` is {self.unit}; it is a positive number of words")

    def __call__(self, rewards: Array, comparison: Comparison) -> object:
        """Distribution over the outcomes of the base likelihood."""
        if comparison.lengths is None:
            raise LikelihoodError("LengthBias needs response lengths; give `words` with precomputed features")
        coefficient = sample("length_coefficient", dist.Normal(0.0, self.scale))
        return self.base(rewards + coefficient * (comparison.lengths / self.unit), comparison)

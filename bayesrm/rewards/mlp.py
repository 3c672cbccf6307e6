"""A multilayer perceptron on features."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from .._typing import Array
from ..backend import ops
from ..errors import ArgumentError
from .features import FeatureExtractor


class Activation(enum.StrEnum):
    """Nonlinearity of the hidden layers."""

    TANH = "tanh"
    RELU = "relu"
    GELU = "gelu"


@dataclasses.dataclass(frozen=True)
class MLP:
    """r = w . act(... act(x W_0 / sqrt(n_0) + b_0) ...) / sqrt(n), no output bias; see `Head` for the first attributes.

    Weights are divided by the square root of their fan-in in the forward pass (the parametrisation of Neal 1996 and of
    the neural tangent kernel), so that one prior precision suits layers of every width.

    Attributes:
        hidden: Width of each hidden layer.
        activation: Their nonlinearity.

    Raises:
        ArgumentError: A width is not positive or the activation is unknown.

    Example:
        >>> MLP(hidden=(8,)).parameter_shapes(3)
        {'layer_0.weight': (3, 8), 'layer_0.bias': (8,), 'output.weight': (8,)}
    """

    features: FeatureExtractor | None = None
    standardize: bool = False
    hidden: tuple[int, ...] = (64,)
    activation: str = "tanh"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise ArgumentError(f"`hidden` is {self.hidden}; give at least one positive layer width")
        known = [a.value for a in Activation]
        if self.activation not in known:
            raise ArgumentError(f"`activation` is {self.activation!r}; it is one of {known}")
        object.__setattr__(self, "activation", Activation(self.activation).value)

    @property
    def is_linear(self) -> bool:
        """Always false."""
        return False

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Weight and bias of each hidden layer, and the output weight."""
        shapes: dict[str, tuple[int, ...]] = {}
        fan_in = num_features
        for i, width in enumerate(self.hidden):
            shapes[f"layer_{i}.weight"] = (fan_in, width)
            shapes[f"layer_{i}.bias"] = (width,)
            fan_in = width
        return shapes | {"output.weight": (fan_in,)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Rewards, shape `(...,)`."""
        act = getattr(ops, self.activation)
        hidden = features
        for i in range(len(self.hidden)):
            fan_in = hidden.shape[-1]
            hidden = act(hidden @ (parameters[f"layer_{i}.weight"] / math.sqrt(fan_in)) + parameters[f"layer_{i}.bias"])
        return hidden @ (parameters["output.weight"] / math.sqrt(hidden.shape[-1]))

"""A linear reward on features: Bayesian logistic regression when the feedback is pairwise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._typing import Array
from .features import FeatureExtractor


@dataclasses.dataclass(frozen=True)
class Linear:
    """r(x, y) = weight . features(x, y); see `Head` for the attributes.

    There is no bias: comparisons do not identify it, and ratings and approvals have their own cut-points and offsets.

    Example:
        >>> import torch
        >>> Linear().apply({"weight": torch.tensor([1.0, 2.0])}, torch.tensor([[3.0, 4.0]]))
        tensor([11.])
    """

    features: FeatureExtractor | None = None
    standardize: bool = False

    @property
    def is_linear(self) -> bool:
        """Always true."""
        return True

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """`{"weight": (num_features,)}`."""
        return {"weight": (num_features,)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Rewards, shape `(...,)`."""
        return features @ parameters["weight"]

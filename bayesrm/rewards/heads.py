"""What a head is: a pure function from parameters and features to rewards, the same under both backends."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from .._typing import Array, Tensor
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from .features import FeatureExtractor


@runtime_checkable
class Extractor(Protocol):
    """Turns items into features; `FeatureExtractor`, or a tangent, which is its own."""

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> np.ndarray:
        """Features of prompts and responses, shape `(items, num_features)`."""
        ...

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> np.ndarray:
        """Features of the items of comparisons, shape `(items, num_features)`."""
        ...


@runtime_checkable
class Head(Protocol):
    """A reward function on fixed features of a (prompt, response) item.

    Attributes:
        features: Turns texts into features; `None` when the data bring their own (`data.with_features`).
        standardize: Whether features are centred and scaled to unit variance over the training items; the constants are
            kept with the posterior.
        is_linear: Whether rewards are linear in the parameters, so that the tangent at any point is the head itself.
    """

    @property
    def features(self) -> Extractor | None:
        """Turns texts into features; `None` when the data bring their own."""
        ...

    @property
    def standardize(self) -> bool:
        """Whether features are centred and scaled to unit variance over the training items."""
        ...

    @property
    def is_linear(self) -> bool:
        """Whether rewards are linear in the parameters."""
        ...

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter site for features of size `num_features`."""
        ...

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Array:
        """Rewards, shape `(...,)`, of features of shape `(..., num_features)`; written with `bayesrm.ops`."""
        ...


class SelfFeaturedHead:
    """A base of linear heads that make their own features, on a scale of their own."""

    @property
    def standardize(self) -> bool:
        """Never."""
        return False

    @property
    def is_linear(self) -> bool:
        """Always."""
        return True

    @property
    def features(self) -> Any:
        """The head itself."""
        return self


class MixtureHead(SelfFeaturedHead):
    """A base of heads whose features of an item are its rewards under S draws, and whose parameter their shares."""

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """`{"share": (S,)}`."""
        return {"share": (num_features,)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Rewards under a mixture of the draws, shape `(...,)`, of features of shape `(..., S)`."""
        return features @ parameters["share"]


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """All parameters in one vector, in the order of the mapping."""
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def unflatten(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Inverse of `flatten`."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, vector.split(sizes), strict=True)}


def head_config(head: Head) -> dict[str, Any]:
    """Settings of a shipped head as JSON values."""
    settings = {k: v for k, v in vars(head).items() if k != "features"}
    extractor = head.features.to_config() if isinstance(head.features, FeatureExtractor) else None
    return {"type": type(head).__name__, "settings": settings, "features": extractor}

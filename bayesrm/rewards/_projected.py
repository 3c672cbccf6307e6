"""What engines ask of a head whose coordinates do not hold the whole prior: tangents and Gaussian processes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .._typing import Tensor
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from .heads import Head
from .tangent import TangentFeatures


@runtime_checkable
class ProjectedHead(Head, Protocol):
    """A linear head that makes its own features, with prior covariance of new items that these do not hold.

    `TangentFeatures.outside` is in units of the prior standard deviation of the head's one parameter site.
    """

    @property
    def title(self) -> str:
        """The reward function that it stands for, as summaries call it."""
        ...

    def encode_items(self, data: Comparisons, *, progress: bool = False) -> TangentFeatures:
        """Features of the items of comparisons, in their order."""
        ...

    def encode_features(self, features: Tensor, sizes: Sequence[int] | None) -> TangentFeatures:
        """Features of items that are given as arrays, `sizes` of them to a prompt in turn; `None` leaves out the rest.

        Raises:
            ArgumentError: The head reads texts alone, or the arrays have another width.
            DataError: A number is not finite.
        """
        ...

    def encode_texts(
        self, prompts: Sequence[Content], responses: Sequence[Content], sizes: Sequence[int], *, start: int = 0
    ) -> TangentFeatures:
        """Features of prompts and responses, `sizes` of them to a prompt in turn; errors count items from `start`.

        Raises:
            ArgumentError: The head reads arrays alone.
            DataError: A text cannot be used.
        """
        ...

    def without_rest(self) -> "ProjectedHead":
        """The same head with no covariance outside its coordinates."""
        ...

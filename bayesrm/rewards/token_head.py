"""Rewards of tokens as a reward function of responses, so that everything for heads serves it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from .._typing import Tensor
from ..beliefs import covariance_root
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from ..errors import ArgumentError
from ..token_beliefs import TokenBelief
from .heads import MixtureHead
from .tangent import TangentFeatures


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScores:
    """Rewards of the T tokens of one response.

    Attributes:
        prompt: Token ids of the prompt; with those of the response they tell which steps two responses share.
        tokens: Token ids of the response.
        text: The response.
        spans: Offsets of each token's first character and the one after its last, shape `(T, 2)`.
        draws: Expected rewards under S draws of what all tokens share, shape `(S, T)`, float64; S may be 1.
        variance: Variance of each token's reward around each draw, shape `(T,)`, float64.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    spans: np.ndarray
    draws: Tensor
    variance: Tensor


@runtime_checkable
class TokenScorer(Protocol):
    """Scores the tokens of responses."""

    @property
    def title(self) -> str:
        """What it is, as summaries call it."""
        ...

    @property
    def num_draws(self) -> int:
        """S, the number of draws of what all tokens share."""
        ...

    @property
    def num_parameters(self) -> int:
        """Trained numbers behind it."""
        ...

    def score(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0, progress: bool = False
    ) -> list[TokenScores]:
        """Rewards of the tokens of responses, one prompt each; errors count items from `start`.

        Raises:
            DataError: A text cannot be used; the message names the item.
        """
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes what the scorer needs into a folder, and returns its settings as JSON values."""
        ...

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> "TokenScorer":
        """The scorer that `save` wrote."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRewardHead(MixtureHead):
    """r(x, y) = sum of the rewards of the tokens of y: a reward function made of a `TokenScorer`.

    Its features of an item are the item's rewards under the scorer's S draws, and its parameter, `share`, the share of
    each. What varies beside, independently from step to step, is covariance outside of these: two responses that begin
    alike share the rewards of that beginning.

    Attributes:
        scorer: Scores the tokens.
    """

    scorer: TokenScorer

    @property
    def num_features(self) -> int:
        """S."""
        return self.scorer.num_draws

    @property
    def title(self) -> str:
        """The scorer's."""
        return self.scorer.title

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> np.ndarray:
        """Rewards of items under each draw, shape `(items, S)`, float64."""
        scores = self.scorer.score(prompts, responses, progress=progress)
        values: np.ndarray = torch.stack([s.draws.sum(1) for s in scores]).numpy()
        return values

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> np.ndarray:
        """Rewards of the items of comparisons under each draw, shape `(items, S)`, float64."""
        texts = [data.text(i) for i in range(data.num_items)]
        return self.extract([p for p, _ in texts], [r for _, r in texts], progress=progress)

    def encode_items(self, data: Comparisons, *, progress: bool = False) -> TangentFeatures:
        """Features of the items of comparisons, in their order."""
        texts = [data.text(i) for i in range(data.num_items)]
        scores = self.scorer.score([p for p, _ in texts], [r for _, r in texts], progress=progress)
        owner = np.asarray(data.prompt_of_item)
        return _features(scores, [np.flatnonzero(owner == prompt) for prompt in range(data.num_prompts)])

    def encode_features(self, features: Tensor, sizes: Sequence[int] | None) -> TangentFeatures:
        """Refuses: tokens cannot be found in features.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(f"a {self.title} reward reads texts; give prompts and lists of responses")

    def encode_texts(
        self, prompts: Sequence[Content], responses: Sequence[Content], sizes: Sequence[int], *, start: int = 0
    ) -> TangentFeatures:
        """Features of prompts and responses, `sizes` of them to a prompt in turn; errors count items from `start`."""
        scores = self.scorer.score(prompts, responses, start=start)
        ends = np.cumsum(sizes)
        return _features(scores, [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)])

    def without_rest(self) -> "TokenRewardHead":
        """The same head without the variance of single tokens."""
        return TokenRewardHead(_Certain(self.scorer))

    def belief(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> TokenBelief:
        """Belief about the tokens of responses, one prompt each."""
        return token_belief(self.scorer.score(prompts, responses, progress=progress))


@dataclasses.dataclass(frozen=True, eq=False)
class _Certain:
    """A scorer whose tokens vary with its draws alone."""

    scorer: TokenScorer

    @property
    def title(self) -> str:
        return self.scorer.title

    @property
    def num_draws(self) -> int:
        return self.scorer.num_draws

    @property
    def num_parameters(self) -> int:
        return self.scorer.num_parameters

    def score(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0, progress: bool = False
    ) -> list[TokenScores]:
        scores = self.scorer.score(prompts, responses, start=start, progress=progress)
        return [dataclasses.replace(s, variance=torch.zeros_like(s.variance)) for s in scores]

    def save(self, folder: Path) -> dict[str, Any]:
        raise ArgumentError("this reward is a part of a posterior; save the posterior that it came from")

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> "TokenScorer":
        raise ArgumentError("this reward is a part of a posterior; restore the posterior that it came from")


def token_belief(scores: Sequence[TokenScores]) -> TokenBelief:
    """Scores of several responses as one belief."""
    longest = max((len(s.tokens) for s in scores), default=0)
    num_draws = len(scores[0].draws) if scores else 1
    spans = torch.zeros(len(scores), longest, 2, dtype=torch.int64)
    draws = torch.zeros(num_draws, len(scores), longest, dtype=torch.float64)
    std = torch.zeros(len(scores), longest, dtype=torch.float64)
    mask = torch.zeros(len(scores), longest, dtype=torch.bool)
    for row, s in enumerate(scores):
        count = len(s.tokens)
        spans[row, :count] = torch.from_numpy(s.spans)
        draws[:, row, :count], std[row, :count], mask[row, :count] = s.draws, s.variance.sqrt(), True
    return TokenBelief(
        tuple(s.text for s in scores), spans, draws.mean(0), std, mask, draws if num_draws > 1 else None
    )  # fmt: skip


def _features(scores: Sequence[TokenScores], prompts: Sequence[np.ndarray]) -> TangentFeatures:
    values = torch.stack([s.draws.sum(1) for s in scores])
    if not any(bool((s.variance > 0).any()) for s in scores):
        return TangentFeatures(values, None)
    outside = torch.zeros(len(scores), max([len(items) for items in prompts]), dtype=torch.float64)
    for items in prompts:
        root = covariance_root(_covariance([scores[item] for item in items]))
        outside[torch.from_numpy(items), : root.shape[1]] = root
    return TangentFeatures(values, outside)


def _covariance(scores: Sequence[TokenScores]) -> Tensor:
    """Covariance that the variance of single steps gives responses to one prompt, shape `(K, K)`."""
    covariance = torch.zeros(len(scores), len(scores), dtype=torch.float64)
    sums: list[Tensor] = []
    for i, own in enumerate(scores):
        shared = [_common(own, other) for other in scores[:i]]
        variance = own.variance.clone()
        longest = max(shared, default=0)
        if longest:
            # Shared steps have one variance, which batches of other shapes compute with other rounding.
            earlier = sums[shared.index(longest)]
            variance[:longest] = earlier[1 : longest + 1] - earlier[:longest]
        sums.append(torch.nn.functional.pad(variance.cumsum(0), (1, 0)))
        covariance[i, i] = sums[i][-1]
        for j, count in enumerate(shared):
            covariance[i, j] = covariance[j, i] = sums[j][count]
    return covariance


def _common(one: TokenScores, other: TokenScores) -> int:
    """Steps that two responses share: the tokens before the first difference."""
    if one.prompt != other.prompt:
        return 0
    pairs = zip(one.tokens, other.tokens, strict=False)
    longest = min(len(one.tokens), len(other.tokens))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), longest)

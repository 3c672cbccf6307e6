"""Posteriors over the rewards of tokens, which are posteriors over the rewards of responses too."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError
from ..programs import RewardModel
from ..rewards import TokenRewardHead
from ..token_beliefs import TokenBelief
from ._schema import FeedbackSchema
from .posterior import Posterior
from .report import FitReport


class TokenPosterior(Posterior):
    """A posterior over the reward of each token; that of a response is the sum over its tokens.

    It predicts, selects, aligns and is saved like any other posterior, and tells the rewards of tokens beside.

    Attributes:
        unconstrained_latents: Draws of the likelihood's latents, shape `(S, Q)` with the head's S draws, or `(1, Q)`.
    """

    def __init__(
        self, program: RewardModel, schema: FeedbackSchema, report: FitReport, latents: Tensor | None = None
    ) -> None:
        if not isinstance(program.reward, TokenRewardHead):
            raise ArgumentError(f"`program` has a {type(program.reward).__name__} reward; it must be TokenRewardHead")
        count = program.reward.num_features
        latents = torch.zeros(1, 0, dtype=torch.float64) if latents is None else latents
        if len(latents) not in (1, count):
            raise ArgumentError(f"`latents` has {len(latents)} draws; the reward has {count}")
        self.program = program
        self.schema = schema
        self.report = report
        self.unconstrained_latents = latents

    @property
    def head(self) -> TokenRewardHead:
        """The reward function."""
        head = self.program.head
        assert isinstance(head, TokenRewardHead)
        return head

    def predict_tokens(
        self, prompts: Sequence[Any], responses: Sequence[Any], *, progress: bool = False
    ) -> TokenBelief:
        """Belief about the reward of each token.

        Args:
            prompts: N prompts, strings or message lists.
            responses: N responses, one to each prompt.
            progress: Whether to show progress.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A text cannot be used.
        """
        if len(prompts) != len(responses):
            raise ArgumentError(f"{len(prompts)} prompts but {len(responses)} responses; give one response each")
        return self.head.belief(prompts, responses, progress=progress)

    def _num_features(self) -> int:
        return self.head.num_features

    def _belief(self, features: Tensor, sizes: Sequence[int], outside: Tensor | None) -> RewardBelief:
        num_draws, most = features.shape[1], max(sizes)
        draws = features.new_zeros(num_draws, len(sizes), most)
        rest = features.new_zeros(len(sizes), most, 1 if outside is None else outside.shape[1])
        mask = torch.zeros(len(sizes), most, dtype=torch.bool)
        start = 0
        for prompt, size in enumerate(sizes):
            items = slice(start, start + size)
            draws[:, prompt, :size] = features[items].T
            if outside is not None:
                rest[prompt, :size] = outside[items]
            mask[prompt, :size] = True
            start += size
        if num_draws == 1:
            return RewardBelief(draws[0], rest, mask)
        if outside is None:
            return RewardBelief.from_draws(draws, mask)
        shared = RewardBelief.from_draws(draws, mask)
        return RewardBelief(shared.mean, torch.cat([shared.root, rest], dim=2), mask)

    def _latents_of(self, draw: int) -> Tensor:
        return self.unconstrained_latents[draw if len(self.unconstrained_latents) > 1 else 0]

    def _feedback_draws(
        self, features: Tensor, groups: Sequence[FeedbackGroup], num_samples: int, seed: int, outside: Tensor | None
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        count = features.shape[1]
        # Without variance of single tokens, more draws of one reward would all be the same.
        around = 1 if outside is None else max(1, num_samples // count)
        for draw in range(count):
            rewards = features[:, draw].expand(around, -1)
            if outside is not None:
                noise = torch.randn(around, outside.shape[1], generator=generator, dtype=torch.float64)
                rewards = rewards + noise @ outside.T
            yield [rewards[:, g.items] for g in groups], self._latents_of(draw)

    def _joint_draws(
        self, features: Tensor, sizes: Sequence[int], outside: Tensor | None, num_samples: int, seed: int
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.arange(num_samples) % features.shape[1]
        rewards = features.T[chosen].clone()
        if outside is not None:
            parts = [
                torch.randn(num_samples, part.shape[1], generator=generator, dtype=torch.float64) @ part.T
                for part in outside.split(list(sizes))
            ]
            rewards += torch.cat(parts, dim=1)
        return rewards, torch.stack([self._latents_of(int(draw)) for draw in chosen]), {}

    def _latent_draws(self, num_samples: int, seed: int) -> Tensor:
        return self.unconstrained_latents[torch.arange(num_samples) % len(self.unconstrained_latents)]

    def _state(self) -> dict[str, Tensor]:
        return {"latents": self.unconstrained_latents}

    @classmethod
    def _restore(
        cls, program: RewardModel, schema: FeedbackSchema, report: FitReport, tensors: dict[str, Tensor]
    ) -> "TokenPosterior":
        return cls(program, schema, report, tensors["latents"])

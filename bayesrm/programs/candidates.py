"""Responses to some prompts with all that a target distribution over responses asks of them."""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..beliefs import RewardBelief
from ..errors import ArgumentError

#: Where a candidate may come from.
SOURCES = ("reference", "policy", "anchor", "mixture", "given")


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredCandidates:
    """Candidates of B prompts, at most n each: a belief about their rewards, and their log-probabilities.

    Log-probabilities are sums over the tokens of a response, in nats. Whatever stands outside the belief's mask is
    ignored.

    Attributes:
        belief: Joint belief about the rewards.
        reference: log p0(y | x) under the reference policy, shape `(B, n)`.
        proposal: log p'(y | x) under the distribution that each candidate was drawn from, shape `(B, n)`; `None` where
            the candidates are not drawn, but are all the responses there are.
        anchor: log-probabilities under the previous policy or a moving anchor, shape `(B, n)`.
        preferences: Probability that candidate i is preferred to j, shape `(B, n, n)`; by default what a Bradley-Terry
            judge with the believed rewards would say.
        sources: Which distribution drew the candidates at each of the n places, of `SOURCES`; by default all
            candidates come from one.

    Raises:
        ArgumentError: Shapes disagree, a number of a real candidate is not finite, or the preferences are not
            complementary.

    Example:
        >>> belief = RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> ScoredCandidates(belief, reference=torch.tensor([[0.3, 0.7]]).log()).exhaustive
        True
    """

    belief: RewardBelief
    reference: Float[Tensor, "prompts candidates"]
    proposal: Float[Tensor, "prompts candidates"] | None = None
    anchor: Float[Tensor, "prompts candidates"] | None = None
    preferences: Float[Tensor, "prompts candidates candidates"] | None = None
    sources: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.belief.mean.shape)
        for name in ("reference", "proposal", "anchor"):
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ArgumentError(f"`{name}` has shape {tuple(value.shape)}; the belief is about {shape}")
            if not bool(torch.isfinite(value[self.mask]).all()):
                raise ArgumentError(f"`{name}` has entries of real candidates that are not finite")
            if value.requires_grad:
                raise ArgumentError(f"`{name}` requires gradients; a target is fixed: pass `{name}.detach()`")
        if self.preferences is not None:
            self._check_preferences(self.preferences)
        if self.sources is not None and (len(self.sources) != shape[1] or not set(self.sources) <= set(SOURCES)):
            raise ArgumentError(f"`sources` is {self.sources}; it names one of {SOURCES} for each of {shape[1]} places")

    def _check_preferences(self, preferences: Tensor) -> None:
        shape = (*self.belief.mean.shape, self.belief.mean.shape[1])
        if tuple(preferences.shape) != shape:
            raise ArgumentError(f"`preferences` has shape {tuple(preferences.shape)}; the belief needs {shape}")
        both = self.mask[:, :, None] & self.mask[:, None, :]
        inside = preferences[both]
        gap = (preferences + preferences.transpose(1, 2) - 1.0)[both].abs()
        if not bool(((gap < 1e-4) & (inside >= 0.0) & (inside <= 1.0)).all()):
            raise ArgumentError("`preferences` must hold probabilities with P(i over j) + P(j over i) = 1")

    @property
    def mask(self) -> Bool[Tensor, "prompts candidates"]:
        """True for real candidates."""
        return self.belief.valid

    @property
    def exhaustive(self) -> bool:
        """Whether the candidates are all the responses there are, each once, and not draws."""
        return self.proposal is None

    @property
    def log_proposal(self) -> Float[Tensor, "prompts candidates"]:
        """Log p'(y | x); where the candidates are exhaustive, that of the uniform distribution over them.

        With it `sum_i f_i / (n p'_i)` is an estimate of the sum of f over all responses, or that sum itself.
        """
        if self.proposal is not None:
            return self.proposal
        return -self.mask.sum(1, keepdim=True).to(self.reference).log().expand_as(self.reference)

    @property
    def previous(self) -> Float[Tensor, "prompts candidates"]:
        """The anchor.

        Raises:
            ArgumentError: There is none.
        """
        if self.anchor is None:
            raise ArgumentError(
                "the target needs `anchor`, the candidates' log-probabilities under the previous policy"
            )
        return self.anchor

    @property
    def preference_matrix(self) -> Float[Tensor, "prompts candidates candidates"]:
        """P(i preferred to j): as given, or of a Bradley-Terry judge with the believed rewards; 0 for masked ones."""
        if self.preferences is None:
            return self.belief.preference_matrix()
        return torch.where(self.mask[:, :, None] & self.mask[:, None, :], self.preferences, 0.0)

    def log_weights_of(self, log_density: Float[Tensor, "prompts candidates"]) -> Float[Tensor, "prompts candidates"]:
        """Logarithms of the self-normalised importance weights of a density known up to a constant; they sum to 1.

        Where the candidates are exhaustive the weights are the normalised density itself.
        """
        ratio = (log_density - self.log_proposal).masked_fill(~self.mask, -math.inf)
        return torch.log_softmax(ratio, dim=1)

    def select(self, prompts: Tensor | slice) -> "ScoredCandidates":
        """The candidates of some of the prompts."""
        belief = RewardBelief(
            self.belief.mean[prompts],
            self.belief.root[prompts],
            self.mask[prompts],
            None if self.belief.draws is None else self.belief.draws[:, prompts],
        )
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[prompts]
            for name in ("reference", "proposal", "anchor", "preferences")
        }
        return ScoredCandidates(belief, sources=self.sources, **parts)

    def to(self, device: str | torch.device) -> "ScoredCandidates":
        """The same candidates on another device."""
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device)
            for name in ("reference", "proposal", "anchor", "preferences")
        }
        return ScoredCandidates(self.belief.to(device), sources=self.sources, **parts)

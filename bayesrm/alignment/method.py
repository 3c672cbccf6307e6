"""An alignment method: a target, a projection onto it, and where candidates are drawn."""

import dataclasses
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..engines.response_posterior import ResponsePosterior, Target, response_posterior
from ..errors import ArgumentError
from ..programs import ExponentialTilt, ScoredCandidates
from .projections import PathConsistency, Projection, RewardedTokens, TokenPaths, TokenPolicyGradient


@dataclasses.dataclass(frozen=True)
class Method:
    """Rounds of: propose candidates, score them, weigh them by a target, project the policy onto it.

    Published methods are such combinations, ready in `inference/alignment/`.

    Attributes:
        target: The distribution to reach, for instance a `GoodnessPosterior` or `targets.BestOfN`.
        projection: The loss, for instance `projections.ListwiseCrossEntropy`.
        proposal: What draws the candidates of a round: `"reference"`, `"policy"` as it is when the round begins,
            `"anchor"`, or `"mixture"`, token by token the geometric mixture of policy and reference; one for all, or
            one for each of the `num_candidates` places.
        num_candidates: Candidates of each prompt.
        anchor_rate: After each round the anchor moves towards the policy by this rate (exponential moving average of
            the weights). With 1 the anchor is the policy as it was when the round began.
        anchor_every: Rounds between the anchor's moves.
        mixture_weight: Weight of the reference in `"mixture"` proposals.

    Raises:
        ArgumentError: A setting is out of range or names an unknown distribution.

    Example:
        >>> import bayesrm as brm
        >>> brain = Method(
        ...     brm.GoodnessPosterior(), brm.alignment.projections.ListwiseCrossEntropy(), proposal="policy"
        ... )
        >>> brain.sources[:2]
        ('policy', 'policy')
    """

    target: Target
    projection: Projection | PathConsistency | TokenPolicyGradient
    proposal: str | tuple[str, ...] = "policy"
    num_candidates: int = 8
    anchor_rate: float = 1.0
    anchor_every: int = 1
    mixture_weight: float = 0.25

    def __post_init__(self) -> None:
        if isinstance(self.target, type) or not callable(getattr(self.target, "log_density", None)):
            raise ArgumentError(f"`target` is {self.target!r}; it is a target such as GoodnessPosterior()")
        if isinstance(self.projection, type) or not callable(self.projection):
            raise ArgumentError(f"`projection` is {self.projection!r}; it is one of bayesrm.alignment.projections")
        for name in ("num_candidates", "anchor_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"`{name}` is {value!r}; it is a positive whole number")
        known = ("reference", "policy", "anchor", "mixture")
        if not set(self.sources) <= set(known) or len(self.sources) != self.num_candidates:
            raise ArgumentError(
                f"`proposal` is {self.proposal!r}; it is one of {known}, or one for each of the {self.num_candidates} "
                "places of `num_candidates`"
            )
        goodness = getattr(self.target, "goodness", None)
        if self.needs_tokens and isinstance(goodness, ExponentialTilt) and goodness.maximum is None:
            raise ArgumentError(
                "path consistency needs rewards that do not move with the candidates at hand; give the goodness of "
                "`target` a `maximum`, for instance ExponentialTilt(temperature, maximum=0.0)"
            )
        if not 0.0 < self.anchor_rate <= 1.0:
            raise ArgumentError(f"`anchor_rate` is {self.anchor_rate}; it lies above 0, up to 1")
        if not 0.0 <= self.mixture_weight <= 1.0:
            raise ArgumentError(f"`mixture_weight` is {self.mixture_weight}; it lies between 0 and 1")

    @property
    def sources(self) -> tuple[str, ...]:
        """What draws the candidate at each place."""
        return (self.proposal,) * self.num_candidates if isinstance(self.proposal, str) else tuple(self.proposal)

    @property
    def needs_tokens(self) -> bool:
        """Whether the projection takes token-level paths instead of log-probabilities of whole responses."""
        return isinstance(self.projection, PathConsistency)

    @property
    def needs_token_rewards(self) -> bool:
        """Whether the projection takes rewards of tokens, which not every posterior predicts."""
        return bool(getattr(self.projection, "needs_token_rewards", False))

    def weigh(self, candidates: ScoredCandidates) -> ResponsePosterior:
        """The target on these candidates.

        Its weights are not smoothed: the policy's are not, and smoothing one side alone would move the minimum of a
        self-normalised projection away from the target.
        """
        return response_posterior(self.target, candidates, smooth=False)

    def loss(
        self,
        policy: Float[Tensor, "prompts candidates"] | TokenPaths | RewardedTokens,
        posterior: ResponsePosterior,
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt, to be descended.

        Args:
            policy: log q(y | x) of the candidates, with gradients; `TokenPaths` where `needs_tokens`, `RewardedTokens`
                where `needs_token_rewards`.
            posterior: What `weigh` returned for them.

        Raises:
            ArgumentError: `policy` is of another kind than the projection takes.
        """
        takes: type = TokenPaths if self.needs_tokens else RewardedTokens if self.needs_token_rewards else Tensor
        if not isinstance(policy, takes):
            wanted = "log-probabilities of shape (B, n)" if takes is Tensor else takes.__name__
            raise ArgumentError(
                f"`policy` is a {type(policy).__name__}; {type(self.projection).__name__} takes {wanted}"
            )
        project: Any = self.projection
        losses: Tensor = project(policy, posterior)
        if not isinstance(losses, Tensor) or losses.shape != posterior.log_evidence.shape:
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ArgumentError(
                f"`projection` {type(project).__name__} returned {found}; it returns a loss for each prompt, shape "
                f"{tuple(posterior.log_evidence.shape)}"
            )
        return losses

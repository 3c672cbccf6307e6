"""The goodness-conditioned posterior over responses as a probabilistic program: p(y | x, G = 1)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions
import torch
from jaxtyping import Float
from torch import Tensor

from ..beliefs import RewardBelief, expected
from ..errors import ArgumentError
from .candidates import ScoredCandidates
from .goodness import ExponentialTilt, Goodness

#: The utility that integrates the reward out, as Bayes' rule has it.
MARGINAL = "marginal"


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Entries of `values`, shape `(*batch, n)`, at places of shape `(*more, *batch)`."""
    places = places.expand(torch.broadcast_shapes(places.shape, values.shape[:-1]))
    return values.expand(*places.shape, -1).gather(-1, places[..., None])[..., 0]


class _Responses(pyro.distributions.TorchDistribution):  # type: ignore[misc]
    """A response by its place among the candidates, with the probability that the reference policy gives it."""

    support = pyro.distributions.constraints.nonnegative_integer
    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, log_probs: Tensor) -> None:
        self._log_probs = log_probs
        super().__init__(batch_shape=log_probs.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return _at(self._log_probs, value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        places: Tensor = pyro.distributions.Categorical(logits=self._log_probs).sample(sample_shape)
        return places

    def enumerate_support(self, expand: bool = True) -> Tensor:
        count = self._log_probs.shape[-1]
        places = torch.arange(count, device=self._log_probs.device).reshape(-1, *[1] * len(self.batch_shape))
        return places.expand(count, *self.batch_shape) if expand else places


class _Good(pyro.distributions.TorchDistribution):  # type: ignore[misc]
    """Bernoulli by the logarithm of its probability, which may come near 0 or 1 without loss."""

    support = pyro.distributions.constraints.boolean
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, log_prob_good: Tensor) -> None:
        self._log_good = log_prob_good
        super().__init__(batch_shape=log_prob_good.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        bad = torch.log1p(-self._log_good.exp())
        return torch.where(value.bool(), self._log_good, bad)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.bernoulli(self._log_good.exp().clamp_max(1.0).expand(*sample_shape, *self.batch_shape))


@dataclasses.dataclass(frozen=True)
class GoodnessPosterior:
    """`y ~ p0(. | x)`, `G ~ Bernoulli(goodness(reward))`, conditioned on `G = 1` (Pandey et al., BRAIn, 2402.02479).

    The object is a Pyro program: called with candidates it has the sites `response` (place of the response among
    them), `good` (observed as 1) and, with the marginal utility, `reward` (`draw` for a belief made of draws). `fit`
    turns it and candidates into a `ResponsePosterior`: by `Enumeration` where they are all the responses there are, by
    `ImportanceSampling` where they were drawn. It is also a target of alignment.

    The reward is uncertain, and what stands for it decides whether the posterior seeks or shuns that uncertainty. By
    Bayes' rule it is integrated out (`utility="marginal"`): with the exponential tilt a Gaussian reward then counts as
    `mean + var / (2 temperature)`, which is *optimistic* (Hahami et al., 2606.09073). Pass `selection.RiskAverse`,
    `selection.LowerConfidenceBound` or any other rule to be cautious, `selection.Thompson` for a joint draw.

    Rules that count deviations from the candidates' mean, and the marginal utility, make the target depend on the set
    of candidates: with few of them a policy comes near to the exact target and not to it.

    Attributes:
        goodness: p(G = 1) given the reward.
        utility: What stands for the reward: a function of the belief with scores of shape `(B, n)`, or `"marginal"`.

    Raises:
        ArgumentError: `utility` is neither.

    Example:
        >>> import bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> candidates = ScoredCandidates(belief, reference=torch.tensor([[0.5, 0.5]]).log())
        >>> brm.fit(GoodnessPosterior(), candidates, inference=brm.Enumeration()).weights
        tensor([[0.7311, 0.2689]])
    """

    goodness: Goodness = dataclasses.field(default_factory=ExponentialTilt)
    utility: Callable[[RewardBelief], Tensor] | str = expected

    #: Type of data the program explains; `fit` checks it.
    data_type = ScoredCandidates

    def __post_init__(self) -> None:
        if isinstance(self.utility, type) or not (callable(self.utility) or self.utility == MARGINAL):
            raise ArgumentError(
                f"`utility` is {self.utility!r}; it is a rule such as selection.RiskAverse(b=1.0), or {MARGINAL!r}"
            )
        if isinstance(self.goodness, type) or not callable(getattr(self.goodness, "marginal_log_prob", None)):
            raise ArgumentError(f"`goodness` is {self.goodness!r}; it is a link such as ExponentialTilt()")

    def utilities(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """What stands for the candidates' rewards, shape `(B, n)`; their means with the marginal utility."""
        belief = candidates.belief
        scores = belief.mean if isinstance(self.utility, str) else self.utility(belief)
        if scores.shape != belief.mean.shape or not bool(torch.isfinite(scores[candidates.mask]).all()):
            raise ArgumentError(
                f"`utility` returned scores of shape {tuple(scores.shape)}; it returns a finite number for each of "
                f"the candidates, shape {tuple(belief.mean.shape)}"
            )
        return torch.where(candidates.mask, scores, 0.0)

    def log_goodness(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log p(G = 1 | x, y) of every candidate, with an uncertain reward integrated out where that is asked for."""
        utility = self.utilities(candidates)
        offset = self._offset(candidates, utility)
        if isinstance(self.utility, str):
            return self.goodness.marginal_log_prob(candidates.belief.differences(), offset)
        return self.goodness.log_prob(utility, offset.expand_as(utility))

    def log_density(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log p(y, G = 1 | x), minus infinity outside the mask."""
        joint = candidates.reference + self.log_goodness(candidates)
        return joint.masked_fill(~candidates.mask, -math.inf)

    def _offset(self, candidates: ScoredCandidates, utility: Tensor) -> Tensor:
        # Where the reward itself is a latent variable, it is that of the deviations: a prompt's offset is unidentified.
        values = candidates.belief.differences().mean if isinstance(self.utility, str) else utility
        return self.goodness.offset(values, candidates.log_weights_of(candidates.reference))

    def __call__(self, candidates: ScoredCandidates) -> Tensor:
        """Runs the program; returns the places of the responses, shape `(B,)`."""
        utility = self.utilities(candidates)
        offset = self._offset(candidates, utility)
        reference = candidates.reference.masked_fill(~candidates.mask, -math.inf)
        with pyro.plate("prompts", len(utility)):
            response: Tensor = pyro.sample("response", _Responses(reference))
            reward = _at(utility, response)
            if isinstance(self.utility, str):
                reward = self._sample_reward(candidates.belief.differences(), response)
            good = _Good(self.goodness.log_prob(reward, offset[:, 0].expand_as(reward)))
            pyro.sample("good", good, obs=torch.ones_like(reward))
        return response

    def _sample_reward(self, belief: RewardBelief, response: Tensor) -> Tensor:
        if belief.draws is None:
            # A reward that is known, as that of a prompt's only candidate, still needs a scale.
            scale = _at(belief.std, response).clamp_min(1e-12)
            marginal = pyro.distributions.Normal(_at(belief.mean, response), scale)
            reward: Tensor = pyro.sample("reward", marginal)
            return reward
        draws = belief.draws.permute(1, 2, 0)
        uniform = torch.zeros_like(draws[:, 0])
        draw = pyro.sample("draw", pyro.distributions.Categorical(logits=uniform))
        at_response = torch.stack([_at(draws[..., s], response) for s in range(draws.shape[2])], -1)
        return _at(at_response, draw)

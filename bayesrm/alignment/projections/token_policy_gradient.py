"""Policy gradient with a reward for each token: rewards-to-go with a baseline (Williams 1992; Sutton et al. 2000)."""

import dataclasses
import enum
import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ...token_beliefs import TokenBelief
from ._projection import importance_ratio, mean_over


@dataclasses.dataclass(frozen=True, eq=False)
class RewardedTokens:
    """The tokens of candidates with their rewards.

    Attributes:
        log_probs: log q(token | prefix) under the policy, shape `(B, n, T)`, with gradients.
        reference: The same under the reference policy, without gradients.
        rewards: Rewards of the tokens, shape `(B, n, T)`.
        mask: True at the tokens of a response, the first ones of its row, shape `(B, n, T)`.

    Raises:
        ArgumentError: Shapes disagree, or what is fixed requires gradients.
    """

    log_probs: Float[Tensor, "prompts candidates tokens"]
    reference: Float[Tensor, "prompts candidates tokens"]
    rewards: Float[Tensor, "prompts candidates tokens"]
    mask: Bool[Tensor, "prompts candidates tokens"]

    def __post_init__(self) -> None:
        for name in ("log_probs", "reference", "rewards"):
            value = getattr(self, name)
            if value.shape != self.mask.shape:
                raise ArgumentError(f"`{name}` has shape {tuple(value.shape)}; `mask` has {tuple(self.mask.shape)}")
            if name != "log_probs" and value.requires_grad:
                raise ArgumentError(f"`{name}` requires gradients; it is fixed")
        if bool((self.mask[..., 1:] & ~self.mask[..., :-1]).any()):
            raise ArgumentError("`mask` has gaps; the tokens of a response are the first ones of its row")


class Baseline(enum.StrEnum):
    """What is taken off a token's return, from the other candidates of the same prompt."""

    POSITION = "position"
    """The mean of their returns from the same position on, which is 0 for those that have ended."""
    SEQUENCE = "sequence"
    """The mean of their returns from the first token on."""
    NONE = "none"
    """Nothing."""


@dataclasses.dataclass(frozen=True)
class TokenPolicyGradient:
    """`- 1/n sum_i w_i sum_t (G_it - b_it) log q(y_it | y_i<t)`, with the returns and baselines fixed.

    The return of a token is what comes from it on, `G_t = sum_{l >= t} discount^(l - t) (r_l - temperature
    log(q(y_l) / p0(y_l)))`: what was earned before the token does not add to the noise of its gradient, as it does
    where a response has one reward. That noise is less in most problems, not in all: where the length of a response
    decides, others at the same position are a poor baseline.

    Dense rewards for language models: fine-grained feedback (Wu et al., 2306.01693), RTO (Zhong et al., 2404.18922);
    those use PPO, while this is plain REINFORCE with leave-one-out baselines (Ahmadian et al., 2402.14740).

    With a discount of 1 the expected gradient is that of `E_q[sum_t r_t] - temperature KL(q || p0)`, whose optimum is
    the exponential tilt of p0 by the sum of rewards over the temperature. With less it is shortsighted, and the
    gradient of no objective. Nothing is normalised: the loss is a mean over candidates of sums over tokens, in units of
    reward, so that a response of more tokens counts for more.

    The candidates should come from the policy. Where it has moved since they were drawn, the weight of a whole
    response w = q / p' keeps the gradient unbiased; `clip` bounds it, at the price of a bias.

    Uncertain rewards count as `mean - k std` of each token. The stds add up over a response, also where they are of one
    and the same doubt, so that long responses pay more.

    Attributes:
        temperature: KL coefficient, in units of reward for a nat; 0 for none.
        discount: What the reward of the next token is worth now, above 0, up to 1.
        baseline: A `Baseline`.
        k: Standard deviations that are taken off each token's reward.
        clip: Largest importance weight.

    Raises:
        ArgumentError: A setting is out of range; or, when called, a prompt has a single draw, which leaves no baseline.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_q = torch.tensor([[[-1.0, -1.0], [-2.0, -1.0]]], requires_grad=True)
        >>> fixed, sums = log_q.detach(), log_q.detach().sum(2)
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=sums, proposal=sums)
        >>> rewards = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> tokens = RewardedTokens(log_q, fixed, rewards, torch.ones(1, 2, 2, dtype=torch.bool))
        >>> TokenPolicyGradient(temperature=0.1)(tokens, brm.fit(brm.GoodnessPosterior(), drawn)).sum().backward()
        >>> log_q.grad
        tensor([[[-0.5000, -0.5000],
                 [ 0.5000,  0.5000]]])
    """

    #: Rounds of `align` predict the rewards of tokens.
    needs_token_rewards: ClassVar[bool] = True

    temperature: float = 1.0
    discount: float = 1.0
    baseline: str = Baseline.POSITION.value
    k: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "k"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"`{name}` is {getattr(self, name)}; it is a finite number of at least 0")
        if not 0.0 < self.discount <= 1.0:
            raise ArgumentError(f"`discount` is {self.discount}; it lies above 0, up to 1")
        known = [str(member.value) for member in Baseline]
        if self.baseline not in known:
            raise ArgumentError(f"`baseline` is {self.baseline!r}; it is one of {known}")
        if self.clip is not None and not 1.0 <= self.clip < math.inf:
            raise ArgumentError(f"`clip` is {self.clip}; the largest importance weight is at least 1")

    def rewards(self, belief: TokenBelief) -> Float[Tensor, "responses tokens"]:
        """What stands for the uncertain rewards of tokens, shape `(N, T)`."""
        return belief.mean - self.k * belief.total_std if self.k else belief.mean

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """A baseline needs another candidate."""
        return (1 if self.baseline == Baseline.NONE.value else 2), None

    def __call__(self, tokens: RewardedTokens, posterior: ResponsePosterior) -> Float[Tensor, "prompts"]:
        """Loss of each prompt.

        Args:
            tokens: Those of the posterior's candidates.
            posterior: A target on them; its proposal's log-probabilities alone count.
        """
        candidates = posterior.candidates
        if tokens.mask.shape[:2] != candidates.mask.shape:
            raise ArgumentError(
                f"`tokens` are of {tuple(tokens.mask.shape[:2])} candidates; the posterior has "
                f"{tuple(candidates.mask.shape)}"
            )
        mask = tokens.mask & candidates.mask[..., None]
        log_q = torch.where(mask, tokens.log_probs, 0.0)
        log_ratio = log_q.detach() - torch.where(mask, tokens.reference, 0.0)
        rewards = torch.where(mask, tokens.rewards, 0.0).to(log_q) - self.temperature * log_ratio
        if not bool(torch.isfinite(rewards).all()):
            raise ArgumentError("`tokens` have rewards or log-probabilities that are not finite")
        returns = rewards @ _discounts(rewards.shape[-1], self.discount).to(rewards)
        ratio = importance_ratio(log_q.sum(-1), posterior)
        if self.clip is not None:
            ratio = ratio.clamp_max(self.clip)
        advantages = returns - self._baseline(returns, ratio, posterior)
        return -mean_over(ratio * (advantages * log_q).sum(-1), candidates.mask)

    def _baseline(self, returns: Tensor, ratio: Tensor, posterior: ResponsePosterior) -> Tensor:
        if self.baseline == Baseline.NONE.value:
            return torch.zeros_like(returns)
        mask = posterior.candidates.mask
        by_position = returns if self.baseline == Baseline.POSITION.value else returns[..., :1]
        counts = mask.sum(1)[:, None, None]
        if posterior.candidates.exhaustive:
            return (ratio[..., None] * by_position).sum(1, keepdim=True) / counts
        if bool((counts < 2).any()):
            raise ArgumentError("a leave-one-out baseline needs at least 2 candidates of every prompt")
        return (by_position.sum(1, keepdim=True) - by_position) / (counts - 1)


def _discounts(count: int, discount: float) -> Tensor:
    """`discount^(l - t)` for l at or after t, else 0; shape `(l, t)`."""
    steps = torch.arange(count, dtype=torch.float64)
    ahead = steps[:, None] - steps
    return torch.where(ahead >= 0, discount ** ahead.clamp_min(0.0), 0.0)

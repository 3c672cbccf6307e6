"""Path consistency of soft Q-learning over tokens (Guo et al., 2106.07704; Nachum et al., 1702.08892)."""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPaths:
    """A policy's token-level quantities along the candidates, Q-values being its logits.

    Attributes:
        log_probs: log q(token | prefix), the advantage Q - V, shape `(B, n, T)`, with gradients.
        target_values: V = logsumexp of the target network's logits at each prefix, shape `(B, n, T)`, without.
        mask: True at the tokens of a response, the first ones of its row, shape `(B, n, T)`.
        values: V of the policy's own logits, with gradients, shape `(B, n, T)`; for the terms with reversed roles.
        target_log_probs: The target network's log-probabilities, without gradients; for the same.

    Raises:
        ArgumentError: Shapes disagree, or what is the target's requires gradients.
    """

    log_probs: Float[Tensor, "prompts candidates tokens"]
    target_values: Float[Tensor, "prompts candidates tokens"]
    mask: Bool[Tensor, "prompts candidates tokens"]
    values: Float[Tensor, "prompts candidates tokens"] | None = None
    target_log_probs: Float[Tensor, "prompts candidates tokens"] | None = None

    def __post_init__(self) -> None:
        for name in ("values", "target_log_probs"):
            value = getattr(self, name)
            if value is not None and value.shape != self.mask.shape:
                raise ArgumentError(f"`{name}` has shape {tuple(value.shape)}; `mask` has {tuple(self.mask.shape)}")
        if self.target_log_probs is not None and self.target_log_probs.requires_grad:
            raise ArgumentError("`target_log_probs` requires gradients; the target network is fixed")
        if not self.log_probs.shape == self.target_values.shape == self.mask.shape:
            raise ArgumentError(
                f"`log_probs`, `target_values` and `mask` have shapes {tuple(self.log_probs.shape)}, "
                f"{tuple(self.target_values.shape)} and {tuple(self.mask.shape)}; they must agree"
            )
        if self.target_values.requires_grad:
            raise ArgumentError("`target_values` requires gradients; the target network is fixed")
        if bool((self.mask[..., 1:] & ~self.mask[..., :-1]).any()):
            raise ArgumentError("`mask` has gaps; the tokens of a response are the first ones of its row")


@dataclasses.dataclass(frozen=True)
class PathConsistency:
    """Squared inconsistency of advantages, values and the reward, single-step and multi-step.

    With A_t = log q(y_t | y_<t) and V' the target network's values, along a response with reward r at its end:
    single-step `(A_t - (V'_{t+1} - V'_t))^2`, where V' after the last token is r; multi-step
    `(sum_{l >= t} A_l - (r - V'_t))^2`. Both are zero for the soft-optimal policy, `q(y)` proportional to `exp(r(y))`
    over all responses, on and off the policy, whose logits are the Q-values themselves. The advantages do not change
    with the level of a prefix's logits, and so these terms never teach a value; `reversed_roles` adds them with the
    target network's advantages and the policy's values, which does. The reward is the target's `log_density`, so that
    the optimum is the target; or its tilt alone, as in the paper, where no reference policy enters.

    Attributes:
        single_step: Weight of the mean over tokens of the single-step term.
        multi_step: Weight of the mean over tokens of the multi-step term.
        reference: Count the reference's log-probability into the reward, so that the optimum is the target.
        reversed_roles: Share of the terms in which policy and target network swap roles. The released code has it as 0;
            a table of logits then does not reach the optimum, as its values stay as they began.

    Raises:
        ArgumentError: A weight is negative, or both are 0, or the share is not one; or, when called, the paths lack
            what the reversed roles need.

    Example:
        >>> PathConsistency().multi_step
        0.5
    """

    single_step: float = 0.5
    multi_step: float = 0.5
    reference: bool = True
    reversed_roles: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.reversed_roles <= 1.0:
            raise ArgumentError(f"`reversed_roles` is {self.reversed_roles}; the share lies between 0 and 1")
        if not (self.single_step >= 0.0 and self.multi_step >= 0.0 and self.single_step + self.multi_step > 0.0):
            raise ArgumentError(
                f"`single_step` and `multi_step` are {self.single_step} and {self.multi_step}; they are at least 0, "
                "and one of them is positive"
            )

    def __call__(self, paths: TokenPaths, posterior: ResponsePosterior) -> Float[Tensor, "prompts"]:
        """Loss of each prompt, shape `(B,)`.

        Args:
            paths: Along the candidates of the posterior.
            posterior: The target, whose log density is finite.
        """
        candidates = posterior.candidates
        rewards = posterior.log_density - (0.0 if self.reference else candidates.reference)
        rewards = torch.where(candidates.mask, rewards, 0.0)
        if not bool(torch.isfinite(rewards).all()):
            raise ArgumentError("the target gives a candidate density zero; its reward would be minus infinity")
        by_candidate = (1.0 - self.reversed_roles) * self._inconsistency(
            paths.log_probs, paths.target_values, paths.mask, rewards
        )
        if self.reversed_roles:
            if paths.values is None or paths.target_log_probs is None:
                raise ArgumentError(
                    "`reversed_roles` needs `values` and `target_log_probs` of the paths; give them, or set it to 0"
                )
            by_candidate = by_candidate + self.reversed_roles * self._inconsistency(
                paths.target_log_probs, paths.values, paths.mask, rewards
            )
        return torch.where(candidates.mask, by_candidate, 0.0).sum(1) / candidates.mask.sum(1)

    def _inconsistency(self, log_probs: Tensor, values: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
        """Of each candidate, shape `(B, n)`."""
        advantages = torch.where(mask, log_probs, 0.0)
        values = torch.where(mask, values, 0.0)
        last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
        following = torch.where(last, rewards[..., None], torch.nn.functional.pad(values[..., 1:], (0, 1)))
        single = torch.where(mask, advantages - (following - values), 0.0).square()
        to_go = advantages.flip(-1).cumsum(-1).flip(-1)
        multi = torch.where(mask, to_go - (rewards[..., None] - values), 0.0).square()
        each = self.single_step * single + self.multi_step * multi
        return each.sum(-1) / mask.sum(-1).clamp_min(1)

"""What a round of alignment looked like, and when to stop."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.psis import MIN_DRAWS, pareto_smooth
from ..engines.response_posterior import ResponsePosterior
from ..errors import ArgumentError
from ._round import Round


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """The candidates of a round, averaged over its prompts; lengths, ends and pairs of tokens over all responses.

    Where the candidates were not drawn from the policy, what is said of the policy is estimated by self-normalised
    importance weights.

    Attributes:
        round: Number of the round, from 0.
        step: Steps of the optimiser before it.
        reward: Mean believed reward of the policy's responses.
        reward_std: Standard deviation of a response's reward as believed, as deviation from its prompt's candidates.
        kl_to_reference: KL(policy || reference) in nats, by the mean log-ratio of the policy's responses.
        target_kl: KL(target || reference) in nats, estimated.
        target_ess: Effective sample size of the target's weights, of a prompt's candidates.
        policy_ess: Effective sample size of the policy's weights.
        k_hat: Shape of the tail of the target's weights of all prompts together; not a number below 25 draws.
        length: Mean tokens of a response.
        ended: Share of the responses that ended by themselves.
        distinct_2: Distinct pairs of consecutive tokens, over all pairs.
        samples: The first response to each of the first three prompts.
    """

    round: int
    step: int
    reward: float
    reward_std: float
    kl_to_reference: float
    target_kl: float
    target_ess: float
    policy_ess: float
    k_hat: float
    length: float
    ended: float
    distinct_2: float
    samples: tuple[str, ...]

    @classmethod
    def of(cls, found: Round, posterior: ResponsePosterior, *, number: int, step: int) -> "RoundReport":
        """What is to be said of a round."""
        candidates = found.candidates
        mask = candidates.mask
        weights = _policy_weights(found)
        deviations = candidates.belief.differences().std
        ratio = torch.where(mask, found.policy - candidates.reference, 0.0)
        return cls(
            round=number,
            step=step,
            reward=float((weights * candidates.belief.mean).sum(1).mean()),
            reward_std=float((weights * deviations).sum(1).mean()),
            kl_to_reference=float((weights * ratio).sum(1).mean()),
            target_kl=float(posterior.kl_to_reference().mean()),
            target_ess=float(posterior.ess.mean()),
            policy_ess=float((1.0 / weights.square().sum(1)).mean()),
            k_hat=_pooled_k_hat(posterior),
            length=float(found.sequences.lengths.mean()),
            ended=float(sum(found.sequences.ended) / len(found.sequences)),
            distinct_2=distinct(found.sequences.responses, 2),
            samples=tuple(texts[0] for texts in found.texts[:3]),
        )

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> "RoundReport":
        """The report of which `summary` made these values."""
        return cls(**{**summary, "samples": tuple(summary["samples"])})

    def summary(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a run has gone far enough from what is known: it stops before the round that exceeds a limit is learnt from.

    Attributes:
        max_kl: Largest KL(policy || reference), in nats.
        max_reward_std: Largest standard deviation of the policy's rewards as believed, see `RoundReport.reward_std`.

    Raises:
        ArgumentError: A limit is not positive.

    Example:
        >>> Budget(max_kl=10.0).max_kl
        10.0
    """

    max_kl: float | None = None
    max_reward_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_kl", "max_reward_std"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ArgumentError(f"`{name}` is {value}; a limit is a positive number")

    def exceeded(self, report: RoundReport) -> str | None:
        """What has exceeded its limit, in words; `None` where nothing has."""
        for name, limit, value in (
            ("KL(policy || reference)", self.max_kl, report.kl_to_reference),
            ("the standard deviation of the reward", self.max_reward_std, report.reward_std),
        ):
            if limit is not None and value > limit:
                return f"{name} is {value:.3g}, above {limit:g}"
        return None


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of tokens over all of them (Li et al., 1510.03055); 0 where there is none.

    Example:
        >>> distinct([(1, 2, 1, 2)], 2)
        0.6666666666666666
    """
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _policy_weights(found: Round) -> Tensor:
    """Importance weights of the candidates as draws of the policy, `(B, n)`; of its own draws alone where there are."""
    candidates = found.candidates
    own = torch.tensor([source == "policy" for source in candidates.sources or ()])
    kept = candidates.mask & own if bool(own.any()) else candidates.mask
    # Equal but for rounding where a candidate was drawn from this policy as it is, at temperature 1.
    return torch.softmax((found.policy - candidates.log_proposal).masked_fill(~kept, -math.inf), 1)


def _pooled_k_hat(posterior: ResponsePosterior) -> float:
    mask = posterior.candidates.mask
    counts = mask.sum(1, keepdim=True).to(posterior.log_weights)
    pooled = (posterior.log_weights + counts.log())[mask]
    pooled = pooled[pooled > -math.inf]
    return pareto_smooth(pooled).k_hat if len(pooled) >= MIN_DRAWS else math.nan

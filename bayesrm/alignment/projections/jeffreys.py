"""Jeffreys divergence to the best-of-n distribution, once and with a moving anchor (Sessa et al., 2407.14622)."""

import dataclasses
import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._projection import inside
from .forward_kl import ForwardKL
from .policy_gradient import PolicyGradient


@dataclasses.dataclass(frozen=True)
class Jeffreys:
    """`(1 - weight) KL(target || policy) + weight KL(policy || target)`: BOND's projection, weight 1/2.

    Forward by self-normalised importance sampling over the candidates (on draws of the reference a best-of-n target
    puts its weight on the best ones), backward by `PolicyGradient`.

    Attributes:
        weight: Share of the backward divergence.
        clip: See `PolicyGradient`.

    Raises:
        ArgumentError: `weight` is not between 0 and 1.

    Example:
        >>> Jeffreys().weight
        0.5
    """

    weight: float = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """The baseline of the backward divergence needs another candidate."""
        return 2, None

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        forward = ForwardKL()(log_probs, posterior)
        backward = PolicyGradient(clip=self.clip)(log_probs, posterior)
        return (1.0 - self.weight) * forward + self.weight * backward


@dataclasses.dataclass(frozen=True)
class MovingAnchorJeffreys:
    """J-BOND: of three candidates, one drawn from the policy and two from a moving anchor (2407.14622, section 5).

    Forward: likelihood of the better draw of the anchor, the best of 2. Backward: policy gradient of the policy's own
    draw with reward `-penalty` where it is worse than both draws of the anchor, and 0 else, less the log-ratio to the
    anchor. `penalty = log 16` makes the reward right for a draw at the anchor's median; the baseline is the mean of the
    batch's other prompts (a prompt alone has none, and noisier gradients). `regularisation` adds that multiple of
    KL(policy || anchor).

    The candidates' `sources` must be `("policy", "anchor", "anchor")`. Rewards are those of the target, that is
    `log_density - reference`.

    Attributes:
        weight: Share of the backward divergence.
        penalty: In nats.
        regularisation: The paper's gamma.

    Raises:
        ArgumentError: A setting is out of range; or, when called, the candidates have other sources or no anchor.

    Example:
        >>> round(MovingAnchorJeffreys().penalty, 3)
        2.773
    """

    #: Whose fresh draws each prompt has.
    draws: ClassVar[tuple[str, ...]] = ("policy", "anchor", "anchor")

    weight: float = 0.5
    penalty: float = math.log(16.0)
    regularisation: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        for name in ("penalty", "regularisation"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"`{name}` is {getattr(self, name)}; it is a finite number of at least 0")

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        candidates = posterior.candidates
        if candidates.sources != self.draws or not bool(candidates.mask.all()):
            raise ArgumentError(
                f"`sources` is {candidates.sources}; J-BOND takes one draw of the policy and two of the anchor for "
                "each prompt, ('policy', 'anchor', 'anchor')"
            )
        log_q = inside(log_probs, posterior)
        rewards = posterior.log_density - candidates.reference
        better = 1 + rewards[:, 1:].argmax(1)
        forward = -log_q.gather(1, better[:, None])[:, 0]
        own = log_q[:, 0]
        log_ratio = own.detach() - candidates.previous[:, 0]
        returns = -self.penalty * (rewards[:, 0] < rewards[:, 1:].amin(1)).to(log_ratio) - log_ratio
        backward = -(returns - _others_mean(returns)) * own
        pull = (log_ratio - _others_mean(log_ratio)) * own
        return (1.0 - self.weight) * forward + self.weight * backward + self.regularisation * pull


def _others_mean(values: Tensor) -> Tensor:
    """Mean over the other prompts of the batch; 0 where there is no other."""
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values.sum() - values) / (len(values) - 1)


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ArgumentError(f"`weight` is {weight}; the share of the backward divergence lies between 0 and 1")

"""What a projection is, and what its formulas share."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError


@runtime_checkable
class Projection(Protocol):
    """A loss that moves a policy towards a target.

    It may have an attribute `candidates_taken`, the least and the most (or `None`) candidates of a prompt that it can
    learn from; any number otherwise. One that learns from fresh draws alone names what draws them in `draws`.
    """

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt.

        Args:
            log_probs: log q(y | x) of the candidates under the policy, shape `(B, n)`, with gradients.
            posterior: The target on the same candidates.
        """
        ...


def inside(log_probs: Tensor, posterior: ResponsePosterior) -> Tensor:
    """The policy's log-probabilities with zeros outside the mask.

    Raises:
        ArgumentError: The shape is another than that of the candidates.
    """
    if log_probs.shape != posterior.log_weights.shape:
        raise ArgumentError(
            f"`log_probs` has shape {tuple(log_probs.shape)}; the posterior's candidates have "
            f"{tuple(posterior.log_weights.shape)}"
        )
    return torch.where(posterior.candidates.mask, log_probs, 0.0)


def log_policy_weights(log_probs: Tensor, posterior: ResponsePosterior) -> Tensor:
    """Logarithms of the policy's self-normalised importance weights, shape `(B, n)`; minus infinity outside the mask.

    Their gradient flows to the policy alone: the proposal is fixed, also where it was the policy itself.
    """
    candidates = posterior.candidates
    ratio = inside(log_probs, posterior) - torch.where(candidates.mask, candidates.log_proposal, 0.0)
    return torch.log_softmax(ratio.masked_fill(~candidates.mask, -math.inf), 1)


def mean_over(values: Tensor, mask: Bool[Tensor, "prompts candidates"]) -> Tensor:
    """Mean over each prompt's candidates, shape `(B,)`."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """`sum_i w_i v_i` over candidates, where a weight of 0 silences its value, shape `(B,)`."""
    return torch.where(weights == 0, 0.0, weights * values).sum(1)


def importance_ratio(log_probs: Tensor, posterior: ResponsePosterior) -> Tensor:
    """`q(y_i) / p'(y_i)` without gradients, 0 outside the mask.

    Its mean over candidates times a function is the function's expectation under the policy; exactly so where the
    candidates are exhaustive.
    """
    candidates = posterior.candidates
    log_ratio = log_probs.detach() - torch.where(candidates.mask, candidates.log_proposal, 0.0)
    return torch.where(candidates.mask, log_ratio.exp(), 0.0)

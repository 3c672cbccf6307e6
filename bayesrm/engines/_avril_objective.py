"""The terms of AVRIL's objective, one number for each step of a trajectory."""

import dataclasses
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StepTerms:
    """What the objective adds up, of any one shape.

    Attributes:
        kl: KL(q(R_t) || p(R_t)), in nats.
        constraint: log q(R_t = temporal difference), in nats; 0 where the next value is
            not known.
    """

    kl: Float[Tensor, "*steps"]
    constraint: Float[Tensor, "*steps"]


def temporal_difference(
    values: Float[Tensor, "*steps"], next_values: Float[Tensor, "*steps"], last: Bool[Tensor, "*steps"], discount: float
) -> Float[Tensor, "*steps"]:
    """Q(s_t, a_t) - discount * V(s_{t+1}), and Q(s_T, a_T) alone at the end of a trajectory: the reward implied by Q.

    Args:
        values: Q(s_t, a_t).
        next_values: Value of the next state; its entries at last steps do not count.
        last: Whether nothing comes after a step.
        discount: Between 0 and 1.
    """
    return values - discount * torch.where(last, 0.0, next_values)


def step_terms(
    mean: Float[Tensor, "*steps"],
    log_std: Float[Tensor, "*steps"],
    difference: Float[Tensor, "*steps"],
    known: Bool[Tensor, "*steps"],
    prior_precision: float,
) -> StepTerms:
    """KL divergence and constraint of each step (Chan and van der Schaar, 2102.06483, equation 7).

    Args:
        mean: Mean of q(R_t).
        log_std: Logarithm of its standard deviation.
        difference: What `temporal_difference` returned.
        known: Whether it is known: not at the last step of a trajectory that was cut.
        prior_precision: Precision of p(R_t), a normal distribution around 0.
    """
    variance = (2.0 * log_std).exp()
    kl = 0.5 * (prior_precision * (variance + mean.square()) - 1.0 - math.log(prior_precision)) - log_std
    away = (torch.where(known, difference, mean) - mean) * (-log_std).exp()
    density = -0.5 * away.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    return StepTerms(kl, torch.where(known, density, 0.0))

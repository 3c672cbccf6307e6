"""A choice between two responses, with ties.

Ties are likelier the closer the rewards, and how likely is learnt: P(tie) is proportional to nu exp((r_0 + r_1) / 2).
Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments", JASA 1970.
"""

import math
from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    log_tie_weight_mean: float = math.log(0.5),
    log_tie_weight_scale: float = 1.0,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        log_tie_weight_mean: Prior mean of log nu; equal responses tie with probability nu / (2 + nu).
        log_tie_weight_scale: Prior standard deviation of log nu.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.Davidson(log_tie_weight_mean, log_tie_weight_scale),
        prior=brm.priors.Gaussian(precision=precision),
    )

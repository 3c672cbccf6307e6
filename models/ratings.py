"""Ratings on ordered levels.

P(rating <= l) = sigmoid(c_l - r) with cut-points c_l that are learnt, so that levels need not be equally far apart.
McCullagh, "Regression models for ordinal data", JRSS B 1980.
"""

import math
from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    first_mean: float = -2.0,
    first_scale: float = 2.0,
    log_gap_mean: float = math.log(1.5),
    log_gap_scale: float = 0.5,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        first_mean: Prior mean of the lowest cut-point, in units of reward.
        first_scale: Its prior standard deviation.
        log_gap_mean: Prior mean of the log gap between neighbouring cut-points.
        log_gap_scale: Its prior standard deviation.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.Ordinal(first_mean, first_scale, log_gap_mean, log_gap_scale),
        prior=brm.priors.Gaussian(precision=precision),
    )

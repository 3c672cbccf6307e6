"""A choice between two responses, with ties where the difference is too small to notice.

P(first) = sigmoid(r_0 - r_1 - eta) with a threshold eta that is learnt. Rao and Kupper, "Ties in paired-comparison
experiments: a generalization of the Bradley-Terry model", JASA 1967.
"""

import math
from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    log_threshold_mean: float = math.log(0.5),
    log_threshold_scale: float = 1.0,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        log_threshold_mean: Prior mean of log eta; equal responses tie with probability tanh(eta / 2).
        log_threshold_scale: Prior standard deviation of log eta.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.RaoKupper(log_threshold_mean, log_threshold_scale),
        prior=brm.priors.Gaussian(precision=precision),
    )

"""Single responses marked good or not: thumbs up or down.

P(approved) = sigmoid(r - offset) with an offset that is learnt, as in logistic regression with a free intercept. Cox,
"The regression analysis of binary sequences", JRSS B 1958. Unpaired feedback of this kind is what KTO trains on
(Ethayarajh et al., 2402.01306).
"""

from typing import Any

import bayesrm as brm


def build(
    *, precision: float = 1.0, offset_mean: float = 0.0, offset_scale: float = 2.0, **head: Any
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        offset_mean: Prior mean of the reward at which half of the responses are approved.
        offset_scale: Its prior standard deviation.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.Approval(offset_mean, offset_scale),
        prior=brm.priors.Gaussian(precision=precision),
    )

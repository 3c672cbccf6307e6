"""A choice between two responses, with normal instead of logistic noise.

P(first preferred) = Phi((r_0 - r_1) / (sqrt(2) noise)). Thurstone, "A law of comparative judgment", Psychological
Review 1927; case V as in Mosteller, Psychometrika 1951.
"""

from typing import Any

import bayesrm as brm


def build(*, precision: float = 1.0, noise: float = 1.0, **head: Any) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        noise: Standard deviation of the noise on each response's reward, in units of reward.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.Thurstone(noise=noise),
        prior=brm.priors.Gaussian(precision=precision),
    )

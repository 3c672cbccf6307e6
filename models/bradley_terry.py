"""A choice between two responses, without ties.

The standard reward model: P(first preferred) = sigmoid(r_0 - r_1). Bradley and Terry, "Rank analysis of incomplete
block designs: I. The method of paired comparisons", Biometrika 1952.
"""

from typing import Any

import bayesrm as brm


def build(*, precision: float = 1.0, temperature: float = 1.0, **head: Any) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        temperature: Scale of the noise of a choice, in units of reward.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.BradleyTerry(temperature=temperature),
        prior=brm.priors.Gaussian(precision=precision),
    )

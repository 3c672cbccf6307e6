"""A choice between two responses by judges who favour length beyond its worth.

Bradley-Terry at rewards r_i + b words_i / unit: b is learnt and kept out of the reward, as in the length-controlled
AlpacaEval (Dubois et al., 2404.04475). Leave `length` out of `inputs`, or the reward can take the bias over.
"""

from typing import Any

import bayesrm as brm


def build(
    *, precision: float = 1.0, unit: float = 100.0, scale: float = 1.0, ties: bool = False, **head: Any
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        unit: Words that make one unit of length.
        scale: Prior standard deviation of b, in units of reward per `unit` words.
        ties: Whether the data hold ties (Davidson's model instead of Bradley and Terry's).
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    base = brm.likelihoods.Davidson() if ties else brm.likelihoods.BradleyTerry()
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.LengthBias(base, unit, scale),
        prior=brm.priors.Gaussian(precision=precision),
    )

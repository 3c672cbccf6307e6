"""A choice between two responses, some of which were recorded the wrong way round.

P(y) = (1 - eps) P_BT(y) + eps P_BT(other y), with eps known or learnt: Bradley-Terry with the flipped labels of robust
preference learning (Chowdhury, Kini and Natarajan, "Provably robust DPO", 2403.00409). `ties` allows ties, which no
flip changes.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    flip_rate: float | None = None,
    prior_flips: float = 2.0,
    prior_kept: float = 10.0,
    ties: bool = False,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        flip_rate: Share eps of flipped answers, below one half; None learns it.
        prior_flips: First parameter of the prior 2 eps ~ Beta(prior_flips, prior_kept).
        prior_kept: Second parameter.
        ties: Whether the data hold ties (Davidson's model instead of Bradley and Terry's).
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    base = brm.likelihoods.Davidson() if ties else brm.likelihoods.BradleyTerry()
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.LabelNoise(base, flip_rate, prior_flips, prior_kept),
        prior=brm.priors.Gaussian(precision=precision),
    )

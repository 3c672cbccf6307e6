"""Rankings, full or partial, and choices among any number of responses.

Responses are picked one after another, each with probability softmax of the rewards left. Luce, "Individual Choice
Behavior", 1959; Plackett, "The analysis of permutations", Applied Statistics 1975.
"""

from typing import Any

import bayesrm as brm


def build(*, precision: float = 1.0, temperature: float = 1.0, **head: Any) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        temperature: Scale of the noise of a pick, in units of reward.
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.PlackettLuce(temperature=temperature),
        prior=brm.priors.Gaussian(precision=precision),
    )

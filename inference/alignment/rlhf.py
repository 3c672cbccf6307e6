"""RLHF by REINFORCE with a leave-one-out baseline (RLOO): the exponential tilt by policy gradient.

Ahmadian et al., 2402.14740: 2 or 4 draws of the policy for each prompt, the KL penalty in the reward of the whole
response. beta = 0.05 is the default of TRL; the paper's depends on the data and was not confirmed. The returns are in
nats, so that the learning rate of an implementation with returns in units of reward is to be multiplied by beta.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 0.05,
    num_candidates: int = 4,
    clip: float | None = None,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        num_candidates: Draws of the policy for each prompt.
        clip: Largest importance weight of draws that the policy has moved away from; none by default.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(beta), make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.PolicyGradient(clip=clip)
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

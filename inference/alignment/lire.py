"""LIRE: the candidates' mean reward under the policy's shares of them.

Zhu et al., ACL Findings 2024: 6 candidates, shares at temperature 2, softmax of the rewards as in the released code.
Nothing refers to a reference policy, and the minimum puts all weight on the best candidate. The paper takes responses
of several models; here they are the proposal's, or a fixed set.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    temperature: float = 2.0,
    reward_temperature: float = 1.0,
    normalise: bool = True,
    proposal: str = "reference",
    num_candidates: int = 6,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        temperature: Of the policy's log-probabilities, in nats.
        reward_temperature: Of the softmax of the rewards, in units of reward.
        normalise: Take the softmax of the rewards, or leave them as they are.
        proposal: What draws the candidates: reference, policy, anchor or mixture.
        num_candidates: Candidates of each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    tilt = brm.programs.ExponentialTilt(reward_temperature)
    target = brm.GoodnessPosterior(tilt, make_utility(utility, utility_strength, num_candidates=num_candidates))
    projection = brm.alignment.projections.LinearListwise(temperature, normalise)
    return brm.alignment.Method(target, projection, proposal=proposal, num_candidates=num_candidates)

"""BOND: the best-of-n distribution by the Jeffreys divergence.

Sessa et al., 2407.14622: n of 4, 8 or 16, equal weights of both divergences, quantiles from 16 draws. The paper draws
from the reference for the forward divergence and the quantiles, and from the policy for the backward one; here one set
of draws serves all, by importance weights. The paper leaves ties out; here they are exact.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_scores


def build(
    *,
    n: int = 8,
    weight: float = 0.5,
    proposal: str = "policy",
    num_candidates: int = 16,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        n: Draws of which the best is imitated.
        weight: Share of the backward divergence.
        proposal: What draws the candidates: reference, policy, anchor or mixture.
        num_candidates: Candidates of each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.alignment.targets.BestOfN(n, make_scores(utility, utility_strength, num_candidates=num_candidates))
    projection = brm.alignment.projections.Jeffreys(weight)
    return brm.alignment.Method(target, projection, proposal=proposal, num_candidates=num_candidates)

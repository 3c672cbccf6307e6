"""J-BOND: the best of two draws of a moving anchor, by the Jeffreys divergence.

Sessa et al., 2407.14622, section 5: one draw of the policy and two of the anchor, equal weights, penalty log 16, an
anchor that moves by 0.02 (of 0.01, 0.05 and 0.1 tried, too). Of the regularisations tried (0, 0.5, 1, 2) we take 1. The
paper moves the anchor at each step; here it moves after each round. Its fixed point moves along: it is no set target.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_scores


def build(
    *,
    weight: float = 0.5,
    regularisation: float = 1.0,
    anchor_rate: float = 0.02,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        weight: Share of the backward divergence.
        regularisation: Factor on KL(policy || anchor), the paper's gamma.
        anchor_rate: How far the anchor moves towards the policy after each round, the paper's eta.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(utility=make_scores(utility, utility_strength))
    projection = brm.alignment.projections.MovingAnchorJeffreys(weight, regularisation=regularisation)
    sources = ("policy", "anchor", "anchor")
    return brm.alignment.Method(target, projection, proposal=sources, num_candidates=3, anchor_rate=anchor_rate)

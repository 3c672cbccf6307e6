"""GDC++: the gradient of the forward KL divergence with the policy's own importance weights as baseline.

Korbak et al., 2206.00761; without the baseline DPG (Parshakova et al., 1912.08517). The target is the exponential tilt,
its constant estimated from the candidates of each prompt. Not confirmed and our choice: beta = 1, 8 candidates.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 1.0,
    baseline: bool = True,
    num_candidates: int = 8,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        baseline: Subtract the policy's importance weights (GDC++).
        num_candidates: Draws of the policy for each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(beta), make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.DistributionalPolicyGradient(baseline=baseline)
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

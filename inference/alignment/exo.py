"""EXO: the reverse KL divergence between shares of the candidates, towards the exponential tilt.

Ji et al., 2402.00856. beta = 0.1 is what TRL's page on the paper has. The paper puts a second exponent on the policy's
log-ratio; here it is 1, so that the minimum is `p0 exp(r / beta)`. Not confirmed: 4 candidates.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 0.1,
    num_candidates: int = 4,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        num_candidates: Candidates of each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(beta), make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.ReverseKL()
    return brm.alignment.Method(target, projection, proposal="reference", num_candidates=num_candidates)

"""BoNBoN: likelihood of the best of n, and its log-ratio to the worst.

Gui et al., 2406.00832: the best and the worst of 8 draws of the reference, alpha = 0.005, margin (n - 1) H_{n-1}, that
is 18.15 nats. The paper's equation; the released code does not run it as shipped.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_scores


def build(
    *,
    n: int = 8,
    alpha: float = 0.005,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        n: Candidates of each prompt, of which the best and the worst count.
        alpha: Weight of the likelihood.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.alignment.targets.BestOfN(n, make_scores(utility, utility_strength, num_candidates=n))
    projection = brm.alignment.projections.BestAndWorst(n, alpha)
    return brm.alignment.Method(target, projection, proposal="reference", num_candidates=n)

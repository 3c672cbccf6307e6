"""Fine-tuning on the best of n draws of the reference: the forward KL divergence to their distribution.

The forward half of BOND (Sessa et al., 2407.14622) alone. Of more than n candidates all count, by the probability that
they are the best of n of them, instead of the very best one alone.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_scores


def build(
    *,
    n: int = 8,
    num_candidates: int = 16,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        n: Draws of which the best is imitated.
        num_candidates: Candidates of each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.alignment.targets.BestOfN(n, make_scores(utility, utility_strength, num_candidates=num_candidates))
    projection = brm.alignment.projections.ForwardKL()
    return brm.alignment.Method(target, projection, proposal="reference", num_candidates=num_candidates)

"""The policy of pessimism at inference time, distilled so that no rejection is needed when it is used.

The chi-squared regularised policy of Huang et al., 2503.21878, which the paper samples by rejection; the
distillation by BRAIn's loss (2402.02479) is ours. It is zero for bad responses, which rules out reverse divergences.
Not confirmed and our choice: strength 1 (the best one depends on the error of the reward) and 32 candidates.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_scores


def build(
    *,
    strength: float = 1.0,
    num_candidates: int = 32,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        strength: Of the regularisation, in units of reward; the paper's beta.
        num_candidates: Candidates of each prompt.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.alignment.targets.ChiSquaredPessimism(
        strength, make_scores(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.ListwiseCrossEntropy()
    return brm.alignment.Method(target, projection, proposal="reference", num_candidates=num_candidates)

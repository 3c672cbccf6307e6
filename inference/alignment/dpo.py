"""DPO on pairs of the reference that the reward labels.

Rafailov et al., 2305.18290: beta = 0.1, the default of TRL, too. The paper's pairs are labelled by people; here by the
reward's Bradley-Terry probabilities, of which the loss is the expectation, so that its minimum is `p0 exp(r / beta)`.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 0.1,
    labels: str = "tilt",
    num_candidates: int = 2,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        labels: tilt (probabilities by the utility), hard (the better one, certainly), or preference (of candidates
            with their own preferences, or averaged over the belief; the utility then plays no part).
        num_candidates: Candidates of each prompt, of which all pairs count.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(1.0), make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.PairwiseLogistic(beta, labels)
    return brm.alignment.Method(target, projection, proposal="reference", num_candidates=num_candidates)

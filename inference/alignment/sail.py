"""SAIL: DPO on the policy's own pairs, with the gradient through their distribution.

Ding et al., 2406.15567: responses of the policy, labelled by the reward, the paper's design DPR. beta = 0.1 is
DPO's. Not confirmed and our choice: the whole score-function term, and no pairs of a data set mixed in.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 0.1,
    score_function: float = 1.0,
    labels: str = "tilt",
    num_candidates: int = 2,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        score_function: Factor on the gradient through the distribution of the pairs; 0 is DPO on the policy's pairs.
        labels: tilt, hard or preference, as for DPO.
        num_candidates: Candidates of each prompt, of which all pairs count.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(1.0), make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.PairwiseLogistic(beta, labels, score_function=score_function)
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

"""BRAIn: the goodness-conditioned posterior, distilled by self-normalised importance sampling.

Pandey et al., 2402.02479 (ICML 2024). Target, weights and gradient are the paper's. Not confirmed and our choice:
beta = 1, 8 candidates (as in the authors' toy), and a proposal that is the policy at the beginning of each round.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 1.0,
    goodness: str = "tilt",
    threshold: float = 0.0,
    proposal: str = "policy",
    num_candidates: int = 8,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        goodness: tilt (being good is rare), or logistic, which stops rewarding far above the threshold.
        threshold: Of logistic, above the reference's mean reward, in units of reward.
        proposal: What draws the candidates: reference, policy, anchor or mixture.
        num_candidates: Candidates of each prompt; more of them make longer steps, too.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    links = {"tilt": brm.programs.ExponentialTilt(beta), "logistic": brm.programs.LogisticGoodness(beta, threshold)}
    if goodness not in links:
        raise brm.errors.ArgumentError(f"`goodness` is {goodness!r}; it is one of {sorted(links)}")
    target = brm.GoodnessPosterior(
        links[goodness], make_utility(utility, utility_strength, num_candidates=num_candidates)
    )
    projection = brm.alignment.projections.ListwiseCrossEntropy()
    return brm.alignment.Method(target, projection, proposal=proposal, num_candidates=num_candidates)

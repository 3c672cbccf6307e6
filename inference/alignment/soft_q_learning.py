"""Soft Q-learning for text: single-step and multi-step path consistency, on and off the policy.

Guo et al., 2106.07704: equal weights of both, half of the responses off the policy, no reference policy, values of a
slowly moving network, no reversed roles. The paper scales rewards to [-10, 10] (here: by beta) and moves that network
by 0.001 at each step; 0.1 after each round is our choice. Without reversed roles the loss teaches no values.
"""

import bayesrm as brm
from bayesrm.alignment.utilities import make_utility


def build(
    *,
    beta: float = 1.0,
    single_step: float = 0.5,
    multi_step: float = 0.5,
    reference: bool = False,
    reversed_roles: float = 0.0,
    num_candidates: int = 8,
    anchor_rate: float = 0.1,
    utility: str = "mean",
    utility_strength: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: Temperature of the soft-optimal policy, in units of reward.
        single_step: Weight of the single-step term.
        multi_step: Weight of the multi-step term.
        reference: Count the reference's log-probability into the reward, which makes beta the KL coefficient.
        reversed_roles: Share of the terms that teach values; with some of it the optimum is the target.
        num_candidates: Candidates of each prompt, half of the policy and half of the reference.
        anchor_rate: How far the network of the values moves towards the policy after each round.
        utility: What stands for an uncertain reward: mean, lower_bound, risk_averse, marginal (optimistic), thompson.
        utility_strength: Of that utility, see `bayesrm.alignment.utilities.UtilityName`.
    """
    target = brm.GoodnessPosterior(
        brm.programs.ExponentialTilt(beta, maximum=0.0),
        make_utility(utility, utility_strength, num_candidates=num_candidates),
    )
    projection = brm.alignment.projections.PathConsistency(single_step, multi_step, reference, reversed_roles)
    off = num_candidates // 2
    sources = ("policy",) * (num_candidates - off) + ("reference",) * off
    return brm.alignment.Method(target, projection, sources, num_candidates, anchor_rate)

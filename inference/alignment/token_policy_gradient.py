"""RLHF with a reward for each token: REINFORCE on rewards-to-go, with a leave-one-out baseline at each position.

The objective is that of `rlhf`, the sum of the rewards less beta KL, and so is its optimum; rewards of tokens, with
their uncertainty, come from a posterior that predicts them, such as that of InverseRL (AVA, Cai et al., 2411.09341).
Dense rewards in RLHF: Wu et al., 2306.01693, and RTO, Zhong et al., 2404.18922, both by PPO; leave-one-out: Ahmadian et
al., 2402.14740. Our combination; beta = 0.05 and 4 draws are those of `rlhf`.
"""

import bayesrm as brm


def build(
    *,
    beta: float = 0.05,
    num_candidates: int = 4,
    discount: float = 1.0,
    baseline: str = "position",
    k: float = 0.0,
    clip: float | None = None,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        beta: KL coefficient, in units of reward.
        num_candidates: Draws of the policy for each prompt.
        discount: What the reward of the next token is worth now; below 1 the gradient is that of no objective.
        baseline: What is taken off returns, from the other draws: position, sequence or none.
        k: Standard deviations that are taken off the reward of each token.
        clip: Largest importance weight of draws that the policy has moved away from; none by default.
    """
    target = brm.GoodnessPosterior(brm.programs.ExponentialTilt(beta))
    projection = brm.alignment.projections.TokenPolicyGradient(
        temperature=beta, discount=discount, baseline=baseline, k=k, clip=clip
    )
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

"""MTPO: mirror descent on turns, whose worth is the probability that the whole conversation is preferred.

Shani et al., 2405.14655. The reward of a turn is that value, in certain wins; its belief comes from a model of
conversations. Not confirmed and our choice: step = 10, tau = 0.05 and 8 candidates; the policy is moved by policy
gradient, without the paper's critic.
"""

import bayesrm as brm


def build(
    *,
    step: float = 10.0,
    tau: float = 0.05,
    num_candidates: int = 8,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        step: Learning rate, in nats for a certain win.
        tau: KL regularisation of the game.
        num_candidates: Draws of the policy for each turn.
    """
    target = brm.alignment.targets.MirrorDescent(step, tau, payoff="reward")
    projection = brm.alignment.projections.PolicyGradient()
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

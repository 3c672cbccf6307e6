"""MTPO: mirror descent on turns, whose worth is the probability that the whole conversation is preferred.

Shani et al., 2405.14655, whose best settings are tau = 0.005, and for MTPO-tau (`mixture`) tau = 0.0025 with a mixture
of 0.0375 (table 4), step * tau here. There the geometric mixture of policy and reference plays both sides; candidates
are drawn from it, weighted back to the policy, and the reward must be told:
`TurnReward(..., regularisation=tau, mixture=step * tau)`. Our choice: step = 15 throughout, which is that of MTPO-tau,
and 8 candidates; the policy is moved by policy gradient without the paper's critic.
"""

import bayesrm as brm


def build(
    *,
    step: float = 15.0,
    tau: float | None = None,
    mixture: bool = False,
    num_candidates: int = 8,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        step: Learning rate, in nats for a certain win.
        tau: KL regularisation of the game; 0.005 by default, with the mixture 0.0025.
        mixture: Play the mixture of policy and reference instead of the policy, MTPO-tau.
        num_candidates: Draws for each turn.
    """
    tau = (0.0025 if mixture else 0.005) if tau is None else tau
    target = brm.alignment.targets.MirrorDescent(step, tau, payoff="reward")
    return brm.alignment.Method(
        target,
        brm.alignment.projections.PolicyGradient(),
        proposal="mixture" if mixture else "policy",
        num_candidates=num_candidates,
        mixture_weight=step * tau if mixture else 0.25,
    )

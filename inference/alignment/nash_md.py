"""Nash-MD: policy gradient of a step of mirror descent against the mixture of policy and reference.

Munos et al., 2312.00886: tau = 0.008 and mixtures of 0.125 to 0.375, the best found; the step is mixture / tau. The
paper draws the opponent from the mixture; here draws of the policy are weighted towards it, and the baseline is that of
the other draws instead of 1/2. Not confirmed: 8 candidates. With one step for all rounds the last iterate ends near the
Nash policy; the theory lets steps fall. An uncertain judge's probabilities are averaged over the belief.
"""

import bayesrm as brm


def build(
    *,
    tau: float = 0.008,
    mixture: float = 0.125,
    num_candidates: int = 8,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        tau: KL regularisation of the game.
        mixture: Weight of the reference in the opponent.
        num_candidates: Draws of the policy for each prompt.
    """
    target = brm.alignment.targets.MirrorDescent(mixture / tau, tau, opponent="mixture")
    projection = brm.alignment.projections.PolicyGradient()
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

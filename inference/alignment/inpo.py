"""INPO: regression of pairs' log-ratios on what a judge says of them, in self-play.

Zhang et al., 2407.00617: eta = 0.0075, tau = eta / 3, so that a certain win is worth 66.7 nats. The released
code keeps the best and the worst of several draws (`pairs="best_worst"`, here by the target's tilt); all pairs of draws
of the policy are what the theory is about. An uncertain judge's probabilities are averaged over the belief.
"""

import bayesrm as brm


def build(
    *,
    eta: float = 0.0075,
    tau: float | None = None,
    pairs: str = "all",
    num_candidates: int = 2,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        eta: Inverse of the step, in certain wins for a nat.
        tau: KL regularisation of the game, below eta; a third of it by default.
        pairs: all or best_worst.
        num_candidates: Draws of the policy for each prompt.
    """
    target = brm.alignment.targets.MirrorDescent(1.0 / eta, eta / 3.0 if tau is None else tau)
    projection = brm.alignment.projections.SquaredLogRatio("preference", pairs)
    return brm.alignment.Method(target, projection, proposal="policy", num_candidates=num_candidates)

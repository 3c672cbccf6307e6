"""WIND: mirror descent in the win-rate game, the step projected by squared risk, KL divergence or NCE.

Yang et al., 2410.20727; the update is `pi_t p0^(eta tau) exp(eta P)` to the power 1 / (1 + eta tau). Not confirmed:
that form, and eta = 10, tau = 0.05 and 8 candidates, which are our choice. With the payoff log_probability it is the
game whose iteration is iterative BOND. An uncertain judge's probabilities are averaged over the belief.
"""

import bayesrm as brm


def build(
    *,
    eta: float = 10.0,
    tau: float = 0.05,
    loss: str = "squared",
    payoff: str = "probability",
    num_candidates: int = 8,
) -> brm.alignment.Method:
    """Makes the method.

    Args:
        eta: Learning rate, in nats for a certain win.
        tau: KL regularisation of the game.
        loss: squared, kl or nce.
        payoff: probability of a win, or log_probability.
        num_candidates: Draws of the policy for each prompt.
    """
    p = brm.alignment.projections
    losses = {"squared": p.SquaredLogRatio(), "kl": p.ListwiseCrossEntropy(), "nce": p.NoiseContrastive()}
    if loss not in losses:
        raise brm.errors.ArgumentError(f"`loss` is {loss!r}; it is one of {sorted(losses)}")
    target = brm.alignment.targets.MirrorDescent(eta / (1.0 + eta * tau), tau, payoff=payoff)
    return brm.alignment.Method(target, losses[loss], proposal="policy", num_candidates=num_candidates)

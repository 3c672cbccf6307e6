"""A choice between two responses by several raters, some more reliable than others; the data need a column `annotator`.

Rater a answers as meant with probability eta_a and the other way round otherwise; the eta_a are learnt and share a
prior. Crowd-BT: Chen, Bennett, Collins-Thompson and Horvitz, "Pairwise ranking aggregation in a crowdsourced setting",
WSDM 2013.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    mean_prior: float = 1.5,
    mean_scale: float = 1.0,
    spread: float | None = 1.0,
    ties: bool = False,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: Prior precision of every weight; the prior variance of a reward is its squared features over this.
        mean_prior: Prior mean of m, where a typical eta is 1/2 + sigmoid(m) / 2.
        mean_scale: Prior standard deviation of m.
        spread: s, where eta_a = 1/2 + sigmoid(m + s z_a) / 2 and z_a ~ N(0, 1); None learns it (for sampling engines).
        ties: Whether the data hold ties (Davidson's model instead of Bradley and Terry's).
        head: What the features are and which head they get, see `bayesrm.rewards.text_head`.
    """
    base = brm.likelihoods.Davidson() if ties else brm.likelihoods.BradleyTerry()
    return brm.RewardModel(
        reward=brm.rewards.text_head(**head),
        likelihood=brm.likelihoods.RaterReliability(base, mean_prior, mean_scale, spread),
        prior=brm.priors.Gaussian(precision=precision),
    )

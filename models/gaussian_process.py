"""A choice between two responses whose rewards are a Gaussian process over features: alike where features are.

Chu and Ghahramani, "Preference learning with Gaussian processes", ICML 2005, with logistic choices. For some thousands
of responses at most.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    precision: float = 1.0,
    temperature: float = 1.0,
    kernel: str = "rbf",
    lengthscale: float | str | None = None,
    standardize: bool = True,
    **head: Any,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        precision: 1 / prior variance of a reward.
        temperature: Scale of the noise of a choice, in units of reward.
        kernel: rbf, matern52 or linear.
        lengthscale: Distance of features over which rewards change; marginal_likelihood tunes it, None is the median.
        standardize: Centre features and scale them to unit variance over the training items.
        head: What the features are, see `bayesrm.rewards.text_head`; settings of other heads do not apply.
    """
    linear = brm.rewards.text_head(**head)
    if not isinstance(linear, brm.rewards.Linear):
        raise brm.errors.ArgumentError("`hidden` and `lora_rank` are settings of other rewards; leave them out")
    reward = brm.rewards.GaussianProcess(linear.features, standardize, kernel, lengthscale)
    return brm.RewardModel(reward, brm.likelihoods.BradleyTerry(temperature), brm.priors.Gaussian(precision))

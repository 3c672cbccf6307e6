"""One-hot items against expectation propagation in choix, an independent approximation of the same posterior."""

import choix
import numpy as np
import pytest
import torch

import bayesrm as brm


@pytest.mark.parametrize(("model", "likelihood"), [("logit", brm.likelihoods.BradleyTerry()), ("probit", None)])
def test_items_against_expectation_propagation(model, likelihood):
    num_items, num_rows, precision = 8, 1200, 1.0
    rng = np.random.default_rng(0)
    truth = rng.normal(size=num_items)
    pairs = np.array([rng.choice(num_items, 2, replace=False) for _ in range(num_rows)])
    # choix's probit is Phi(r_i - r_j): Thurstone noise of 1/sqrt(2) on each item.
    likelihood = likelihood or brm.likelihoods.Thurstone(noise=2**-0.5)
    declared = brm.RewardModel(brm.rewards.Linear(), likelihood, brm.priors.Gaussian(precision))
    design = brm.Comparisons.from_arrays(np.eye(num_items), candidates=pairs, outcome=np.zeros(num_rows, int))
    data = declared.simulate(design, seed=1, parameters={"weight": torch.as_tensor(truth)}).data
    outcome = data.groups()[0].outcome.numpy()
    wins = [(a, b) if y == 0 else (b, a) for (a, b), y in zip(pairs, outcome, strict=True)]
    mean, covariance = choix.ep_pairwise(num_items, wins, alpha=precision, model=model)
    belief = brm.fit(declared, data).predict(candidates=[np.eye(num_items)])
    std = np.sqrt(np.diag(covariance))
    # Two approximations with errors O(1/N) in units of the posterior: N is about 300 comparisons an item.
    assert np.abs((belief.mean[0].numpy() - mean) / std).max() < 0.1
    np.testing.assert_allclose(belief.covariance[0].numpy(), covariance, atol=0.03 * covariance.max())

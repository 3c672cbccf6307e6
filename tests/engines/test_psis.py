"""Pareto smoothing against ArviZ, NumPyro and Pyro, and weights whose tail is known."""

import importlib
import math

import arviz as az
import numpy as np
import pyro.distributions
import pyro.infer.importance
import pytest
import torch
from numpyro.infer.importance import _psis_khat

from bayesrm.engines.psis import k_hat_threshold, pareto_smooth
from bayesrm.errors import ArgumentError


def normal_weights(size, *, scale, dimension=1, seed=0):
    """Log weights N(0, I) / N(0, scale^2 I) up to a constant; unbounded when scale < 1."""
    z = torch.randn(size, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.5 * (1 - scale**2) * z.square().sum(1)


def pareto_weights(k, size, seed=0):
    """Log of generalised Pareto draws with shape k, by their quantile function."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log(torch.expm1(-k * torch.log1p(-u)) / k)


def arviz_psis(log_weights, efficiency):
    if int(az.__version__.split(".")[0]) < 1:
        return az.psislw(log_weights, reff=efficiency)
    # From 1.0 on the argument is a log likelihood that is left out: minus the log weight.
    return importlib.import_module("arviz_stats.base").array_stats.psislw(-log_weights, r_eff=efficiency)


@pytest.mark.parametrize("efficiency", [1.0, 0.3])
@pytest.mark.parametrize("scale", [0.4, 0.8, 1.5])
def test_equals_arviz(scale, efficiency):
    log_weights = normal_weights(2000, scale=scale)
    expected, k_hat = arviz_psis(log_weights.numpy(), efficiency)
    result = pareto_smooth(log_weights, relative_efficiency=efficiency)
    np.testing.assert_array_equal(result.log_weights.numpy(), expected)
    assert result.k_hat == float(k_hat)
    assert result.ess == pytest.approx(1 / np.sum(np.exp(expected) ** 2), rel=1e-12)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5])
def test_k_hat_equals_numpyro(scale):
    # NumPyro fits the same tail by code of its own: 150 draws, 3 sqrt(S), a whole number however it is rounded.
    log_weights = normal_weights(2500, scale=scale)
    assert pareto_smooth(log_weights).k_hat == pytest.approx(_psis_khat(log_weights.numpy()), abs=1e-6)


def test_k_hat_agrees_with_pyro():
    def model():
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))

    def guide():
        pyro.sample("x", pyro.distributions.Normal(0.0, 0.7))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = pyro.infer.importance.psis_diagnostic(
            model, guide, num_particles=20_000, max_simultaneous_particles=20_000
        )
    ours = [pareto_smooth(normal_weights(20_000, scale=0.7, seed=s)).k_hat for s in range(10)]
    # Two random estimates of one number: independent draws, the same spread.
    assert abs(theirs - np.mean(ours)) < 4 * np.std(ours, ddof=1)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_a_known_tail_is_recovered(k):
    found = [pareto_smooth(pareto_weights(k, 20_000, seed)).k_hat for seed in range(20)]
    tail = 3 * math.sqrt(20_000)
    # The fit draws k towards 1/2 as 10 draws more would (Vehtari et al. 2024, appendix G).
    expected = (k * tail + 5) / (tail + 10)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found, ddof=1) / math.sqrt(20) + 0.01)


def test_a_heavy_tail_is_flagged_and_a_light_one_is_not():
    light = pareto_smooth(normal_weights(4000, scale=1.3, dimension=5))
    heavy = pareto_smooth(normal_weights(4000, scale=0.3, dimension=5))
    assert light.reliable
    assert light.ess > 1000
    assert not heavy.reliable
    assert heavy.k_hat > 0.75


def test_smoothing_brings_the_average_nearer_to_the_truth():
    # E_p[1] = 1 with weights that are known up to nothing: mean of w = exp(-x^2/2) / (exp(-x^2/(2 s^2)) / s).
    scale, truth, raw, smooth = 0.65, 1.0, [], []
    for seed in range(200):
        log_weights = normal_weights(500, scale=scale, seed=seed) + math.log(scale)
        raw.append(float(log_weights.exp().mean()))
        normalised = pareto_smooth(log_weights).log_weights
        # Undo the normalisation by a weight that smoothing leaves as it is.
        smallest = int(log_weights.argmin())
        smooth.append(float((normalised - normalised[smallest] + log_weights[smallest]).exp().mean()))
    assert np.mean((np.array(smooth) - truth) ** 2) < np.mean((np.array(raw) - truth) ** 2)


def test_the_threshold():
    assert k_hat_threshold(100) == pytest.approx(0.5)
    assert k_hat_threshold(1000) == pytest.approx(1 - 1 / 3)
    assert k_hat_threshold(10**6) == 0.7
    with pytest.raises(ArgumentError, match="25"):
        k_hat_threshold(10)


def test_equal_weights_have_no_tail():
    result = pareto_smooth(torch.full((100,), -3.0) + 1e-13 * torch.randn(100, dtype=torch.float64))
    assert result.k_hat == 0.0
    assert result.reliable
    assert result.ess == pytest.approx(100)
    # Some draws outside the support of the target, the others equal.
    half = pareto_smooth(torch.cat([torch.zeros(60), torch.full((40,), -torch.inf)]))
    assert half.ess == pytest.approx(60)
    assert half.k_hat == 0.0


def test_few_positive_weights_are_not_trusted():
    log_weights = torch.full((1000,), -torch.inf, dtype=torch.float64)
    log_weights[:3] = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    result = pareto_smooth(log_weights)
    assert not result.reliable
    assert result.ess < 3


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.zeros(10), "25"),
        (torch.cat([torch.zeros(50), torch.tensor([torch.nan])]), r"\[50\] is nan"),
        (torch.cat([torch.zeros(50), torch.tensor([torch.inf])]), r"\[50\] is inf"),
        (torch.full((50,), -torch.inf), "all minus infinity"),
    ],
)
def test_weights_that_cannot_be_smoothed(log_weights, message):
    with pytest.raises(ArgumentError, match=message):
        pareto_smooth(log_weights)


def test_a_bad_efficiency():
    with pytest.raises(ArgumentError, match="relative_efficiency"):
        pareto_smooth(torch.randn(100), relative_efficiency=0.0)

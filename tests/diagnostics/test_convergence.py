"""Convergence of chains with known autocorrelation, of chains that must be flagged, and of NUTS."""

import dataclasses

import arviz as az
import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.diagnostics.convergence import convergence, of_chains
from bayesrm.engines.draws_posterior import DrawsPosterior
from bayesrm.engines.nuts import NUTS
from bayesrm.errors import ArgumentError


def chains(correlation=0.0, num_chains=4, length=1000, quantities=3, seed=0):
    """Stationary AR(1) chains with unit variance, shape `(chains, length, quantities)`."""
    rng = np.random.default_rng(seed)
    x = np.empty((num_chains, length, quantities))
    x[:, 0] = rng.normal(size=(num_chains, quantities))
    noise = rng.normal(size=x.shape) * np.sqrt(1 - correlation**2)
    for t in range(1, length):
        x[:, t] = correlation * x[:, t - 1] + noise[:, t]
    return x


def checked(x, **settings):
    names = [f"theta[{i}]" for i in range(x.shape[2])]
    return of_chains(torch.from_numpy(x.reshape(-1, x.shape[2])), names, num_chains=len(x), **settings)


def test_independent_draws_have_no_problem():
    result = checked(chains())
    assert result.converged
    assert result.problems == []
    assert "no sign of trouble" in str(result)
    assert (result.num_chains, result.num_draws) == (4, 1000)


@pytest.mark.parametrize("correlation", [0.3, 0.7])
def test_effective_sample_size_of_autoregressions(correlation):
    x = chains(correlation, length=2000, quantities=20)
    result = checked(x)
    # The integrated autocorrelation time of an AR(1) process is (1 + rho) / (1 - rho).
    expected = 8000 * (1 - correlation) / (1 + correlation)
    assert float(result.ess_bulk.mean()) == pytest.approx(expected, rel=0.1)
    assert float(result.mcse.mean()) == pytest.approx(expected**-0.5, rel=0.1)
    # The standard errors are right: means of 20 independent chains scatter by them around 0.
    assert 0.6 < float((result.mean / result.mcse).square().mean()) ** 0.5 < 1.5


def test_equals_arviz():
    x = chains(0.5)
    rng = np.random.default_rng(1)
    energy = np.cumsum(rng.normal(size=(4, 1000)), axis=1) * 0.1 + rng.normal(size=(4, 1000))
    result = checked(x, sample_stats={"energy": torch.from_numpy(energy.reshape(-1))})
    for i in range(3):
        one = np.ascontiguousarray(x[:, :, i])
        assert float(result.r_hat[i]) == float(az.rhat(one))
        assert float(result.ess_bulk[i]) == float(az.ess(one))
        assert float(result.ess_tail[i]) == float(az.ess(one, method="tail", prob=(0.05, 0.95)))
        assert float(result.mcse[i]) == float(az.mcse(one))
    np.testing.assert_allclose(result.e_bfmi, az.bfmi(energy), rtol=1e-12)


def test_a_chain_elsewhere_is_flagged():
    x = chains()
    x[2, :, 1] += 2.0
    result = checked(x)
    assert not result.converged
    assert any("R-hat is above 1.01 for 1 of 3 quantities" in p and "theta[1]" in p for p in result.problems)
    assert float(result.r_hat[0]) < 1.01


def test_a_stuck_chain_is_flagged():
    x = chains()
    x[1] = x[1, :1]
    assert any("R-hat is above" in p for p in checked(x).problems)


def test_chains_with_other_spreads_are_flagged():
    # Equal means: only folded draws tell.
    x = chains()
    x[0] *= 4.0
    assert any("R-hat" in p for p in checked(x).problems)


def test_slow_chains_are_flagged():
    result = checked(chains(0.99, length=500))
    assert any("bulk effective sample size is below 400" in p for p in result.problems)


def test_chains_that_never_move_are_flagged():
    result = checked(np.zeros((4, 100, 2)))
    assert "The chains never moved: all draws are equal." in result.problems
    each_elsewhere = np.zeros((4, 100, 2)) + np.arange(4)[:, None, None]
    assert any("R-hat" in p for p in checked(each_elsewhere).problems)


def test_constant_quantities_are_left_aside():
    x = chains()
    x[:, :, 1] = 0.5
    result = checked(x)
    assert result.names == ("theta[0]", "theta[2]")
    assert result.converged


def test_one_chain_cannot_agree_with_others():
    result = checked(chains(num_chains=1))
    assert bool(torch.isnan(result.r_hat).all())
    assert any("one chain" in p.lower() for p in result.problems)


def test_what_the_sampler_recorded():
    rng = np.random.default_rng(0)
    good = {
        "diverging": torch.zeros(4000, dtype=torch.bool),
        "energy": torch.from_numpy(rng.normal(size=4000)),
        "num_steps": torch.full((4000,), 7),
    }
    assert checked(chains(), sample_stats=good, max_tree_depth=10).converged
    diverging = good["diverging"].clone()
    diverging[:3] = True
    # A random walk over energies: momenta change them little from draw to draw.
    slow = torch.from_numpy(np.cumsum(rng.normal(size=4000)))
    bad = {"diverging": diverging, "energy": slow, "num_steps": torch.full((4000,), 1023)}
    result = checked(chains(), sample_stats=bad, max_tree_depth=10)
    assert (result.divergences, result.saturated) == (3, 4000)
    for words in ("3 of 4000 draws diverged", "E-BFMI is below 0.3 in 4 chains", "4000 trajectories stopped"):
        assert any(words in p for p in result.problems)


def test_arguments():
    with pytest.raises(ArgumentError, match="have 3 draws"):
        checked(chains(length=3))
    with pytest.raises(ArgumentError, match="1 entries for 2 quantities"):
        of_chains(torch.randn(100, 2), ["a"], num_chains=4)


def data_of(kind="choice", **columns):
    rng = np.random.default_rng(0)
    rating = kind == "rating"
    return brm.Comparisons.from_arrays(
        rng.normal(size=(30, 2)),
        candidates=np.arange(30)[:, None]
        if rating
        else np.arange(30).reshape(10, 3)[:, [[0, 1], [1, 2], [0, 2]]].reshape(30, 2),
        outcome=rng.integers(0, 3, size=30),
        prompt_index=np.repeat(np.arange(10), 3),
        kind=kind,
        **columns,
    )


@pytest.fixture(scope="module")
def nuts():
    """Independent draws of a Gaussian posterior, presented as four chains of NUTS."""
    data = data_of()
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.Davidson())
    laplace = brm.fit(model, data, inference=brm.Laplace())
    x, _ = laplace.coordinate_draws(2000, torch.Generator().manual_seed(0))
    size = laplace._whitening.size
    report = dataclasses.replace(laplace.report, engine={"name": "NUTS", "settings": {"max_tree_depth": 10}})
    stats = {"diverging": torch.zeros(2000, dtype=torch.bool), "num_steps": torch.full((2000,), 7)}
    posterior = DrawsPosterior(
        model, laplace.schema, report, laplace._expansion, laplace._whitening, x[:, :size], x[:, size:],
        num_chains=4, sample_stats=stats,
    )  # fmt: skip
    return data, posterior


@pytest.mark.slow
def test_chains_of_the_sampler():
    data = data_of()
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.Davidson())
    posterior = brm.fit(model, data, inference=NUTS(num_chains=4, num_warmup=300, num_samples=500))
    result = convergence(posterior, data)
    assert result.problems == []
    assert result.e_bfmi.shape == (4,)
    # The engine looks at whitened coordinates, by another implementation.
    coordinates = convergence(posterior)
    assert float(coordinates.r_hat.max()) == pytest.approx(posterior.report.diagnostics["r_hat"], abs=0.005)
    assert float(coordinates.ess_bulk.min()) == pytest.approx(posterior.report.diagnostics["ess"], rel=0.15)


def test_nuts_over_differences_and_latents(nuts):
    data, posterior = nuts
    result = convergence(posterior, data)
    assert result.problems == []
    assert (result.num_chains, result.num_draws, result.divergences) == (4, 500, 0)
    # Two differences for each of ten prompts, and the latents.
    assert len(result.names) == 20 + posterior.unconstrained_latents.shape[1]
    assert result.names[:3] == ("reward[1] - reward[0]", "reward[2] - reward[0]", "reward[4] - reward[3]")
    assert result.saturated == 0
    draws = posterior.draw(data, num_samples=2000)
    one = (draws.rewards[:, 4] - draws.rewards[:, 3]).reshape(4, 500).numpy()
    assert float(result.r_hat[2]) == pytest.approx(float(az.rhat(one)), abs=1e-9)
    assert set(posterior.latents(1)) <= set(result.names)


def test_nuts_without_data(nuts):
    _, posterior = nuts
    result = convergence(posterior)
    assert result.names[: posterior.z.shape[1]] == tuple(f"z[{i}]" for i in range(posterior.z.shape[1]))
    assert result.converged


def test_many_differences_are_thinned(nuts):
    data, posterior = nuts
    result = convergence(posterior, data, max_differences=5)
    assert sum(name.startswith("reward") for name in result.names) == 5
    assert result.num_left_out == 15


def test_a_chain_of_nuts_that_went_astray(nuts):
    data, posterior = nuts
    z = posterior.z.clone()
    z[:500] += 3 * z.std(0)
    astray = object.__new__(type(posterior))
    astray.__dict__.update(posterior.__dict__ | {"z": z})
    assert any("R-hat" in p for p in convergence(astray, data).problems)


@pytest.mark.parametrize("engine", [brm.Laplace(), brm.MAP()])
def test_r_hat_is_for_chains_alone(engine):
    data = data_of("rating", num_levels=3)
    posterior = brm.fit(brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.Ordinal()), data, inference=engine)
    with pytest.raises(ArgumentError, match=f"comes from {type(engine).__name__}, whose draws are not a Markov chain"):
        convergence(posterior, data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_draws_that_are_no_numbers_are_a_problem(bad):
    values = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[7, 1] = bad
    found = of_chains(values, ["a", "b"], num_chains=4)
    assert found.names == ("a", "b")
    assert any("no finite numbers: b" in problem for problem in found.problems)

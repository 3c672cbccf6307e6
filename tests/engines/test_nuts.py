"""NUTS: what it tells about its chains, what it compiles, and Pyro's sampler beside NumPyro's."""

import dataclasses

import arviz as az
import jax
import numpy as np
import pytest
import torch
from pyro.ops.stats import effective_sample_size

import bayesrm as brm
from bayesrm.backend import dist, ops, sample
from bayesrm.engines._chains import bulk_ess, chain_summary
from bayesrm.errors import ArgumentError, ConvergenceWarning, EngineError

from .conftest import make_data

L = brm.likelihoods


def stats(size, **changed):
    base = {
        "diverging": torch.zeros(size, dtype=torch.bool),
        "num_steps": torch.full((size,), 7),
        "accept_prob": torch.full((size,), 0.8, dtype=torch.float64),
        "energy": torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    }
    return base | changed


def problems(x, num_chains=4, **changed):
    return chain_summary(x, stats(len(x), **changed), num_chains, 1023)["problems"]


def test_the_summary_finds_nothing_wrong_with_independent_draws_and_each_planted_fault():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert problems(x) == []
    apart = x.clone()
    apart[:1000, 1] += 0.5
    assert any("R-hat" in p for p in problems(apart))
    wide = x.clone()
    wide[:1000, 1] *= 2.0
    assert any("R-hat" in p for p in problems(wide))
    slow = x.reshape(4, 1000, 3).cumsum(1).reshape(4000, 3)
    assert any("effective sample size" in p for p in problems(slow))
    diverging = torch.zeros(4000, dtype=torch.bool)
    diverging[17] = True
    assert any("1 of 4000 draws diverged" in p for p in problems(x, diverging=diverging))
    assert any("max_tree_depth" in p for p in problems(x, num_steps=torch.full((4000,), 1023)))
    assert any("E-BFMI" in p for p in problems(x, energy=x[:, 0].cumsum(0)))


def test_the_summary_agrees_with_an_autoregression_of_known_efficiency():
    rho, length = 0.8, 20_000
    noise = np.random.default_rng(0).normal(size=(4, length)) * np.sqrt(1 - rho**2)
    x = np.empty((4, length))
    x[:, 0] = noise[:, 0] / np.sqrt(1 - rho**2)
    for t in range(1, length):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    found = chain_summary(torch.from_numpy(x.reshape(-1, 1)), stats(4 * length), 4, 1023)
    # n (1 - rho) / (1 + rho) of an AR(1); the estimate's relative error is about sqrt(length of the window / n).
    assert found["ess"] == pytest.approx(4 * length * (1 - rho) / (1 + rho), rel=0.1)
    assert found["r_hat"] == pytest.approx(1.0, abs=0.01)


def funnel(rewards, comparison):
    """A scale whose logarithm spreads over several units, and weights that it scales: the sampler's classic trap."""
    log_scale = sample("log_scale", dist.Normal(0.0, 4.0))
    sites = dist.Normal(0.0, ops.exp(0.5 * log_scale)).expand((4,)).to_event(1)
    values = sample("values", sites)
    return dist.Bernoulli(logits=rewards[:, 0] - rewards[:, 1] + 0.01 * values[0])


def test_a_funnel_diverges_and_says_so():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), funnel)
    data = make_data(rows=4, num_features=1)
    engine = brm.NUTS(num_chains=2, num_warmup=150, num_samples=150, mass_matrix="diagonal")
    with pytest.warns(ConvergenceWarning, match="NUTS: "):
        posterior = brm.fit(model, data, inference=engine)
    found = posterior.report.diagnostics
    assert not posterior.report.converged
    assert found["divergences"] > 0 or found["r_hat"] > 1.01
    assert found["divergences"] == int(posterior.sample_stats["diverging"].sum())


# Short chains are not the point here.
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
def test_data_of_one_shape_are_compiled_once_and_chains_stay_apart():
    traced = []

    def likelihood(rewards, comparison):
        if isinstance(rewards, jax.core.Tracer):
            traced.append(rewards.shape)
        return dist.Bernoulli(logits=rewards[:, 1] - rewards[:, 0])

    model = brm.RewardModel(brm.rewards.Linear(standardize=False), likelihood)
    design = make_data(rows=10, num_features=2)
    engine = brm.NUTS(num_chains=3, num_warmup=30, num_samples=40)
    first = brm.fit(model, model.simulate(design, seed=0).data, inference=engine, seed=0)
    count = len(traced)
    assert count > 0
    data = model.simulate(design, seed=1).data
    second = brm.fit(model, data, inference=engine, seed=0)
    assert len(traced) == count
    assert not torch.equal(first.z, second.z)
    assert second.num_chains == 3
    assert second.z.shape == (120, 2)
    chains = second.z.reshape(3, 40, 2)
    assert not torch.equal(chains[0], chains[1])
    # A cut keeps equally many draws of each chain, in the order of the chains.
    draws = second.draw(data, num_samples=6)
    assert draws.num_chains == 3
    expected = chains[:, [0, 39]].reshape(6, 2) @ torch.as_tensor(np.asarray(data.features)).T
    torch.testing.assert_close(draws.rewards, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
def test_progress_and_chain_method_change_no_distribution():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.Davidson())
    data = model.simulate(make_data(rows=20, num_features=2), seed=0).data
    engine = brm.NUTS(num_chains=2, num_warmup=100, num_samples=100)
    plain = brm.fit(model, data, inference=engine, seed=0)
    shown = brm.fit(model, data, inference=engine, seed=0, progress=True)
    torch.testing.assert_close(shown.z, plain.z, rtol=1e-9, atol=1e-9)
    together = brm.fit(model, data, inference=dataclasses.replace(engine, chain_method="vectorized"), seed=0)
    # The same keys and arithmetic; rounding under vmap may differ and grow along a chain.
    torch.testing.assert_close(together.z[:5], plain.z[:5], rtol=1e-6, atol=1e-6)


def compare(a, b, draws_a, draws_b):
    """Largest difference of means and of standard deviations of two samplers, in its Monte Carlo standard errors."""

    def moments(posterior, x):
        chains = x.reshape(posterior.num_chains, -1, x.shape[1])
        centred = (x - x.mean(0)).square()
        spread = centred.reshape(chains.shape)
        ess = effective_sample_size(chains, chain_dim=0, sample_dim=1)
        ess_spread = effective_sample_size(spread, chain_dim=0, sample_dim=1)
        return x.mean(0), centred.mean(0), x.var(0) / ess, centred.var(0) / ess_spread

    mean_a, var_a, error_a, error_var_a = moments(a, draws_a)
    mean_b, var_b, error_b, error_var_b = moments(b, draws_b)
    z = torch.cat(
        [(mean_a - mean_b) / (error_a + error_b).sqrt(), (var_a - var_b) / (error_var_a + error_var_b).sqrt()]
    )
    return float(z.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("mass_matrix", ["laplace", "dense"])
def test_pyro_agrees_with_numpyro(mass_matrix):
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.Davidson())
    data = model.simulate(make_data(rows=12, num_features=2), seed=0).data
    fast = brm.fit(model, data, inference=brm.NUTS(num_samples=2000, mass_matrix=mass_matrix), seed=0)
    engine = brm.NUTS(num_chains=2, num_warmup=200, num_samples=400, mass_matrix=mass_matrix, backend="pyro")
    slow = brm.fit(model, data, inference=engine, seed=1)
    x, y = (torch.cat([p.z, p.unconstrained_latents], dim=1) for p in (fast, slow))
    # Six normal numbers: their largest exceeds 4.5 once in 20,000 times.
    assert compare(fast, slow, x, y) < 4.5
    # And the comparison would have seen a posterior a third of a standard deviation away.
    assert compare(fast, slow, x, y + 0.33 * y.std(0)) > 4.5


@pytest.mark.slow
def test_a_network_head_agrees_between_metrics():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(2,)), L.BradleyTerry())
    data = model.simulate(make_data(rows=15, num_features=2), seed=0).data
    engine = brm.NUTS(num_warmup=1000, num_samples=2000, target_accept=0.95)
    fits = [
        brm.fit(model, data, inference=dataclasses.replace(engine, mass_matrix=m), seed=0)
        for m in ("diagonal", "dense")
    ]
    # Weights of a network can be permuted and mirrored, its reward differences cannot.
    differences = [p.draw(data, num_samples=len(p)).rewards for p in fits]
    differences = [d[:, 0::2] - d[:, 1::2] for d in differences]
    assert compare(*fits, *[d[:, :4] for d in differences]) < 4.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "`num_chains`"),
        ({"num_warmup": 0}, "`num_warmup`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"target_accept": 1.0}, "`target_accept` is 1.0"),
        ({"mass_matrix": "round"}, "`mass_matrix`"),
        ({"backend": "stan"}, "`backend`"),
        ({"chain_method": "parallel"}, "`chain_method`"),
        ({"memory_gib": 0.0}, "`memory_gib`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        brm.NUTS(**settings)


def only_torch(rewards, comparison):
    """A likelihood that breaks the rule to write with `ops` alone: under JAX it is another one."""
    sign = 1.0 if isinstance(rewards, torch.Tensor) else -1.0
    return dist.Bernoulli(logits=sign * (rewards[:, 1] - rewards[:, 0]))


def test_a_density_that_differs_between_backends_is_refused():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), only_torch)
    data = model.simulate(make_data(rows=6, num_features=1), seed=0).data
    with pytest.raises(EngineError, match=r"under NumPyro and .* under Pyro .*use NUTS\(backend='pyro'\)"):
        brm.fit(model, data, inference=brm.NUTS())


def test_the_effective_sample_size_equals_arviz_also_of_antithetic_chains():
    rng = np.random.default_rng(0)
    for rho, chains, length in ((-0.9, 1, 100), (-0.5, 4, 500), (0.0, 4, 500), (0.5, 3, 501)):
        noise = rng.normal(size=(chains, length, 5)) * np.sqrt(1 - rho**2)
        x = noise / np.sqrt(1 - rho**2)
        for t in range(1, length):
            x[:, t] = rho * x[:, t - 1] + noise[:, t]
        expected = [float(az.ess(np.ascontiguousarray(x[:, :, i]), method="mean")) for i in range(5)]
        np.testing.assert_allclose(bulk_ess(torch.from_numpy(x)), expected, rtol=1e-9)


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("length", [8, 9, 25])
def test_the_effective_sample_size_of_short_chains_stays_in_its_range(length, rho):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, length, 200))
    for t in range(1, length):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * x[:, t]
    found = bulk_ess(torch.from_numpy(x))
    size = 8 * (length // 2)
    assert float(found.min()) > 1.0
    assert float(found.max()) <= size * np.log10(size) * (1 + 1e-12)


def test_one_chain_is_a_problem_and_two_are_none():
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert any("one chain cannot show" in p for p in problems(x, num_chains=1))
    assert problems(x, num_chains=2) == []


@pytest.mark.parametrize(("backend", "num_samples"), [("numpyro", 7), ("pyro", 1), ("pyro", 3)])
def test_too_few_draws_are_a_problem_and_no_error(backend, num_samples):
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    data = model.simulate(make_data(rows=6, num_features=1), seed=0).data
    engine = brm.NUTS(num_chains=2, num_warmup=20, num_samples=num_samples, backend=backend)
    with pytest.warns(ConvergenceWarning, match=f"{num_samples} draws a chain are too few"):
        posterior = brm.fit(model, data, inference=engine)
    assert len(posterior) == 2 * num_samples
    assert not posterior.report.converged
    assert "largest R-hat unknown, smallest ESS unknown" in posterior.summary()


def test_pyro_counts_the_divergences_of_a_funnel():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), funnel)
    data = make_data(rows=4, num_features=1)
    engine = brm.NUTS(
        num_chains=1, num_warmup=10, num_samples=20, mass_matrix="diagonal", backend="pyro", target_accept=0.3,
        max_tree_depth=4,
    )  # fmt: skip
    with pytest.warns(ConvergenceWarning, match="draws diverged"):
        posterior = brm.fit(model, data, inference=engine, seed=0)
    assert 0 < posterior.report.diagnostics["divergences"] == int(posterior.sample_stats["diverging"].sum()) < 20

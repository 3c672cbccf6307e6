"""SVI against the bound maximised by quadrature, its minibatches, and Pyro's own variational inference."""

import itertools

import numpy as np
import pyro
import pyro.infer
import pyro.optim
import pytest
import scipy.optimize
import torch

import bayesrm as brm
from bayesrm.backend import seeded
from bayesrm.engines._problem import make_problem
from bayesrm.engines.svi import _batches
from bayesrm.errors import ArgumentError, ConvergenceWarning, EngineError

from .conftest import make_data

L = brm.likelihoods


def one_weight(rows=8, seed=0):
    """Bradley-Terry with one weight, and its log joint as a function of that weight."""
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    data = model.simulate(make_data(rows=rows, num_features=1), seed=seed).data
    features = np.asarray(data.features)[:, 0]
    slope = (features[0::2] - features[1::2]) * (1 - 2 * data.groups()[0].outcome.numpy())

    def log_joint(w):
        log_prior = -0.5 * w**2 - 0.5 * np.log(2 * np.pi)
        return log_prior - np.logaddexp(0.0, -np.multiply.outer(w, slope)).sum(-1)

    return model, data, log_joint


def best_normal(log_joint):
    """Mean and standard deviation of the closest normal distribution in KL(q || p), and the bound there."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def negative(x):
        mean, log_std = x
        entropy = log_std + 0.5 * np.log(2 * np.pi * np.e)
        return -(weights * log_joint(mean + np.exp(log_std) * nodes)).sum() - entropy

    found = scipy.optimize.minimize(negative, [0.0, 0.0], options={"gtol": 1e-8})
    return found.x[0], np.exp(found.x[1]), -found.fun


def test_full_rank_is_the_closest_normal_and_its_bound_is_below_the_evidence():
    model, data, log_joint = one_weight()
    mean, std, bound = best_normal(log_joint)
    posterior = brm.fit(model, data, inference=brm.SVI(num_steps=600, num_particles=16))
    # Steps shrink to nothing, so that what is left is the noise of the last few hundred averaged.
    assert float(posterior.mode[0]) == pytest.approx(mean, abs=0.03 * std)
    assert 1.0 / float(posterior.factor[0, 0]) == pytest.approx(std, rel=0.03)
    laplace = brm.fit(model, data)
    assert abs(float(laplace.mode[0]) - mean) > 0.05 * std
    found = posterior.report.diagnostics
    assert found["elbo"] == pytest.approx(bound, abs=4.5 * found["elbo_std_error"] + 1e-3)
    grid = np.linspace(-10, 10, 4001)
    evidence = np.log(np.exp(log_joint(grid)).sum() * (grid[1] - grid[0]))
    assert 0.0 < evidence - bound < 0.05
    # The bound of another normal distribution is lower by more than the test would forgive.
    assert found["elbo"] < evidence + 4.5 * found["elbo_std_error"]


def test_full_rank_stays_near_the_evidence_with_many_coordinates():
    # 250 coordinates have 31,125 entries below the diagonal, whose noise must not add up: it cost 4 nats.
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry(), brm.priors.Gaussian(300.0))
    data = model.simulate(make_data(rows=250, num_features=300), seed=0).data
    posterior = brm.fit(model, data, inference=brm.SVI(num_steps=300))
    exact = brm.fit(model, data, inference=brm.ImportanceSampling(num_samples=20_000)).report
    found = posterior.report.diagnostics
    assert posterior.report.converged
    assert -0.5 < found["elbo"] - exact.log_evidence < 4.5 * found["elbo_std_error"]


def test_mean_field_of_a_normal_posterior_has_the_diagonal_of_its_precision():
    # 600 comparisons of strongly correlated features: the posterior is nearly normal.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1200, 1)) + 0.5 * rng.normal(size=(1200, 2))
    pairs = np.arange(1200).reshape(600, 2)
    design = brm.Comparisons.from_arrays(features, candidates=pairs, outcome=np.zeros(600, int))
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    data = model.simulate(design, seed=1).data
    precision = make_problem(model, data, seed=0, progress=False, memory_gib=1.0).precision()
    expected = precision.diagonal().rsqrt()
    marginal = torch.cholesky_inverse(torch.linalg.cholesky(precision)).diagonal().sqrt()
    assert (marginal / expected).min() > 1.3
    posterior = brm.fit(model, data, inference=brm.SVI(guide="mean_field", num_steps=600))
    torch.testing.assert_close(1.0 / posterior.factor, expected, rtol=0.05, atol=0)


def test_minibatches_average_to_the_whole_gradient():
    rng = np.random.default_rng(0)
    parts = [
        make_data(rows=12, num_features=2, annotator=[f"rater {i % 3}" for i in range(12)]),
        make_data("rating", rows=6, k=1, num_features=2, num_levels=4, annotator=[f"rater {i % 3}" for i in range(6)]),
    ]
    model = brm.RewardModel(
        brm.rewards.Linear(standardize=False), {"choice": L.RaterReliability(L.Davidson()), "rating": L.Ordinal()}
    )
    data = model.simulate(brm.Comparisons.concatenate(parts), seed=0).data
    problem = make_problem(model, data, seed=0, progress=False, memory_gib=1.0)
    x = torch.from_numpy(rng.normal(size=(2, problem.dimension))).requires_grad_(True)
    whole = problem.log_joints(x)
    (gradient,) = torch.autograd.grad(whole.sum(), [x])
    generator = torch.Generator().manual_seed(0)
    density = problem.density
    # A third of both kinds a batch, so that three batches are the data.
    batches = list(itertools.islice(_batches(density.groups, 6, generator), 3))
    assert [[len(g.items) for g in batch] for batch in batches] == [[4, 2]] * 3
    for i in range(2):
        seen = torch.cat([batch[i].rows for batch in batches])
        assert torch.equal(seen.sort().values, density.groups[i].rows.sort().values)
        assert not torch.equal(seen, density.groups[i].rows)
    values, slopes = [], []
    for batch in batches:
        problem.density = density.of_groups(batch)
        values.append(problem.log_joints(x))
        slopes.append(torch.autograd.grad(values[-1].sum(), [x])[0])
    torch.testing.assert_close(torch.stack(values).mean(0), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack(slopes).mean(0), gradient, rtol=1e-12, atol=1e-12)
    # One batch is not the whole, so the average has something to do.
    assert (slopes[0] - gradient).abs().max() > 0.1


def test_minibatches_find_the_same_posterior():
    model, data, log_joint = one_weight(rows=40, seed=3)
    mean, std, _ = best_normal(log_joint)
    posterior = brm.fit(model, data, inference=brm.SVI(num_steps=1500, batch_size=10, learning_rate=0.01))
    # Noise of the batches does not vanish at the optimum: it stays, averaged over the last steps.
    assert float(posterior.mode[0]) == pytest.approx(mean, abs=0.15 * std)
    assert 1.0 / float(posterior.factor[0, 0]) == pytest.approx(std, rel=0.15)


def test_too_few_steps_are_told():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(8,)), L.BradleyTerry())
    data = model.simulate(make_data(rows=60, num_features=4), seed=0).data
    with pytest.warns(ConvergenceWarning, match=r"after 40 steps.* raise `num_steps`"):
        posterior = brm.fit(model, data, inference=brm.SVI(num_steps=40, num_samples=10))
    assert not posterior.report.converged
    assert len(posterior) == 10


@pytest.mark.slow
def test_a_network_has_settled_when_longer_runs_do_not_rise():
    rng = np.random.default_rng(0)
    design = brm.Comparisons.from_arrays(
        rng.normal(size=(400, 3)), candidates=np.arange(400).reshape(200, 2), outcome=np.zeros(200, int)
    )
    model = brm.RewardModel(brm.rewards.MLP(hidden=(8,)), L.BradleyTerry())
    data = model.simulate(design, seed=2).data

    def fit(num_steps):
        return brm.fit(model, data, inference=brm.SVI(num_steps=num_steps, num_samples=10)).report

    # Some 0.8 nats are left after 400 steps, though the gradient is small in units of the guide's spread.
    with pytest.warns(ConvergenceWarning, match="after 400 steps, while 100 more raise the bound by"):
        short = fit(400)
    long = fit(1500)
    assert (short.converged, long.converged) == (False, True)
    error = np.hypot(short.diagnostics["elbo_std_error"], long.diagnostics["elbo_std_error"])
    assert long.diagnostics["elbo"] - short.diagnostics["elbo"] > 1.96 * error


def test_the_judgement_of_a_network_leaves_the_fit_alone(monkeypatch):
    model = brm.RewardModel(brm.rewards.MLP(hidden=(3,)), L.BradleyTerry())
    data = model.simulate(make_data(rows=20, num_features=2), seed=0).data
    engine = brm.SVI(num_steps=20, num_samples=10)
    with pytest.warns(ConvergenceWarning):
        judged = brm.fit(model, data, inference=engine)
    monkeypatch.setattr(brm.SVI, "_rises_no_more", lambda *_: True)
    trusted = brm.fit(model, data, inference=engine)
    assert (judged.report.converged, trusted.report.converged) == (False, True)
    assert judged.report.diagnostics == trusted.report.diagnostics
    torch.testing.assert_close(judged.draw(data).rewards, trusted.draw(data).rewards, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "flow"}, "`guide`"),
        ({"num_steps": 0}, "`num_steps`"),
        ({"num_particles": 0}, "`num_particles`"),
        ({"rank": 0}, "`rank`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0"),
        ({"memory_gib": 0.0}, "`memory_gib`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        brm.SVI(**settings)


@pytest.mark.slow
def test_agrees_with_pyro_on_the_program():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.Davidson())
    data = model.simulate(make_data(rows=20, num_features=2), seed=0).data
    ours = brm.fit(model, data, inference=brm.SVI(num_steps=2000, num_particles=16))
    covariance = torch.cholesky_inverse(ours.factor)
    features, groups = torch.as_tensor(np.asarray(data.features)).double(), data.groups()
    default = torch.get_default_dtype()
    with pyro.get_param_store().scope(), seeded(0):
        torch.set_default_dtype(torch.float64)
        try:
            guide = pyro.infer.autoguide.AutoMultivariateNormal(model, init_scale=0.3)
            schedule = {"lr": 0.03, "lrd": 0.001 ** (1 / 3000)}
            loss = pyro.infer.Trace_ELBO(num_particles=8)
            svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam(schedule), loss)
            for _ in range(3000):
                svi.step(features, groups)
            normal = guide.get_posterior()
        finally:
            torch.set_default_dtype(default)
    # Pyro's guide holds the weights and then the logarithm of the tie weight, as ours does.
    std = covariance.diagonal().sqrt()
    assert ((normal.mean.detach() - ours.mode) / std).abs().max() < 0.1
    found = normal.covariance_matrix.detach() / std / std[:, None]
    torch.testing.assert_close(found, covariance / std / std[:, None], rtol=0, atol=0.12)


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(ArgumentError, match="`rank` is of guide='low_rank'"):
        brm.SVI(guide="mean_field", rank=3)
    model, data, _ = one_weight()
    with pytest.raises(EngineError, match="`num_samples` is for heads that are not linear"):
        brm.fit(model, data, inference=brm.SVI(num_samples=7))

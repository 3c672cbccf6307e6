"""MLP heads: the mode by an independent gradient, the linearised posterior by torch.func."""

import warnings

import numpy as np
import pytest
import torch
from torch.func import hessian, jacrev

import bayesrm as brm
from bayesrm.diagnostics._report._engine import engine
from bayesrm.diagnostics._report._section import Status
from bayesrm.engines._density import FeedbackDensity
from bayesrm.rewards.heads import flatten, unflatten

from .conftest import make_data

L = brm.likelihoods


@pytest.fixture(scope="module")
def fitted():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(5, 3)), L.Davidson(), brm.priors.Gaussian(precision=0.1))
    data = model.simulate(make_data(rows=120, num_features=3), seed=2).data
    return (
        model,
        data,
        brm.fit(model, data, inference=brm.Laplace(gradient_tolerance=1e-5, max_iterations=5000), seed=1),
    )


def test_mode_is_stationary_in_the_network_itself(fitted):
    model, data, posterior = fitted
    assert posterior.report.converged
    shapes = model.reward.parameter_shapes(3)
    point = flatten(posterior.parameters).requires_grad_(True)
    u = posterior.mode[posterior.report.num_coordinates :].clone().requires_grad_(True)
    density = FeedbackDensity(model, data.groups())
    rewards = model.reward.apply(unflatten(point, shapes), torch.as_tensor(np.asarray(data.features)))
    log_joint = density.log_joint(density.gather(rewards), u) - 0.05 * point @ point
    gradient = torch.cat(torch.autograd.grad(log_joint, [point, u]))
    # The stated norm is in units of the prior standard deviation, here sqrt(10).
    assert float(gradient.norm()) < 2e-5


def test_covariance_is_the_generalised_gauss_newton_one(fitted):
    model, data, posterior = fitted
    shapes = model.reward.parameter_shapes(3)
    point = flatten(posterior.parameters)
    features = torch.as_tensor(np.asarray(data.features))

    def rewards(p):
        return model.reward.apply(unflatten(p, shapes), features)

    jacobian = jacrev(rewards)(point)
    u = posterior.mode[posterior.report.num_coordinates :]
    (group,) = FeedbackDensity(model, data.groups()).groups
    outcome = group.outcome

    def negative(r, u):
        half = 0.5 * (r[group.items[:, 0]] - r[group.items[:, 1]])
        logits = torch.stack([half, -half, u[0] + 0.0 * half], 1)
        return -torch.log_softmax(logits, 1).gather(1, outcome[:, None]).sum() + 0.5 * (u[0] - np.log(0.5)) ** 2

    h = hessian(negative, argnums=(0, 1))(rewards(point), u)
    top = torch.cat([jacobian.T @ h[0][0] @ jacobian + 0.1 * torch.eye(len(point)), jacobian.T @ h[0][1]], 1)
    bottom = torch.cat([h[1][0] @ jacobian, h[1][1]], 1)
    covariance = torch.linalg.inv(torch.cat([top, bottom]))[: len(point), : len(point)]
    new = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at_new = jacrev(lambda p: model.reward.apply(unflatten(p, shapes), new))(point)
    belief = posterior.predict(candidates=[new])
    torch.testing.assert_close(belief.covariance[0], at_new @ covariance @ at_new.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(belief.mean[0], model.reward.apply(unflatten(point, shapes), new), rtol=0, atol=1e-4)


def test_primal_equals_dual_around_one_mode():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(20,)), L.BradleyTerry(), brm.priors.Gaussian(precision=0.1))
    data = model.simulate(make_data(rows=15, num_features=3), seed=2).data
    settings = {"gradient_tolerance": 1e-6, "max_iterations": 5000}
    primal, dual = (
        brm.fit(model, data, inference=brm.Laplace(coordinates=c, **settings), seed=3) for c in ("primal", "dual")
    )
    assert (primal.report.num_coordinates, dual.report.num_coordinates) == (100, 15)
    new = np.random.default_rng(1).normal(size=(1, 5, 3))
    a, b = primal.predict(candidates=list(new)), dual.predict(candidates=list(new))
    # The optimiser leaves a gradient of 1e-6 outside the row space, so means agree to that, not to rounding.
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=0, atol=1e-9)


def test_an_early_stop_says_it_is_no_mode():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(8,)), L.BradleyTerry())
    data = model.simulate(make_data(rows=60), seed=2).data
    with pytest.warns(brm.errors.ConvergenceWarning, match="not the mode"):
        posterior = brm.fit(model, data, inference=brm.MAP(max_iterations=2))
    assert not posterior.report.converged
    assert "NOT CONVERGED" in posterior.summary()


def test_tuned_precision_reaches_a_fixed_point():
    truth = brm.RewardModel(brm.rewards.MLP(hidden=(4,)), L.BradleyTerry(), brm.priors.Gaussian(precision=0.3))
    data = truth.simulate(make_data(rows=150, num_features=2), seed=2).data
    model = brm.RewardModel(brm.rewards.MLP(hidden=(4,)), L.BradleyTerry(), brm.priors.Gaussian(precision=3.0))
    engine = brm.Laplace(prior_precision="marginal_likelihood", max_iterations=5000)
    once = brm.fit(model, data, inference=engine, seed=1)
    again = brm.fit(once.program, data, inference=engine, seed=1)
    assert np.log(again.program.prior.precision) == pytest.approx(np.log(once.program.prior.precision), abs=0.1)
    # The reported gradient is that of the network under the tuned prior.
    point = flatten(once.parameters).requires_grad_(True)
    density = FeedbackDensity(model, data.groups())
    rewards = model.reward.apply(
        unflatten(point, model.reward.parameter_shapes(2)), torch.as_tensor(np.asarray(data.features))
    )
    precision = once.program.prior.precision
    log_joint = density.log_joint(density.gather(rewards), density.initial_latents) - 0.5 * precision * point @ point
    (gradient,) = torch.autograd.grad(log_joint, [point])
    assert once.report.converged
    assert float(gradient.norm()) / precision**0.5 < 2e-6


def collapsed():
    """So strong a prior, and so little feedback, that the mode is the point zero, where an MLP has no derivative."""
    rng = np.random.default_rng(0)
    pairs = np.arange(60).reshape(30, 2)
    data = brm.Comparisons.from_arrays(rng.normal(size=(60, 3)), candidates=pairs, outcome=rng.integers(2, size=30))
    return brm.RewardModel(brm.rewards.MLP(hidden=(4,)), L.BradleyTerry(), brm.priors.Gaussian(20.0)), data


def test_laplace_says_when_its_linear_model_knows_everything_from_nothing():
    model, data = collapsed()
    with pytest.warns(brm.errors.ApproximationWarning, match="hardly reacts to its parameters"):
        posterior = brm.fit(model, data, inference=brm.Laplace())
    assert posterior.report.diagnostics["linearised_prior_share"] < 1e-4
    section = engine(posterior, [])
    assert section.status is Status.PROBLEM
    assert "hardly reacts to its weights" in section.verdict


def test_laplace_is_silent_where_the_network_reacts():
    model, data = collapsed()
    loose = brm.RewardModel(model.reward, model.likelihood, brm.priors.Gaussian(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", brm.errors.ApproximationWarning)
        posterior = brm.fit(loose, data, inference=brm.Laplace())
    assert posterior.report.diagnostics["linearised_prior_share"] > 0.1

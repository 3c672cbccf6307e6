"""Importance sampling: corrects a proposal that is somewhat off, refuses one that is too far off."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.engines.importance import _systematic
from bayesrm.errors import ArgumentError, EngineError

from .conftest import make_data

L = brm.likelihoods


@dataclasses.dataclass(frozen=True)
class Distorted:
    """Laplace's approximation moved by `shift` and widened by `scale` of its standard deviations."""

    shift: float = 0.0
    scale: float = 1.0

    def fit(self, program, data, *, seed, progress):
        posterior = brm.Laplace().fit(program, data, seed=seed, progress=progress)
        std = torch.cholesky_inverse(posterior.factor).diagonal().sqrt()
        posterior.mode = posterior.mode + self.shift * std
        posterior.factor = posterior.factor / self.scale
        return posterior


@pytest.fixture(scope="module")
def case():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    return model, model.simulate(make_data(rows=8, num_features=1), seed=0).data


def exact(data):
    """Mean and standard deviation of the only weight, on a grid."""
    features = np.asarray(data.features)[:, 0]
    slope = (features[0::2] - features[1::2]) * (1 - 2 * data.groups()[0].outcome.numpy())
    w = np.linspace(-9, 9, 2001)
    log_joint = -0.5 * w**2 - np.logaddexp(0.0, -np.multiply.outer(w, slope)).sum(1)
    p = np.exp(log_joint - log_joint.max())
    p /= p.sum()
    mean = (p * w).sum()
    return mean, np.sqrt((p * (w - mean) ** 2).sum())


@pytest.mark.parametrize(
    "engine",
    [
        brm.ImportanceSampling(num_samples=20_000),
        brm.ImportanceSampling(num_samples=20_000, degrees_of_freedom=5.0),
        brm.ImportanceSampling(Distorted(shift=1.0, scale=1.5), num_samples=20_000),
        brm.ImportanceSampling(brm.SVI(num_steps=100), num_samples=20_000, degrees_of_freedom=5.0),
    ],
    ids=["laplace", "student", "distorted", "svi"],
)
def test_whatever_the_proposal_the_answer_is_the_posterior(case, engine):
    model, data = case
    posterior = brm.fit(model, data, inference=engine, seed=1)
    mean, std = exact(data)
    found = posterior.report.diagnostics
    assert found["k_hat"] < 0.5
    # A mean of `ess` draws, and a standard deviation of so many of a nearly normal distribution.
    error = 4.5 / found["ess"] ** 0.5
    assert float(posterior.z.mean()) == pytest.approx(mean, abs=error * std)
    assert float(posterior.z.std()) == pytest.approx(std, rel=error)


def test_the_proposals_alone_are_off_by_more_than_the_test_forgives(case):
    model, data = case
    mean, std = exact(data)
    laplace = brm.fit(model, data)
    assert abs(float(laplace.mode[0]) - mean) > 0.05 * std
    assert abs(float(brm.fit(model, data, inference=Distorted(1.0, 1.5)).mode[0]) - mean) > 0.5 * std


@pytest.mark.parametrize("proposal", [Distorted(scale=0.2), Distorted(shift=6.0)], ids=["narrow", "far"])
def test_a_proposal_that_misses_the_posterior_is_refused(case, proposal):
    model, data = case
    with pytest.raises(EngineError, match=r"k-hat [\d.]+, above 0.70.*1 dimensions.*`degrees_of_freedom`"):
        brm.fit(model, data, inference=brm.ImportanceSampling(proposal, num_samples=20_000))
    # The threshold is the user's to move, and is the smaller the fewer the draws.
    allowed = brm.ImportanceSampling(proposal, num_samples=20_000, max_k_hat=1e6)
    assert brm.fit(model, data, inference=allowed).report.diagnostics["k_hat"] > 0.7
    with pytest.raises(EngineError, match=r"above 0.50"):
        brm.fit(model, data, inference=brm.ImportanceSampling(proposal, num_samples=100))


def test_a_network_is_corrected_towards_its_own_posterior():
    model = brm.RewardModel(brm.rewards.MLP(hidden=(1,)), L.BradleyTerry())
    data = model.simulate(make_data(rows=4, num_features=1), seed=0).data
    proposal = brm.SVI(num_steps=500, num_samples=4000)
    plain = brm.fit(model, data, inference=proposal, seed=0)
    corrected = brm.fit(model, data, inference=brm.ImportanceSampling(proposal, max_k_hat=5.0), seed=0)
    assert len(corrected) == 4000
    # Draws of the proposal, the likelier ones more than once.
    kept = {tuple(z) for z in plain.z.tolist()}
    assert all(tuple(z) in kept for z in corrected.z.tolist())
    assert corrected.report.diagnostics["distinct_draws"] < 4000
    with pytest.raises(EngineError, match="`degrees_of_freedom` is for"):
        brm.fit(model, data, inference=brm.ImportanceSampling(proposal, degrees_of_freedom=5.0, max_k_hat=5.0))


@pytest.mark.parametrize(
    "engine",
    [
        brm.ImportanceSampling(num_samples=50_000, degrees_of_freedom=4.0, max_k_hat=5.0),
        brm.ImportanceSampling(brm.SVI(num_steps=300), num_samples=50_000, max_k_hat=5.0),
    ],
    ids=["laplace", "svi"],
)
def test_a_network_is_corrected_to_itself_and_not_to_its_linearisation(engine):
    model = brm.RewardModel(brm.rewards.MLP(hidden=(1,), standardize=False), L.BradleyTerry())
    data = model.simulate(make_data(rows=6, num_features=1), seed=1).data
    x = np.asarray(data.features)[:, 0]
    grid = np.linspace(-4.5, 4.5, 61)
    weight, bias, out = np.meshgrid(grid, grid, grid, indexing="ij")
    rewards = out[..., None] * np.tanh(weight[..., None] * x + bias[..., None])
    difference = (rewards[..., 0::2] - rewards[..., 1::2]) * (1 - 2 * data.groups()[0].outcome.numpy())
    log_joint = -0.5 * (weight**2 + bias**2 + out**2) - np.logaddexp(0.0, -difference).sum(-1)
    p = np.exp(log_joint)
    evidence = np.log(p.sum() * (grid[1] - grid[0]) ** 3) - 1.5 * np.log(2 * np.pi)
    mean = np.average(difference.reshape(-1, 6), axis=0, weights=p.ravel())
    std = np.sqrt(np.average((difference.reshape(-1, 6) - mean) ** 2, axis=0, weights=p.ravel()))
    posterior = brm.fit(model, data, inference=engine)
    drawn = posterior.draw(data).rewards.numpy()
    drawn = (drawn[:, 0::2] - drawn[:, 1::2]) * (1 - 2 * data.groups()[0].outcome.numpy())
    error = 5.0 / posterior.report.diagnostics["ess"] ** 0.5
    assert (np.abs(drawn.mean(0) - mean) < error * std).all()
    # Kurtosis above that of a normal makes a standard deviation less certain.
    assert (np.abs(drawn.std(0) / std - 1.0) < 1.5 * error).all()
    assert posterior.report.log_evidence == pytest.approx(evidence, abs=error)


def test_the_mean_weight_is_the_evidence(case):
    model, data = case
    features = np.asarray(data.features)[:, 0]
    slope = (features[0::2] - features[1::2]) * (1 - 2 * data.groups()[0].outcome.numpy())
    w = np.linspace(-9, 9, 4001)
    log_joint = -0.5 * w**2 - 0.5 * np.log(2 * np.pi) - np.logaddexp(0.0, -np.multiply.outer(w, slope)).sum(1)
    exact_evidence = np.log(np.exp(log_joint).sum() * (w[1] - w[0]))
    corrected = brm.fit(model, data, inference=brm.ImportanceSampling(num_samples=200_000)).report
    # Of the logarithm of a mean weight, by the delta method.
    error = math.sqrt((200_000 / corrected.diagnostics["ess"] - 1.0) / 200_000)
    assert 4.5 * error < 4e-3
    assert corrected.log_evidence == pytest.approx(exact_evidence, abs=4.5 * error)
    assert abs(brm.fit(model, data).report.log_evidence - exact_evidence) > 6e-3


@pytest.mark.parametrize("proposal", [brm.NUTS(), brm.MAP(), brm.Ensemble(), brm.ImportanceSampling()])
def test_a_proposal_without_a_density_is_refused_before_it_starts(case, proposal):
    with pytest.raises(EngineError, match="has no density to evaluate"):
        brm.fit(*case, inference=brm.ImportanceSampling(proposal))


def test_systematic_resampling_keeps_every_draw_as_often_as_its_weight_says():
    weights = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    share = 500 * weights / weights.sum()
    totals = torch.zeros(500, dtype=torch.float64)
    for seed in range(400):
        index = _systematic(weights, torch.Generator().manual_seed(seed))
        counts = torch.bincount(index, minlength=500).double()
        assert int(counts.sum()) == 500
        assert ((counts - share).abs() < 1.0).all()
        totals += counts
    # Each count is one of two whole numbers around its share: a standard deviation of at most one half.
    assert (totals / 400 - share).abs().max() < 5.0 * 0.5 / 400**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": brm.Laplace}, "`proposal` is .*it is an engine such as Laplace"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"num_samples": 10}, "`num_samples` is 10; weights are judged from 25"),
        ({"degrees_of_freedom": 0.0}, "`degrees_of_freedom` is 0.0"),
        ({"max_k_hat": 0.0}, "`max_k_hat` is 0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        brm.ImportanceSampling(**settings)

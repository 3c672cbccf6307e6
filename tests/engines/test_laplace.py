"""Laplace's approximation against other ways to its answers: torch.func, quadrature, primal form, duplicated rows."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.func import hessian

import bayesrm as brm
from bayesrm.engines._curvature import CurvatureKind, curvature, is_positive_semidefinite
from bayesrm.engines._density import FeedbackDensity

from .conftest import CASES, make_data

L = brm.likelihoods


# primal and dual agree


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("name", list(CASES))
def test_primal_equals_dual(name, rows):
    likelihood, design = CASES[name]
    design = dict(design) | {"rows": rows, "num_features": 15}
    if "annotator" in design:
        design["annotator"] = [f"rater {i % 3}" for i in range(rows)]
    model = brm.RewardModel(brm.rewards.Linear(), likelihood, brm.priors.Gaussian(precision=0.3))
    data = model.simulate(make_data(**design), seed=1).data
    if rows == 40 and data.groups()[0].comparison.num_candidates == 1:
        assert data.num_items == 40
    fits = {
        c: brm.fit(model, data, inference=brm.Laplace(coordinates=c, gradient_tolerance=1e-10))
        for c in ("primal", "dual")
    }
    assert fits["primal"].report.num_coordinates == 15
    assert fits["primal"].report.log_evidence == pytest.approx(fits["dual"].report.log_evidence, abs=1e-9)
    new = np.random.default_rng(9).normal(size=(2, 3, 15))
    beliefs = {c: posterior.predict(candidates=list(new)) for c, posterior in fits.items()}
    torch.testing.assert_close(beliefs["primal"].mean, beliefs["dual"].mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(beliefs["primal"].covariance, beliefs["dual"].covariance, rtol=0, atol=1e-10)
    feedback = {c: posterior.predict_feedback(data) for c, posterior in fits.items()}
    torch.testing.assert_close(feedback["primal"].log_prob, feedback["dual"].log_prob, rtol=0, atol=1e-9)


def test_dual_keeps_the_prior_where_the_data_are_silent():
    features = np.zeros((4, 3))
    features[0, 0] = 1.0
    data = brm.Comparisons.from_arrays(features, candidates=[[0, 1]], outcome=[0], prompt_index=[0, 0, 1, 1])
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry(), brm.priors.Gaussian(precision=4.0))
    posterior = brm.fit(model, data, inference=brm.Laplace(coordinates="dual"))
    assert posterior.report.num_coordinates == 1
    belief = posterior.predict(candidates=[np.array([[0.0, 2.0, 0.0], [0.0, 1.0, 1.0]])])
    # Directions without data keep N(0, 1/4): variances 4/4 and 2/4, covariance 2/4.
    expected = torch.tensor([[1.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(belief.covariance[0], expected, rtol=0, atol=1e-12)


# curvature by torch.func


def _negative_log_likelihood(name):
    """-log p of one row, written by hand, as a function of (rewards, unconstrained latents)."""
    log_sigmoid, log_ndtr = torch.nn.functional.logsigmoid, torch.special.log_ndtr

    def bradley_terry(r, u, y, length):
        return -log_sigmoid((1 - 2 * y) * (r[0] - r[1]))

    def thurstone(r, u, y, length):
        return -log_ndtr((1 - 2 * y) * (r[0] - r[1]) / 2**0.5)

    def davidson(r, u, y, length):
        weights = torch.stack([r[0].exp(), r[1].exp(), u[0].exp() * (r.sum() / 2).exp()])
        return -(weights[y] / weights.sum()).log()

    def rao_kupper(r, u, y, length):
        theta = u[0].exp().exp()
        p, q = r[0].exp(), r[1].exp()
        first, second = p / (p + theta * q), q / (q + theta * p)
        return -torch.stack([first, second, 1 - first - second])[y].log()

    def length_bias(r, u, y, length):
        return bradley_terry(r + u[0] * length / 100.0, u, y, length)

    return {
        "bradley_terry": (L.BradleyTerry(), bradley_terry),
        "thurstone": (L.Thurstone(), thurstone),
        "davidson": (L.Davidson(), davidson),
        "rao_kupper": (L.RaoKupper(), rao_kupper),
        "length_bias": (L.LengthBias(L.BradleyTerry()), length_bias),
    }[name]


@pytest.mark.parametrize("name", ["bradley_terry", "thurstone", "davidson", "rao_kupper", "length_bias"])
def test_observed_curvature_equals_torch_func(name):
    likelihood, by_hand = _negative_log_likelihood(name)
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    simulation = model.simulate(make_data(rows=30), seed=2)
    density = FeedbackDensity(model, simulation.data.groups())
    u = density.unconstrain(simulation.latents)
    (group,) = density.groups
    rewards = density.gather(simulation.rewards)
    found = curvature(density, rewards, u, CurvatureKind.OBSERVED)
    latents = torch.zeros_like(found.latents)
    for i in range(30):
        joint = torch.cat([rewards[0][i], u])

        def negative(x, i=i):
            return by_hand(x[:2], x[2:], group.outcome[i], group.comparison.lengths[i])

        exact = hessian(negative)(joint)
        torch.testing.assert_close(found.rewards[0][i], exact[:2, :2], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.cross[0][i], exact[:2, 2:], rtol=1e-9, atol=1e-11)
        latents += exact[2:, 2:]
    torch.testing.assert_close(found.latents, latents, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["bradley_terry", "davidson", "plackett_luce_choice", "approval"])
def test_fisher_equals_observed_where_the_likelihood_is_an_exponential_family(name):
    likelihood, design = CASES[name]
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    simulation = model.simulate(make_data(**design), seed=2)
    density = FeedbackDensity(model, simulation.data.groups())
    u = density.unconstrain(simulation.latents)
    rewards = density.gather(simulation.rewards)
    observed = curvature(density, rewards, u, CurvatureKind.OBSERVED)
    fisher = curvature(density, rewards, u, CurvatureKind.FISHER)
    torch.testing.assert_close(observed.rewards[0], fisher.rewards[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(observed.cross[0], fisher.cross[0], rtol=0, atol=1e-10)
    if name != "approval":  # an affine latent there too, but kept apart: one parametrisation check is enough
        torch.testing.assert_close(observed.latents, fisher.latents, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["thurstone", "rao_kupper", "plackett_luce", "ordinal"])
def test_fisher_differs_from_observed_elsewhere_but_agrees_on_average(name):
    likelihood, design = CASES[name]
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    simulation = model.simulate(make_data(**dict(design) | {"rows": 20}), seed=2)
    density = FeedbackDensity(model, simulation.data.groups())
    u = density.unconstrain(simulation.latents)
    rewards = density.gather(simulation.rewards)
    fisher = curvature(density, rewards, u, CurvatureKind.FISHER).rewards[0]
    # The observed Hessian averaged over answers with their probabilities, by enumeration.
    from bayesrm.engines._curvature import observed_curvature
    from bayesrm.likelihoods.base import outcomes_of

    (distribution,) = density.distributions(rewards, u)[0]
    support = outcomes_of(distribution)
    average = torch.zeros_like(fisher)
    spread = 0.0
    for value in support:
        outcome = value.expand(20, *value.shape).clone()
        p = distribution.log_prob(outcome).exp()
        groups = [dataclasses.replace(density.groups[0], outcome=outcome)]
        at_value = observed_curvature(FeedbackDensity(model, groups), rewards, u).rewards[0]
        average += p[:, None, None] * at_value
        spread = max(spread, float((at_value - fisher).abs().max()))
    torch.testing.assert_close(average, fisher, rtol=1e-8, atol=1e-10)
    assert spread > 1e-3


def test_mixtures_fall_back_to_the_fisher_information_and_say_so():
    model = brm.RewardModel(brm.rewards.Linear(), L.LabelNoise(L.BradleyTerry(), flip_rate=0.2))
    data = model.simulate(make_data(rows=80), seed=2).data
    assert brm.fit(model, data).report.curvature == "fisher"
    with pytest.raises(brm.errors.EngineError, match="not log-concave"):
        brm.fit(model, data, inference=brm.Laplace(curvature="observed"))


def test_fisher_by_draws_above_the_enumeration_limit():
    # 7 candidates have 5,040 orders; label noise makes the likelihood not log-concave.
    model = brm.RewardModel(brm.rewards.Linear(), L.LabelNoise(L.PlackettLuce(), flip_rate=0.2))
    data = model.simulate(make_data("ranking", rows=15, k=7), seed=2).data
    first, second = (brm.fit(model, data, inference=brm.Laplace(curvature="fisher"), seed=5) for _ in range(2))
    assert first.report.curvature == "fisher-draws"
    assert torch.equal(first.factor, second.factor)


def test_semidefiniteness_check_has_a_negative_control():
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    simulation = model.simulate(make_data(rows=10), seed=0)
    density = FeedbackDensity(model, simulation.data.groups())
    c = curvature(density, density.gather(simulation.rewards), density.initial_latents, CurvatureKind.OBSERVED)
    assert is_positive_semidefinite(c)
    assert not is_positive_semidefinite(dataclasses.replace(c, latents=0.01 * c.latents))
    assert not is_positive_semidefinite(dataclasses.replace(c, rewards=[-c.rewards[0]]))


# quadrature


def _quadrature_error(num_features, rows, seed):
    """RMS error of Laplace's predictive probabilities against a grid, for Bradley-Terry with 1 or 2 parameters."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * rows, num_features))
    data = brm.Comparisons.from_arrays(
        features, candidates=np.arange(2 * rows).reshape(-1, 2), outcome=np.zeros(rows, int)
    )
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    simulation = model.simulate(data, seed=seed, parameters={"weight": torch.tensor([1.0, -0.5][:num_features])})
    posterior = brm.fit(model, simulation.data)
    new = rng.normal(size=(40, num_features))
    test = brm.Comparisons.from_arrays(new, candidates=np.arange(40).reshape(-1, 2), outcome=np.zeros(20, int))
    laplace = posterior.predict_feedback(test, num_samples=16384).log_prob.exp().numpy()

    difference = features[0::2] - features[1::2]
    sign = 1 - 2 * simulation.data.groups()[0].outcome.numpy()
    axes = []
    for mean, std in zip(posterior.parameters["weight"].numpy(), np.sqrt(np.diag(_covariance(posterior))), strict=True):
        # The trapezoidal rule's error on a bell curve is exp(-2 pi^2 / step^2): rounding at 0.3 standard deviations.
        axes.append(mean + std * np.linspace(-9, 9, 61))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, num_features)
    log_density = -0.5 * (grid**2).sum(1) - np.logaddexp(0.0, -sign * (grid @ difference.T)).sum(1)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    exact = np.array(
        [(weight / (1 + np.exp(-(grid @ (a - b))))).sum() for a, b in zip(new[0::2], new[1::2], strict=True)]
    )
    return np.sqrt(np.mean((laplace - exact) ** 2))


def _covariance(posterior):
    return posterior.predict(candidates=[np.eye(posterior.report.num_parameters)]).covariance[0].numpy()


@pytest.mark.parametrize("num_features", [1, 2])
def test_predictive_error_against_quadrature_is_small_and_falls_like_one_over_n(num_features):
    # Laplace's error is O(1/N): 4x from N to 4N, so the mean over data sets must fall at least 3x.
    small = np.array([_quadrature_error(num_features, 200, seed) for seed in range(6)])
    large = np.array([_quadrature_error(num_features, 800, seed) for seed in range(6)])
    assert small.max() <= 0.005
    assert small.mean() >= 3.0 * large.mean()


def test_evidence_against_quadrature():
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    data = model.simulate(make_data(rows=300, num_features=1), seed=4).data
    report = brm.fit(model, data).report
    density = FeedbackDensity(model, data.groups())
    x = torch.as_tensor(np.asarray(data.features))
    posterior = brm.fit(model, data)
    z0, u0 = posterior.mode.tolist()
    root = torch.linalg.inv(posterior.factor).T.abs().sum(1)
    zs, us = (
        c + float(s) * torch.linspace(-8, 8, 33, dtype=torch.float64) for c, s in zip((z0, u0), root, strict=True)
    )
    values = torch.stack(
        [
            density.log_joint(density.gather(x @ z[None]), u[None]) - 0.5 * z**2 - 0.5 * np.log(2 * np.pi)
            for z in zs
            for u in us
        ]
    )
    exact = torch.logsumexp(values, 0) + torch.log((zs[1] - zs[0]) * (us[1] - us[0]))
    # Laplace's relative error is O(1/N) with N = 300.
    assert report.log_evidence == pytest.approx(float(exact), abs=0.05)


# invariances


def test_mode_is_stationary(simulated):
    model, data = simulated
    posterior = brm.fit(model, data, inference=brm.Laplace(gradient_tolerance=1e-8))
    assert posterior.report.converged
    density = FeedbackDensity(model, data.groups())
    weight = posterior.parameters["weight"].clone().requires_grad_(True)
    u = posterior.mode[4:].clone().requires_grad_(True)
    rewards = torch.as_tensor(np.asarray(data.features)) @ weight
    log_joint = density.log_joint(density.gather(rewards), u) - 0.5 * weight @ weight
    gradients = torch.autograd.grad(log_joint, [weight, u], allow_unused=True)
    assert max(float(g.norm()) for g in gradients if g is not None and g.numel()) < 1e-7


def test_a_row_of_weight_two_is_two_rows_and_of_weight_zero_none():
    base = make_data(rows=6)
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    data = model.simulate(base, seed=0).data
    features, outcome = np.asarray(data.features), data.groups()[0].outcome.numpy()
    candidates = np.arange(12).reshape(6, 2)
    weighted = brm.Comparisons.from_arrays(features, candidates=candidates, outcome=outcome, weight=[2, 1, 1, 1, 1, 0])
    repeated = brm.Comparisons.from_arrays(
        features, candidates=candidates[[0, 0, 1, 2, 3, 4]], outcome=outcome[[0, 0, 1, 2, 3, 4]]
    )
    a, b = brm.fit(model, weighted), brm.fit(model, repeated)
    torch.testing.assert_close(a.mode, b.mode, rtol=0, atol=1e-10)
    torch.testing.assert_close(a.factor, b.factor, rtol=0, atol=1e-10)
    assert a.report.log_evidence == pytest.approx(b.report.log_evidence, abs=1e-10)


def test_swapping_the_candidates_changes_nothing():
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    data = model.simulate(make_data(rows=40), seed=0).data
    outcome = data.groups()[0].outcome.numpy()
    swapped = brm.Comparisons.from_arrays(
        np.asarray(data.features),
        candidates=np.arange(80).reshape(40, 2)[:, ::-1],
        outcome=np.where(outcome == 2, 2, 1 - outcome),
    )
    a, b = brm.fit(model, data), brm.fit(model, swapped)
    torch.testing.assert_close(a.mode, b.mode, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.factor, b.factor, rtol=0, atol=1e-9)


def test_several_groups_share_their_latents():
    pairs, triples = make_data(rows=30), make_data("ranking", rows=20, k=3, seed=5)
    likelihood = {"choice": L.LengthBias(L.BradleyTerry()), "ranking": L.PlackettLuce()}
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    data = model.simulate(brm.Comparisons.concatenate([pairs, triples]), seed=1).data
    posterior = brm.fit(model, data)
    assert posterior.report.converged
    assert list(posterior.latents(5)) == ["choice.length_coefficient"]
    assert len(posterior.predict_feedback(data).groups) == 2


# prior precision, structures


def test_tuned_precision_maximises_the_evidence():
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry(), brm.priors.Gaussian(precision=50.0))
    truth = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry(), brm.priors.Gaussian(precision=0.5))
    data = truth.simulate(make_data(rows=400, num_features=20), seed=1).data
    tuned = brm.fit(model, data, inference=brm.Laplace(prior_precision="marginal_likelihood"))
    assert tuned.report.tuned
    found = tuned.program.prior.precision
    grid = np.exp(np.linspace(-1.5, 1.5, 13)) * found
    evidence = [
        brm.fit(dataclasses.replace(model, prior=brm.priors.Gaussian(p)), data).report.log_evidence for p in grid
    ]
    assert np.argmax(evidence) == 6
    assert tuned.report.log_evidence == pytest.approx(evidence[6], abs=1e-6)


def test_tuning_reports_a_runaway():
    # Feedback that contradicts itself says nothing about the reward: the evidence grows with the precision for ever.
    data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 4, outcome=[0, 1, 0, 1])
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    with pytest.warns(brm.errors.ConvergenceWarning, match="infinity"):
        brm.fit(model, data, inference=brm.Laplace(prior_precision="marginal_likelihood"))


def test_diag_is_exact_for_orthogonal_features_and_reported_when_wrong():
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    orthogonal = brm.Comparisons.from_arrays(
        np.concatenate([np.eye(3), np.zeros((1, 3))]), candidates=[[0, 3], [1, 3], [2, 3]] * 4, outcome=[0, 1, 0] * 4
    )
    exact = brm.fit(model, orthogonal, inference=brm.Laplace(structure="diag")).report.structure_check
    assert exact["variance_ratio"] == pytest.approx(1.0, abs=1e-9)
    rng = np.random.default_rng(0)
    correlated = rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 6))
    data = brm.Comparisons.from_arrays(
        correlated, candidates=np.arange(200).reshape(-1, 2), outcome=rng.integers(2, size=100)
    )
    vague = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry(), brm.priors.Gaussian(precision=0.01))
    wrong = brm.fit(vague, data, inference=brm.Laplace(structure="diag")).report.structure_check
    assert abs(np.log(wrong["variance_ratio"])) > 0.3


def test_settings_are_checked():
    with pytest.raises(brm.errors.ArgumentError, match=r"`structure` is 'magic'; it is one of \['full', 'sketch', "):
        brm.Laplace(structure="magic")
    for setting in ({"precision_groups": "word"}, {"sketch_rank": 0}, {"jacobian_batch_size": True}):
        with pytest.raises(brm.errors.ArgumentError, match=f"`{next(iter(setting))}`"):
            brm.Laplace(**setting)
    with pytest.raises(brm.errors.ArgumentError, match="diagonal in the parameters"):
        brm.Laplace(structure="diag", coordinates="dual")
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    with pytest.raises(brm.errors.EngineError, match="GiB"):
        brm.fit(model, make_data(rows=50), inference=brm.Laplace(memory_gib=1e-7))

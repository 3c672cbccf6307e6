"""Ensembles: every member is the mode it claims to be, and together they spread as they should."""

import numpy as np
import pytest
import scipy.optimize
import torch

import bayesrm as brm
from bayesrm.engines._problem import make_problem
from bayesrm.engines._tangent import Coordinates
from bayesrm.errors import ArgumentError, ConvergenceWarning

from .conftest import make_data

L = brm.likelihoods


def simulated(likelihood, head=None, rows=30, num_features=2, seed=0, **columns):
    model = brm.RewardModel(head or brm.rewards.Linear(standardize=False), likelihood, brm.priors.Gaussian(2.0))
    return model, model.simulate(make_data(rows=rows, num_features=num_features, **columns), seed=seed).data


def perturbations(engine, model, data, seed):
    """The anchors, moves of the latents' prior and weights that a fit draws, from the engine's own generator."""
    coordinates = Coordinates.AUTO if engine.anchored else Coordinates.PRIMAL
    problem = make_problem(
        model, data, seed=seed, progress=False, memory_gib=1.0, find_mode=model.head.is_linear, coordinates=coordinates
    )
    generator = torch.Generator().manual_seed(seed)
    anchors, moves = engine._anchors(problem, generator)
    moves = None if moves is None else moves.numpy()
    return problem, anchors.numpy(), moves, engine._weights(problem, data, generator)


@pytest.mark.parametrize("randomisation", ["both", "anchored", "bootstrap"])
def test_members_equal_problems_solved_one_by_one(randomisation):
    model, data = simulated(L.Davidson())
    engine = brm.Ensemble(num_members=4, randomisation=randomisation, gradient_tolerance=1e-8)
    posterior = brm.fit(model, data, inference=engine, seed=5)
    _, anchors, moves, weights = perturbations(engine, model, data, seed=5)
    assert (np.abs(anchors).max() > 0) == (randomisation != "bootstrap")
    assert (weights is None) == (randomisation == "anchored")
    scale = 2.0**-0.5
    (group,) = data.groups()
    features = np.asarray(data.features)[group.items.numpy()]
    difference, outcome = features[:, 0] - features[:, 1], group.outcome.numpy()
    for m in range(4):
        weight = np.ones(30) if weights is None else weights[0][m].numpy()
        move = 0.0 if moves is None else moves[m, 0]

        def negative(x, weight=weight, m=m, move=move):
            half = 0.5 * (difference @ x[:2]) * scale
            logits = np.stack([half, -half, np.full(30, x[2])], axis=1)
            log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            # log nu ~ N(log 0.5, 1) is LogNormal's density with the Jacobian.
            log_prior = -0.5 * ((x[:2] - anchors[m]) ** 2).sum() - 0.5 * (x[2] - np.log(0.5) - move) ** 2
            return -(weight * log_p[np.arange(30), outcome]).sum() - log_prior

        alone = scipy.optimize.minimize(negative, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(posterior.z[m].numpy(), alone.x[:2], atol=1e-5)
        np.testing.assert_allclose(posterior.unconstrained_latents[m].numpy(), alone.x[2:], atol=1e-5)


def test_latents_with_a_normal_prior_are_anchored():
    """A normal prior is moved to a draw of itself."""
    model, data = simulated(L.LengthBias(L.BradleyTerry(), scale=0.5))
    engine = brm.Ensemble(num_members=4000, randomisation="anchored")
    _, anchors, moves, _ = perturbations(engine, model, data, seed=0)
    moved = moves[:, 0]
    # 4000 draws: a standard deviation is known to 1.1%, and a correlation to 0.016.
    assert moved.std() == pytest.approx(0.5, rel=0.05)
    assert anchors.std(0) == pytest.approx(np.ones(2), rel=0.05)
    assert abs(np.corrcoef(moved, anchors[:, 0])[0, 1]) < 0.07


# Some members of a rate that nothing informs end where its prior is flat, slowly.
@pytest.mark.filterwarnings("ignore::bayesrm.errors.ConvergenceWarning")
def test_latents_whose_prior_has_linear_tails_stay_finite():
    """The logit of a Beta rate: a random linear term in it would be unbounded for some members."""
    model, data = simulated(L.LabelNoise(L.BradleyTerry()), rows=8)
    posterior = brm.fit(model, data, inference=brm.Ensemble(num_members=200, randomisation="anchored"))
    assert posterior.unconstrained_latents.abs().max() < 30
    assert posterior.z.abs().max() < 6


def test_weights_are_exponential_and_shared_by_the_rows_of_a_prompt():
    features = np.random.default_rng(0).normal(size=(160, 2))
    pairs = np.arange(160).reshape(80, 2)
    weight = np.linspace(0.5, 2.0, 80)
    prompts = np.repeat(np.arange(20), 8)
    data = brm.Comparisons.from_arrays(
        features, candidates=pairs, outcome=np.zeros(80, int), prompt_index=prompts, weight=weight
    )
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    engine = brm.Ensemble(num_members=2000)
    _, _, _, (weights,) = perturbations(engine, model, data, seed=0)
    factor = weights.numpy() / weight
    np.testing.assert_allclose(factor, np.repeat(factor[:, ::4], 4, axis=1))
    assert factor.mean() == pytest.approx(1.0, abs=0.05)
    assert (factor > 1.0).mean() == pytest.approx(np.exp(-1.0), abs=0.03)


def spread(posterior):
    return torch.cat([posterior.z, posterior.unconstrained_latents], dim=1).std(0)


def test_with_many_comparisons_members_spread_like_the_posterior():
    model, data = simulated(L.Davidson(), rows=1500)
    precision = make_problem(model, data, seed=0, progress=False, memory_gib=1.0).precision()
    laplace = torch.cholesky_inverse(torch.linalg.cholesky(precision)).diagonal().sqrt()
    both = spread(brm.fit(model, data, inference=brm.Ensemble(num_members=400)))
    # A standard deviation of 400 draws has a relative error of 0.035; weights of rows add O(1 / rows).
    torch.testing.assert_close(both / laplace, torch.ones_like(both), rtol=0, atol=0.15)
    anchored = spread(brm.fit(model, data, inference=brm.Ensemble(num_members=400, randomisation="anchored")))
    assert (anchored / laplace).max() < 0.5


def test_where_no_data_are_anchors_keep_the_prior_and_bootstrap_is_certain():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(60, 2)), np.zeros((60, 1))], axis=1)
    pairs = np.arange(60).reshape(30, 2)
    data = brm.Comparisons.from_arrays(features, candidates=pairs, outcome=np.arange(30) % 2)
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry(), brm.priors.Gaussian(0.25))
    unseen = [np.array([[0.0, 0.0, 1.0]])]
    both = brm.fit(model, data, inference=brm.Ensemble(num_members=500)).predict(candidates=unseen)
    assert float(both.std) == pytest.approx(2.0, rel=0.15)
    engine = brm.Ensemble(num_members=500, randomisation="bootstrap")
    assert float(brm.fit(model, data, inference=engine).predict(candidates=unseen).std) < 1e-3


def test_dual_coordinates_spread_like_primal_ones():
    """More features than comparisons: members live in the row space, and the rest of the prior is added."""
    model, data = simulated(L.BradleyTerry(), rows=4, num_features=9)
    posterior = brm.fit(model, data, inference=brm.Ensemble(num_members=3000, randomisation="anchored"))
    assert posterior.z.shape == (3000, 4)
    problem = make_problem(
        model, data, seed=0, progress=False, memory_gib=1.0, coordinates=Coordinates.PRIMAL
    )  # fmt: skip
    # Anchors in all nine coordinates, solved by the same minimiser.
    generator = torch.Generator().manual_seed(1)
    anchors = torch.randn(3000, 9, generator=generator, dtype=torch.float64)

    def objective(z, members):
        return 0.5 * (z - anchors[members]).square().sum(1) - problem.density.log_joints(problem.rewards(z), z[:, :0])

    from bayesrm.engines._batched_lbfgs import minimise

    z = minimise(objective, anchors.clone(), tolerance=1e-6, max_iterations=500).x
    new = np.random.default_rng(2).normal(size=(3, 9))
    rewards = z * problem.whitening.scale @ torch.from_numpy(new).T
    belief = posterior.predict(candidates=[new])
    # Two sets of 3000 draws each.
    error = 4.5 * rewards.std(0) * (2 / 3000) ** 0.5
    assert ((belief.mean[0] - rewards.mean(0)).abs() < error).all()
    torch.testing.assert_close(belief.covariance[0], rewards.T.cov(), rtol=0, atol=0.12 * float(rewards.var(0).max()))


def test_network_members_are_modes_of_their_own_problems():
    model, data = simulated(L.BradleyTerry(), brm.rewards.MLP(hidden=(3,)), rows=40)
    engine = brm.Ensemble(num_members=6, gradient_tolerance=1e-4)
    posterior = brm.fit(model, data, inference=engine, seed=2)
    assert posterior.report.converged
    problem, anchors, _, weights = perturbations(engine, model, data, seed=2)
    shapes = model.head.parameter_shapes(2)
    (group,) = data.groups()
    for m in range(6):
        z = posterior.z[m].clone().requires_grad_(True)
        parts = (z * problem.whitening.scale).split([int(np.prod(s)) for s in shapes.values()])
        parameters = {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        rewards = model.head.apply(parameters, problem.features)[group.items]
        log_p = torch.nn.functional.logsigmoid((rewards[:, 0] - rewards[:, 1]) * (1 - 2 * group.outcome))
        value = (weights[0][m] * log_p).sum() - 0.5 * (z - torch.from_numpy(anchors[m])).square().sum()
        (slope,) = torch.autograd.grad(value, [z])
        assert slope.norm() <= 1.01e-4
    assert (posterior.z[0] - posterior.z[1]).norm() > 0.1


def test_members_that_stop_early_are_told():
    model, data = simulated(L.BradleyTerry(), brm.rewards.MLP(hidden=(3,)), rows=40)
    with pytest.warns(ConvergenceWarning, match=r"5 of 5 members stopped after 2 iterations"):
        posterior = brm.fit(model, data, inference=brm.Ensemble(num_members=5, max_iterations=2))
    assert not posterior.report.converged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_members": 1}, "disagreement needs at least 2"),
        ({"randomisation": "dropout"}, "`randomisation`"),
        ({"gradient_tolerance": 0.0}, "`gradient_tolerance`"),
        ({"max_iterations": 0}, "`max_iterations`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        brm.Ensemble(**settings)


def test_a_tournament_is_one_prompt_and_members_still_spread_like_the_posterior():
    """One weight for all rows would move members along one direction."""
    rng = np.random.default_rng(0)
    items = np.eye(6)
    pairs = np.array([(i, j) for i in range(6) for j in range(i)] * 20)
    strength = rng.normal(size=6)
    outcome = (rng.random(len(pairs)) > 1 / (1 + np.exp(strength[pairs[:, 1]] - strength[pairs[:, 0]]))).astype(int)
    data = brm.Comparisons.from_arrays(items, candidates=pairs, outcome=outcome)
    assert data.num_prompts == 1
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), L.BradleyTerry())
    laplace = brm.fit(model, data).predict(candidates=[items]).differences().std[0]
    for randomisation in ("bootstrap", "both"):
        engine = brm.Ensemble(num_members=400, randomisation=randomisation)
        found = brm.fit(model, data, inference=engine).predict(candidates=[items]).differences().std[0]
        # A standard deviation of 400 draws is known to 3.5%, and 300 rows are many but not infinitely many.
        torch.testing.assert_close(found[1:], laplace[1:], rtol=0.2, atol=0)

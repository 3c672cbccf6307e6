"""The compiled log joint: value and gradient equal torch's for every likelihood, whichever way it is differentiated."""

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.backend import convert, dist, ops
from bayesrm.engines._jax_density import arrays_of, density_of, double_precision
from bayesrm.engines._problem import make_problem
from bayesrm.errors import EngineError

from .conftest import make_data

L = brm.likelihoods


def problem_of(model, data):
    return make_problem(model, data, seed=0, progress=False, memory_gib=1.0, find_mode=False)


def both(problem, x):
    """(value, gradient) under JAX, and under torch."""
    import jax

    with double_precision():
        density, _ = density_of(problem)
        like = jax.numpy.zeros(0)
        found = jax.jit(jax.value_and_grad(density.__call__))(convert(x, like), arrays_of(problem).tree())
        found = float(found[0]), np.asarray(found[1])
    point = x.clone().requires_grad_(True)
    value = problem.log_joints(point[None])[0]
    (gradient,) = torch.autograd.grad(value, [point])
    return found, (float(value.detach()), gradient.numpy())


def uses_contrasts(problem):
    with double_precision():
        return density_of(problem)[0].contrasts


def check(problem, *, scale):
    x = scale * torch.randn(problem.dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (value, gradient), (expected, slope) = both(problem, x)
    assert value == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(gradient, slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_equals_torch_for_every_likelihood(simulated, scale):
    check(problem_of(*simulated), scale=scale)


def test_rows_of_any_weight_and_several_kinds():
    rng = np.random.default_rng(0)
    weight = rng.choice([0.0, 0.5, 1.0, 2.0], size=40)
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    data = model.simulate(make_data(rows=40, weight=weight), seed=0).data
    problem = problem_of(model, data)
    check(problem, scale=1.0)
    # Pairs by contrasts, and the same pairs beside a ranking, where rewards of items are needed.
    assert uses_contrasts(problem)
    mixed = brm.Comparisons.concatenate([data, make_data("rating", rows=10, k=1, num_levels=3, seed=1)])
    several = brm.RewardModel(brm.rewards.Linear(), {"choice": L.Davidson(), "rating": L.Ordinal()})
    problem = problem_of(several, several.simulate(mixed, seed=1).data)
    check(problem, scale=0.5)
    assert not uses_contrasts(problem)


def test_items_that_recur_are_not_multiplied_out():
    features = np.random.default_rng(0).normal(size=(5, 3))
    pairs = [[i, j] for i in range(5) for j in range(i)]
    data = brm.Comparisons.from_arrays(features, candidates=pairs, outcome=[0] * 10)
    problem = problem_of(brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry()), data)
    assert not uses_contrasts(problem)
    check(problem, scale=1.0)


def test_a_head_that_is_not_linear(simulated):
    model, data = simulated
    check(problem_of(brm.RewardModel(brm.rewards.MLP(hidden=(3,)), model.likelihood), data), scale=0.5)


def test_a_likelihood_whose_rows_see_each_other_is_refused():
    def centred(rewards, comparison):
        difference = rewards[:, 0] - rewards[:, 1]
        return dist.Bernoulli(logits=difference - ops.sum(difference) / comparison.num_rows)

    data = make_data(rows=6, num_features=2)
    with pytest.raises(EngineError, match="each row depending on its own rewards"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), centred), data, inference=brm.NUTS(num_chains=1))

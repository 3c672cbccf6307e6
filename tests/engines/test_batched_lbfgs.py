"""Many minimisations at once against closed forms, scipy, and the same problems one by one."""

import numpy as np
import pytest
import scipy.optimize
import torch

from bayesrm.engines._batched_lbfgs import minimise


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_quadratics_end_at_their_closed_form():
    # Condition numbers from 1 to 10^4, so that members end after very different numbers of steps.
    basis = torch.linalg.qr(draws(6, 8, 8))[0]
    spectrum = torch.stack([torch.logspace(0, p, 8, dtype=torch.float64) for p in torch.linspace(0, 4, 6)])
    matrix = basis @ torch.diag_embed(spectrum) @ basis.transpose(1, 2)
    center = draws(6, 8, seed=1)

    def objective(x, which):
        moved = x - center[which]
        return 0.5 * torch.einsum("mi,mij,mj->m", moved, matrix[which], moved)

    found = minimise(objective, torch.zeros(6, 8, dtype=torch.float64), tolerance=1e-8, max_iterations=500)
    assert found.gradient_norm.max() <= 1e-8
    # |x - center| <= |gradient| / smallest eigenvalue, which is 1.
    assert (found.x - center).norm(dim=1).max() <= 1e-8


def rosenbrock(x, which):
    return (100.0 * (x[:, 1:] - x[:, :-1].square()).square() + (1.0 - x[:, :-1]).square()).sum(1)


def test_a_curved_valley_as_scipy():
    start = 0.5 * draws(5, 4)
    found = minimise(rosenbrock, start, tolerance=1e-8, max_iterations=1000)
    assert found.gradient_norm.max() <= 1e-8
    for x, begin in zip(found.x.numpy(), start.numpy(), strict=True):
        other = scipy.optimize.minimize(
            scipy.optimize.rosen, begin, jac=scipy.optimize.rosen_der, method="BFGS", options={"gtol": 1e-10}
        )
        np.testing.assert_allclose(x, other.x, atol=1e-6)


def test_a_problem_ends_where_it_would_alone():
    start = 0.5 * draws(4, 3)
    settings = {"tolerance": 1e-9, "max_iterations": 1000}
    every = minimise(rosenbrock, start, **settings)
    for i in range(4):
        alone = minimise(rosenbrock, start[i : i + 1], **settings)
        # Gradient norms of 1e-9 and a Hessian whose smallest eigenvalue is above 0.1 leave 1e-8 between them.
        torch.testing.assert_close(alone.x[0], every.x[i], rtol=0, atol=2e-8)


def test_a_problem_that_cannot_move_is_left_and_reported():
    def objective(x, which):
        # The second is a quadratic that is infinite wherever it is not started.
        value = (x - 3.0).square().sum(1)
        return torch.where((which == 1) & (x != 0).any(1), torch.inf, value)

    found = minimise(objective, torch.zeros(2, 2, dtype=torch.float64), tolerance=1e-8, max_iterations=100)
    torch.testing.assert_close(found.x[0], torch.full((2,), 3.0, dtype=torch.float64))
    assert torch.equal(found.x[1], torch.zeros(2, dtype=torch.float64))
    assert found.gradient_norm[1] == pytest.approx(np.sqrt(72.0))
    assert found.iterations < 100


def test_too_few_iterations_show_in_the_gradient():
    found = minimise(rosenbrock, torch.zeros(2, 4, dtype=torch.float64), tolerance=1e-8, max_iterations=3)
    assert found.iterations == 3
    assert found.gradient_norm.min() > 1e-3


def test_only_problems_that_search_are_evaluated():
    asked = []

    def objective(x, which):
        asked.append(which.tolist())
        # The first starts at its minimum; the second is a quadratic that a unit step after the first solves.
        return torch.where(which == 0, 1.0, 50.0) * x.square().sum(1)

    start = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    found = minimise(objective, start, tolerance=1e-8, max_iterations=100)
    assert found.gradient_norm.max() <= 1e-8
    assert asked[0] == [0, 1]
    assert all(which == [1] for which in asked[1:])

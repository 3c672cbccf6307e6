"""Far apart candidates: exact log probabilities and finite derivatives where plain probabilities overflow."""

import jax
import mpmath
import numpy as np
import pytest
import torch

from bayesrm.likelihoods import BradleyTerry, LabelNoise

from .cases import CASES, Case, to_jax

EPS = 2.0**-53
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
gaps = pytest.mark.parametrize("gap", [30.0, 700.0])


def apart(case, gap):
    """Rewards that spread evenly over `gap`, upwards in one row and downwards in the other."""
    if case.num_candidates == 1:
        return torch.tensor([[gap], [-gap]], dtype=torch.float64)
    up = torch.linspace(0.0, gap, case.num_candidates, dtype=torch.float64)
    return torch.stack([up, up.flip(0)])


def exact_log_table(case, rewards, comparison, latents):
    return [[mpmath.log(p) for p in case.reference(rewards[i], comparison, latents, i)] for i in range(len(rewards))]


@gaps
@each
def test_log_probabilities(case, gap):
    rewards, comparison, latents = apart(case, gap), case.comparison(2), case.latents(seed=5)
    # 1 - p and differences of distribution functions cancel to exp(-gap): twice that many digits.
    with mpmath.workdps(40 + int(gap)):
        exact = np.array(exact_log_table(case, rewards, comparison, latents), dtype=float)
    found = case.log_table(rewards, comparison, latents).numpy()
    with jax.enable_x64(True):
        found_jax = np.asarray(case.log_table(to_jax(rewards), to_jax(comparison), to_jax(latents)))
    # A likely outcome's log probability is a difference of numbers as large as the gap: sixteen roundings of those.
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=16 * EPS * gap)
    np.testing.assert_allclose(found_jax, exact, rtol=1e-10, atol=16 * EPS * gap)


@pytest.mark.parametrize(
    ("case", "gap"),
    [pytest.param(c, gap, id=f"{c.name}-{gap}") for c in CASES for gap in (30.0, 700.0)],
)
def test_derivatives_are_finite(case, gap):
    rewards, comparison, latents = apart(case, gap), case.comparison(2), case.latents(seed=5)
    leaves = [rewards, *latents.values()]

    def every_log_prob(rewards, *values):
        return case.log_table(rewards, comparison, dict(zip(latents, values, strict=True))).reshape(-1)

    leaves = [leaf.clone().requires_grad_(True) for leaf in leaves]
    log_probs = every_log_prob(*leaves)
    for log_prob in log_probs:
        gradient = torch.autograd.grad(log_prob, leaves, create_graph=True, retain_graph=True, allow_unused=True)
        gradient = torch.cat([g.reshape(-1) for g in gradient if g is not None])
        assert torch.isfinite(gradient).all()
        # Finite Hessian-vector product for a dense vector: no column of the Hessian is infinite or NaN.
        weights = torch.linspace(1.0, 2.0, len(gradient), dtype=gradient.dtype)
        hessian = torch.autograd.grad((weights * gradient).sum(), leaves, retain_graph=True, allow_unused=True)
        assert all(torch.isfinite(h).all() for h in hessian if h is not None)


@each
def test_gradients_equal_the_reference(case):
    rewards, comparison, latents = apart(case, 30.0), case.comparison(2), case.latents(seed=5)
    leaf = rewards.clone().requires_grad_(True)
    table = case.log_table(leaf, comparison, latents)
    found = torch.stack([torch.autograd.grad(x, leaf, retain_graph=True)[0].sum(0) for x in table.reshape(-1)])
    found = found.reshape(*table.shape, case.num_candidates)
    # Central differences with step 1e-20 in 90 digits err by 1e-40.
    with mpmath.workdps(90):
        step = mpmath.mpf(10) ** -20
        for k in range(case.num_candidates):
            sides = []
            for h in (step, -step):
                moved = [[mpmath.mpf(float(r)) + (h if i == k else 0) for i, r in enumerate(row)] for row in rewards]
                sides.append(exact_log_table(case, moved, comparison, latents))
            for row in range(2):
                exact = [float((a - b) / (2 * step)) for a, b in zip(sides[0][row], sides[1][row], strict=True)]
                np.testing.assert_allclose(found[row, :, k], exact, rtol=1e-10, atol=64 * EPS)


# Compiling second derivatives takes seconds a likelihood: a few in every run, all in the slow one.
_QUICK = ("thurstone", "rao_kupper", "plackett_luce-partial", "ordinal-3", "label_noise-learnt(bradley_terry)")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.name in _QUICK else pytest.mark.slow) for c in CASES],
)
def test_derivatives_under_jax_are_finite(case):
    rewards, comparison, latents = apart(case, 700.0), case.comparison(2), case.latents(seed=5)
    with jax.enable_x64(True):
        comparison, latents = to_jax(comparison), to_jax(latents)

        def total(rewards):
            return case.log_table(rewards, comparison, latents).sum()

        rewards = to_jax(rewards)
        gradient, product = jax.jvp(jax.grad(total), (rewards,), (1.0 + 0.0 * rewards.cumsum(1),))
        assert bool(np.isfinite(gradient).all())
        assert bool(np.isfinite(product).all())


def test_derivatives_are_finite_without_any_noise():
    case = Case("noiseless", LabelNoise(BradleyTerry(), flip_rate=0.0))
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = torch.autograd.functional.hessian(lambda r: case.log_table(r, case.comparison(1), {})[0, 0], rewards)
    p = torch.sigmoid(torch.tensor(1.0).double())
    torch.testing.assert_close(found[0, 0, 0, 0], -p * (1 - p))

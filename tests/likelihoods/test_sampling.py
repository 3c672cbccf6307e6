"""Draws follow the probabilities, under Pyro and under NumPyro."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
import torch

from bayesrm.backend import following, seeded
from bayesrm.data import Comparison
from bayesrm.likelihoods import BradleyTerry, LabelNoise, PlackettLuce, outcome

from .cases import CASES, Case, to_jax

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DRAWS, ROWS = 4000, 2


def p_value(draws, outcomes, probabilities):
    """p-value of the chi-squared test that `draws` (draws, rows, ...) have `probabilities` (rows, outcomes)."""
    draws = np.asarray(draws).reshape(len(draws), probabilities.shape[0], -1)
    codes = np.asarray(outcomes).reshape(len(outcomes), -1)
    total, freedom = 0.0, 0
    for row in range(draws.shape[1]):
        seen = (draws[:, row, None] == codes).all(-1)
        assert seen.any(1).all()
        counts, expected = seen.sum(0), len(draws) * probabilities[row]
        # Cells with fewer than five expected draws are pooled, as the chi-squared approximation asks.
        rare = expected < 5
        if rare.any():
            counts = np.append(counts[~rare], counts[rare].sum())
            expected = np.append(expected[~rare], expected[rare].sum())
        total += ((counts - expected) ** 2 / expected).sum()
        freedom += len(counts) - 1
    return scipy.stats.chi2.sf(total, freedom)


@each
def test_frequencies_under_pyro(case):
    rewards, comparison, latents = case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=6)
    probabilities = case.log_table(rewards, comparison, latents).exp().numpy()
    with seeded(0):
        draws = case.distribution(rewards, comparison, latents).sample((DRAWS,))
    assert p_value(draws, case.outcomes(), probabilities) > 1e-3


@each
def test_frequencies_under_numpyro(case):
    rewards, comparison, latents = case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=6)
    probabilities = case.log_table(rewards, comparison, latents).exp().numpy()
    with jax.enable_x64(True):
        d = case.distribution(to_jax(rewards), to_jax(comparison), to_jax(latents))
        draws = np.asarray(d.sample(jax.random.PRNGKey(1), (DRAWS,)))
    assert p_value(draws, case.outcomes(), probabilities) > 1e-3


def test_the_test_of_frequencies_can_fail():
    case = CASES[0]
    rewards, comparison = case.rewards(ROWS), case.comparison(ROWS)
    probabilities = case.log_table(rewards, comparison, {}).exp().numpy()
    with seeded(0):
        draws = case.distribution(rewards + torch.tensor([0.3, 0.0]), comparison, {}).sample((DRAWS,))
    assert p_value(draws, case.outcomes(), probabilities) < 1e-3


def test_uniform_answers_where_rankings_are_too_many_to_list():
    # 7!/2! = 2,520 partial rankings; nearly half of the draws are uniform over them.
    case = Case("pl", LabelNoise(PlackettLuce(), flip_rate=0.49), "ranking", 7, depth=5)
    rewards, comparison = 2 * case.rewards(1), case.comparison(1)
    with seeded(3):
        draws = case.distribution(rewards, comparison, {}).sample((DRAWS,))
    assert draws.shape == (DRAWS, 1, 5)
    assert all(len(set(order)) == 5 for order in draws[:, 0].tolist())
    leads = 0.51 * torch.softmax(rewards, 1) + 0.49 / 7
    assert p_value(draws[..., 0], torch.arange(7), leads.numpy()) > 1e-3


def test_draws_from_an_enumerated_support():
    log_p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]).double().log()

    def table(value):
        return log_p.gather(1, value[:, None])[:, 0]

    with following(log_p), seeded(0):
        d = outcome(log_prob=table, support=torch.arange(3), batch_shape=(2,), like=log_p)
        draws = d.sample((DRAWS,))
    assert p_value(draws, torch.arange(3), log_p.exp().numpy()) > 1e-3


def test_draws_leave_no_trace_of_float32():
    # In float32 a uniform number is 0 or 1 once in 2^24; in float64 the Gumbel noise stays finite.
    rewards = torch.zeros(2000, 4, dtype=torch.float64)
    comparison = Comparison(kind="ranking", num_rows=2000, num_candidates=4, depth=4)
    with seeded(0):
        orders = PlackettLuce()(rewards, comparison).sample((50,))
    assert torch.equal(orders.sort(-1).values, torch.arange(4).expand(50, 2000, 4))


def test_a_seed_fixes_the_draws():
    case = dataclasses.replace(CASES[0], likelihood=LabelNoise(BradleyTerry(), flip_rate=0.3))
    d = case.distribution(case.rewards(50), case.comparison(50), {})
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed):
            drawn.append(d.sample())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])

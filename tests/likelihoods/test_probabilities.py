"""Probabilities of every likelihood: normalised, equal to the textbook, the same in both libraries and in any order."""

import dataclasses

import jax
import mpmath
import numpy as np
import pytest
import torch

from bayesrm.likelihoods import BradleyTerry, LabelNoise, PlackettLuce
from bayesrm.likelihoods.base import outcomes_of

from .cases import CASES, Case, to_jax

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ROWS = 2


@each
def test_probabilities_sum_to_one(case):
    table = case.log_table(3 * case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=1))
    torch.testing.assert_close(torch.logsumexp(table, 1), torch.zeros(ROWS).double(), rtol=0, atol=1e-12)


@each
def test_equals_the_textbook_formula(case):
    rewards, comparison, latents = case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=2)
    table = case.log_table(rewards, comparison, latents)
    with mpmath.workdps(40):
        exact = [
            [float(mpmath.log(p)) for p in case.reference(rewards[i], comparison, latents, i)] for i in range(ROWS)
        ]
    # Rewards of size 1 and at most ten operations, each rounding at 1e-16.
    np.testing.assert_allclose(table, exact, rtol=1e-12, atol=1e-13)


@each
def test_lists_its_outcomes(case):
    d = case.distribution(case.rewards(ROWS), case.comparison(ROWS), case.latents())
    assert outcomes_of(d).tolist() == case.outcomes().tolist()


@each
def test_torch_and_jax_agree(case):
    rewards, comparison, latents = 2 * case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=3)
    expected = case.log_table(rewards, comparison, latents)
    with jax.enable_x64(True):
        found = np.asarray(case.log_table(to_jax(rewards), to_jax(comparison), to_jax(latents)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])
def test_lists_its_outcomes_under_jax(case):
    with jax.enable_x64(True):
        d = case.distribution(to_jax(case.rewards(1)), to_jax(case.comparison(1)), to_jax(case.latents()))
        assert np.asarray(outcomes_of(d)).tolist() == case.outcomes().tolist()


@pytest.mark.parametrize("case", [c for c in CASES if c.num_candidates > 1], ids=lambda case: case.name)
def test_the_order_of_candidates_does_not_matter(case):
    rewards, comparison, latents = case.rewards(ROWS), case.comparison(ROWS), case.latents(seed=4)
    before = case.log_table(rewards, comparison, latents)
    listed = case.outcomes().tolist()
    # A transposition and a rotation generate every order.
    for order in {(1, 0, 2, 3)[: case.num_candidates], (*range(1, case.num_candidates), 0)}:
        moved = list(order)
        margin = None if comparison.margin is None else -comparison.margin
        changed = dataclasses.replace(comparison, lengths=comparison.lengths[:, moved], margin=margin)
        after = case.log_table(rewards[:, moved], changed, latents)
        # Candidate i goes to place `place[i]`; a tie (index K) stays a tie.
        place = torch.tensor([*(moved.index(i) for i in range(case.num_candidates)), case.num_candidates])
        columns = [listed.index(y) for y in place[case.outcomes()].tolist()]
        assert columns != list(range(len(listed)))
        torch.testing.assert_close(after[:, columns], before, rtol=1e-12, atol=1e-13)


def test_hand_computed_rao_kupper():
    # Strengths 3 and 1, theta = 2: 3/5, 1/7 and (4 - 1) 3 / (5 * 7).
    case = next(c for c in CASES if c.name == "rao_kupper")
    latents = {"tie_threshold": torch.tensor(2.0).double().log()}
    rewards = torch.tensor([[3.0, 1.0]]).double().log()
    table = case.log_table(rewards, case.comparison(1), latents).exp()[0]
    np.testing.assert_allclose(table, [3 / 5, 1 / 7, 9 / 35], rtol=1e-14)


def test_hand_computed_davidson():
    # Strengths 4 and 1, nu = 0.5: 4, 1 and 0.5 * 2 out of 6.
    case = next(c for c in CASES if c.name == "davidson")
    rewards = torch.tensor([[4.0, 1.0]]).double().log()
    table = case.log_table(rewards, case.comparison(1), {"tie_weight": torch.tensor(0.5).double()}).exp()[0]
    np.testing.assert_allclose(table, [4 / 6, 1 / 6, 1 / 6], rtol=1e-14)


def test_margin_loss_of_a_chosen_response():
    # Llama 2 (Touvron et al., 2307.09288, eq. 2): -log sigmoid(r_chosen - r_rejected - margin).
    case = Case("bt", CASES[0].likelihood, margin=True)
    rewards, comparison = case.rewards(5), case.comparison(5)
    found = -case.distribution(rewards, comparison, {}).log_prob(torch.zeros(5, dtype=torch.long))
    exact = np.log1p(np.exp(-(rewards[:, 0] - rewards[:, 1] - comparison.margin).numpy()))
    np.testing.assert_allclose(found, exact, rtol=1e-13)


def test_plackett_luce_of_two_is_bradley_terry():
    pair = Case("pl", PlackettLuce(temperature=0.7))
    bt = next(c for c in CASES if c.name == "bradley_terry-margin-temperature")
    comparison = Case("pair", None).comparison(4)
    rewards = pair.rewards(4)
    torch.testing.assert_close(
        pair.log_table(rewards, comparison, {}), bt.log_table(rewards, comparison, {}), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize(("depth", "count"), [(7, 5040), (5, 2520)])
def test_rankings_too_many_to_enumerate_still_sum_to_one(depth, count):
    case = Case("pl", PlackettLuce(), "ranking", 7, depth=depth)
    orders = case.outcomes()
    assert len(orders) == count
    d = case.distribution(case.rewards(1).expand(count, -1), case.comparison(count), {})
    assert outcomes_of(d) is None
    total = torch.logsumexp(d.log_prob(orders), 0)
    assert abs(float(total)) < 1e-11


def test_a_known_flip_rate_keeps_its_digits():
    noisy = LabelNoise(BradleyTerry(), flip_rate=0.2)
    case = Case("noisy", noisy)
    # Far apart, the unlikely answer is a flip: log 0.2, and not that of the float32 next to 0.2.
    found = case.log_table(torch.tensor([[700.0, 0.0]]).double(), case.comparison(1), {})
    np.testing.assert_allclose(found, np.log([[0.8, 0.2]]), rtol=1e-14)


@pytest.mark.parametrize("depth", [2, 3])
def test_rankings_take_outcomes_with_sample_dimensions(depth):
    case = Case("pl", PlackettLuce(), "ranking", 3, depth=depth)
    d = case.distribution(case.rewards(2), case.comparison(2), {})
    draws = d.sample((5,))
    found = d.log_prob(draws)
    torch.testing.assert_close(found, torch.stack([d.log_prob(y) for y in draws]), rtol=1e-14, atol=0)

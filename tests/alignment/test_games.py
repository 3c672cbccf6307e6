"""Preference games against closed forms, brute force, numerical maximisation and the bounds of the papers."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from bayesrm.alignment import games
from bayesrm.errors import ArgumentError, EngineError

UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def random_game(n, seed, batch=(), scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    s = scale * torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    reference = torch.softmax(torch.randn(*batch, n, generator=generator, dtype=torch.float64), -1)
    return torch.sigmoid(s - s.transpose(-1, -2)), reference


def cycle(a, b, c):
    """0 beats 1 by a, 1 beats 2 by b, 2 beats 0 by c; its Nash policy is (b, c, a) / (a + b + c)."""
    m = torch.tensor([[0.0, a, -c], [-a, 0.0, b], [c, -b, 0.0]], dtype=torch.float64)
    return 0.5 + m


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def value(matrix, pi, other, reference, tau):
    return float(pi @ matrix @ other - tau * kl(pi, reference) + tau * kl(other, reference))


class TestNash:
    def test_without_regularisation_it_is_von_neumanns(self):
        found = games.nash_policy(cycle(0.4, 0.3, 0.1), UNIFORM, regularisation=0.0)
        torch.testing.assert_close(found, torch.tensor([0.375, 0.125, 0.5]).double(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [2, 5, 12])
    def test_without_regularisation_it_solves_the_dual_programme(self, n):
        matrix, reference = random_game(n, seed=n)
        found = games.nash_policy(matrix, reference, regularisation=0.0)
        assert float(games.exploitability(matrix, found, reference, regularisation=0.0)) < 1e-12
        # The first player's programme: the largest win rate against every response, in its own form.
        result = optimize.linprog(
            np.r_[np.zeros(n), -1.0],
            A_ub=np.c_[-matrix.numpy().T, np.ones(n)],
            b_ub=np.zeros(n),
            A_eq=np.r_[np.ones(n), 0.0][None],
            b_eq=[1.0],
            bounds=[(0.0, None)] * n + [(None, None)],
        )
        np.testing.assert_allclose(found, result.x[:n], atol=1e-7)

    @pytest.mark.parametrize("tau", [1.0, 0.1, 0.05])
    def test_it_is_the_one_fixed_point(self, tau):
        matrix, reference = random_game(6, seed=3)
        found = games.nash_policy(matrix, reference, regularisation=tau)
        # By small steps of the definition, pi <- pi^(1 - h) (p0 exp(P pi / tau))^h, from another start.
        log_policy = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        step = min(0.5, 3.0 * tau**2)
        for _ in range(int(60 / step)):
            gain = matrix @ torch.softmax(log_policy, 0)
            log_policy = torch.log_softmax((1 - step) * log_policy + step * (reference.log() + gain / tau), 0)
        torch.testing.assert_close(found, log_policy.exp(), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("tau", [1e-1, 1e-3, 1e-5])
    def test_small_regularisation_leads_to_the_unregularised_game(self, tau):
        matrix = cycle(0.4, 0.3, 0.1)
        reference = torch.tensor([0.7, 0.2, 0.1])
        found = games.nash_policy(matrix, reference, regularisation=tau)
        assert float(games.exploitability(matrix, found, reference, regularisation=tau)) < 1e-12
        # P pi = 1/2 + tau log(pi / p0) + constant: to first order in tau the gap is below tau times that.
        limit = games.nash_policy(matrix, reference, regularisation=0.0)
        assert float((found - limit).abs().max()) < 40.0 * tau

    def test_transitive_preferences_without_regularisation_take_the_best(self):
        r = torch.tensor([0.3, 1.0, -0.5, 0.9])
        found = games.nash_policy(torch.sigmoid(r[:, None] - r), torch.full((4,), 0.25), regularisation=0.0)
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, 0.0]).double())

    def test_hard_games_and_many_at_once(self):
        matrix, reference = random_game(24, seed=0, batch=(2, 2), scale=20.0)
        for tau in (1.0, 1e-2, 1e-4, 1e-6):
            found = games.nash_policy(matrix, reference, regularisation=tau)
            gap = games.exploitability(matrix, found, reference, regularisation=tau)
            assert gap.shape == (2, 2)
            assert float(gap.abs().max()) < 1e-11
            one = games.nash_policy(matrix[1, 0], reference[1, 0], regularisation=tau)
            torch.testing.assert_close(found[1, 0], one, rtol=0, atol=1e-9)

    def test_responses_outside_the_reference_are_outside_the_game(self):
        matrix, reference = random_game(5, seed=4)
        padded = torch.zeros(6, 6)
        padded[:5, :5] = matrix
        outside = torch.cat([reference, torch.zeros(1).double()])
        for tau in (0.0, 0.05):
            inner = games.nash_policy(padded[:5, :5], reference, regularisation=tau)
            found = games.nash_policy(padded, outside, regularisation=tau)
            torch.testing.assert_close(found[:5], inner, rtol=0, atol=1e-10)
            assert found[5] == 0.0
            assert games.best_response(padded, found, outside, regularisation=tau)[5] == 0.0
        elsewhere = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
        assert games.exploitability(padded, elsewhere, outside, regularisation=0.0) == torch.inf
        assert games.exploitability(padded, elsewhere, outside, regularisation=0.1) == torch.inf


class TestExploitability:
    @pytest.mark.parametrize("tau", [0.3, 0.02])
    def test_it_is_what_the_best_opponent_wins(self, tau):
        matrix, reference = random_game(4, seed=7)
        policy = torch.softmax(torch.randn(4, generator=torch.Generator().manual_seed(2)), 0).double()
        policy = policy / policy.sum()

        def loss(logits):
            return -value(matrix, torch.softmax(torch.as_tensor(logits), 0), policy, reference, tau)

        best = min((optimize.minimize(loss, x, options={"gtol": 1e-9}) for x in np.eye(4)), key=lambda r: r.fun)
        gap = float(games.exploitability(matrix, policy, reference, regularisation=tau))
        assert abs(gap - (-best.fun - 0.5)) < 1e-8
        response = games.best_response(matrix, policy, reference, regularisation=tau)
        assert abs(value(matrix, response, policy, reference, tau) - 0.5 - gap) < 1e-12

    def test_it_bounds_the_distance_to_the_nash_policy(self):
        matrix, reference = random_game(5, seed=8)
        nash = games.nash_policy(matrix, reference, regularisation=0.1)
        for seed in range(10):
            policy = torch.softmax(torch.randn(5, generator=torch.Generator().manual_seed(seed)).double(), 0)
            gap = float(games.exploitability(matrix, policy, reference, regularisation=0.1))
            wins = value(matrix, nash, policy, reference, 0.1) - 0.5
            assert abs(wins - 0.1 * float(kl(policy, nash))) < 1e-12
            assert gap > wins > 0.0

    def test_without_regularisation_it_is_the_best_single_response(self):
        matrix, reference = random_game(5, seed=9)
        gap = games.exploitability(matrix, reference, reference, regularisation=0.0)
        torch.testing.assert_close(gap, games.preference_against(matrix, reference).max() - 0.5)


class TestMirrorDescent:
    def run(self, matrix, policy, reference, step, tau, rounds, step_size):
        policies = [policy]
        for t in range(rounds):
            eta = step_size(t) if callable(step_size) else step_size
            policies.append(
                games.mirror_descent_step(matrix, policies[-1], reference, step_size=eta, regularisation=tau, step=step)
            )
        return torch.stack(policies)

    @pytest.mark.parametrize("tau", [0.5, 0.1, 0.02])
    def test_wind_contracts_at_the_rate_that_is_proved(self, tau):
        matrix, reference = random_game(6, seed=11, scale=5.0)
        nash = games.nash_policy(matrix, reference, regularisation=tau)
        eta = 4.0 * tau
        policies = self.run(matrix, reference, reference, "wind", tau, 60, eta)
        distance = kl(nash, policies)
        rounding = 1e-13
        assert (distance[1:] <= distance[:-1] / (1.0 + eta * tau) + rounding).all()

    def test_the_bound_on_the_step_matters(self):
        matrix = cycle(0.5, 0.5, 0.5)
        start = torch.tensor([0.34, 0.33, 0.33])
        policies = self.run(matrix, start, UNIFORM, "wind", 0.02, 400, 100.0)
        assert float(kl(UNIFORM, policies[-1])) > 10.0 * float(kl(UNIFORM, policies[0]))

    def test_inpo_is_wind_with_another_step(self):
        matrix, reference = random_game(4, seed=12)
        policy = reference.flip(0)
        tau, eta = 0.2, 0.7
        one = games.mirror_descent_step(matrix, policy, reference, step_size=eta, regularisation=tau, step="wind")
        other = games.mirror_descent_step(
            matrix, policy, reference, step_size=eta / (1 + eta * tau), regularisation=tau, step="inpo"
        )
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        log = (1 / (1 + eta * tau)) * policy.log() + (eta * tau / (1 + eta * tau)) * reference.log()
        written = torch.softmax(log + eta / (1 + eta * tau) * (matrix @ policy), 0)
        torch.testing.assert_close(one, written, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("step", ["inpo", "wind"])
    def test_the_last_iterate_reaches_the_nash_policy_of_a_cycle(self, step):
        matrix, reference, tau = cycle(0.4, 0.3, 0.1), torch.tensor([0.6, 0.3, 0.1]), 0.1
        policies = self.run(matrix, reference, reference, step, tau, 800, 0.4)
        nash = games.nash_policy(matrix, reference, regularisation=tau)
        torch.testing.assert_close(policies[-1], nash, rtol=0, atol=1e-10)

    def test_the_step_minimises_inpos_loss(self):
        """h = dlog pi - (tau/e) dlog p0 - ((e - tau)/e) dlog pi_t equals (P_i - P_j) / e, with e = 1 / step size."""
        matrix, reference = random_game(5, seed=13)
        tau, e = 0.1, 0.4
        policy = reference.flip(0)
        new = games.mirror_descent_step(matrix, policy, reference, step_size=1 / e, regularisation=tau)
        h = new.log() - tau / e * reference.log() - (e - tau) / e * policy.log()
        gain = matrix @ policy / e
        torch.testing.assert_close(h[:, None] - h, gain[:, None] - gain, rtol=0, atol=1e-12)

    def test_nash_md_keeps_its_bound_with_falling_steps(self):
        matrix, tau = cycle(0.4, 0.3, 0.1), 0.2
        reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        nash = games.nash_policy(matrix, reference, regularisation=tau)
        # eta_0 = 1 / tau: the first step starts from the reference alone.
        policies = self.run(matrix, reference, reference, "nash_md", tau, 400, lambda t: 2.0 / (tau * (t + 2)))
        distance = kl(nash, policies[1:])
        assert (distance <= 8.0 / (tau**2 * (torch.arange(400) + 2))).all()
        assert float(distance[-1]) < 1e-4

    def test_nash_md_at_a_constant_step_rests_beside_the_nash_policy(self):
        matrix, reference, tau = cycle(0.4, 0.3, 0.1), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.2
        nash = games.nash_policy(matrix, reference, regularisation=tau)
        rests = [self.run(matrix, reference, reference, "nash_md", tau, 1400, eta)[-1] for eta in (0.4, 0.1)]
        for eta, rest in zip((0.4, 0.1), rests, strict=True):
            mixture = games.geometric_mixture(rest, reference, eta * tau)
            fixed = torch.softmax(reference.log() + matrix @ mixture / tau, 0)
            torch.testing.assert_close(rest, fixed, rtol=0, atol=1e-10)
        far, near = (float((rest - nash).abs().sum()) for rest in rests)
        assert far > 1e-3
        # The error is of first order in the step.
        assert 3.0 < far / near < 5.0


def test_arguments_are_checked():
    good, uniform = cycle(0.1, 0.1, 0.1), UNIFORM
    with pytest.raises(ArgumentError, match="transpose must be 1"):
        games.nash_policy(good + 0.1, uniform, regularisation=0.1)
    with pytest.raises(ArgumentError, match="sum to 1"):
        games.nash_policy(good, 2 * uniform, regularisation=0.1)
    with pytest.raises(ArgumentError, match="`policy` has shape"):
        games._game(good, torch.full((4,), 0.25), uniform, 0.1)
    with pytest.raises(ArgumentError, match="is square"):
        games._game(good[:2], uniform, uniform, 0.1)
    with pytest.raises(ArgumentError, match="`regularisation` is -1"):
        games.nash_policy(good, uniform, regularisation=-1.0)
    with pytest.raises(ArgumentError, match="`tolerance`"):
        games.nash_policy(good, uniform, regularisation=0.1, tolerance=0.0)
    with pytest.raises(ArgumentError, match="`step` is 'sgd'"):
        games.mirror_descent_step(good, uniform, uniform, step_size=0.1, regularisation=0.1, step="sgd")
    with pytest.raises(ArgumentError, match="`step_size` is inf"):
        games.mirror_descent_step(good, uniform, uniform, step_size=math.inf, regularisation=0.1)
    with pytest.raises(ArgumentError, match="at most 1"):
        games.mirror_descent_step(good, uniform, uniform, step_size=11.0, regularisation=0.1)
    with pytest.raises(ArgumentError, match="`share` is 2"):
        games.geometric_mixture(uniform, uniform, 2.0)
    # Rounding of payoffs divided by so small a regularisation leaves nothing to be sure of.
    with pytest.raises(EngineError, match="not found"):
        games.nash_policy(*random_game(8, seed=0, scale=20.0), regularisation=1e-18)

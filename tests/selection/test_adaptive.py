"""Adaptive best-of-n: the expected gain by simulation, lazy drawing, and fewer samples than any fixed n."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bayesrm import RewardBelief
from bayesrm.errors import ArgumentError
from bayesrm.selection import AdaptiveBestOfN, LowerConfidenceBound
from bayesrm.selection.adaptive import _normal_rise


def known(rewards):
    values = torch.tensor([list(rewards)], dtype=torch.float64)
    return RewardBelief(values, torch.zeros(1, values.shape[1], 1, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("threshold", [-12.0, -1.0, 0.0, 2.0, 5.0])
def test_rise_of_a_normal_maximum(block, threshold):
    truth = integrate.quad(
        lambda t: -np.expm1(block * stats.norm.logcdf(t)), threshold, 40.0, points=[0.0, 3.0], limit=500, epsabs=1e-13
    )[0]
    assert _normal_rise(np.array([threshold]), block)[0] == pytest.approx(truth, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(("count", "block"), [(4, 1), (4, 4), (8, 1), (12, 8), (40, 16)])
def test_expected_gain_is_that_of_the_normal_predictive(count, block):
    rewards = np.random.default_rng(count).normal(2.0, 3.0, size=count)
    found = float(AdaptiveBestOfN(cost=0.0).expected_gain(known(rewards), block))
    rng = np.random.default_rng(1)
    draws = 400_000
    sigma = np.sqrt((count - 1) * rewards.var(ddof=1) / rng.chisquare(count - 1, size=draws))
    mean = rewards.mean() + sigma / count**0.5 * rng.normal(size=draws)
    # The maximum of normal draws from one uniform number: its distribution function is Phi^block.
    top = mean + sigma * stats.norm.isf(-np.expm1(np.log(rng.random(draws)) / block))
    gains = np.maximum(top - rewards.max(), 0.0)
    assert abs(found - gains.mean()) < 4.5 * gains.std() / draws**0.5


def test_a_gain_for_each_prompt_of_a_ragged_belief():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    together = RewardBelief.concatenate([known(a), known(b[:5])])
    engine = AdaptiveBestOfN(cost=0.0)
    apart = [float(engine.expected_gain(known(x), 3)) for x in (a, b[:5])]
    assert engine.expected_gain(together, 3).tolist() == pytest.approx(apart)


def test_nothing_is_drawn_before_it_is_wanted():
    asked = []

    def blocks():
        for place in range(50):
            asked.append(place)
            yield list(np.random.default_rng(place).normal(size=4))

    pick = AdaptiveBestOfN(cost=0.02).run(blocks(), known)
    assert len(pick.candidates) == 4 * len(asked) < 200
    assert pick.stopped_because == "another block is not worth its cost"
    assert pick.response == max(pick.candidates)
    assert pick.expected_gains[-1] <= 0.02 * 4 < min(pick.expected_gains[:-1])


def test_limits():
    rewards = np.random.default_rng(0).normal(size=(10, 3)).tolist()
    pick = AdaptiveBestOfN(cost=0.0, max_candidates=10).run(iter(rewards), known)
    assert (len(pick.candidates), pick.stopped_because) == (10, "max_candidates")
    pick = AdaptiveBestOfN(cost=0.0).run(iter(rewards), known)
    assert (len(pick.candidates), pick.stopped_because) == (30, "no more candidates")
    # With three candidates the question is not asked, at any cost.
    pick = AdaptiveBestOfN(cost=100.0).run(iter(rewards), known)
    assert len(pick.candidates) == 6
    assert np.isnan(pick.expected_gains[0])
    # Candidates that all score the same promise nothing.
    assert len(AdaptiveBestOfN(cost=0.0).run(iter([[1.0] * 4] * 5), known).candidates) == 4


def test_the_rule_decides_what_a_gain_is():
    mean = torch.tensor([[0.0, 0.1, 0.2, 0.3, 4.0]], dtype=torch.float64)
    belief = RewardBelief(mean, torch.diag(torch.tensor([0.1, 0.1, 0.1, 0.1, 9.0])).double()[None])
    pick = AdaptiveBestOfN(cost=10.0, rule=LowerConfidenceBound(2.0)).run(iter([range(5)]), lambda c: belief)
    assert pick.index == 3
    assert AdaptiveBestOfN(cost=10.0).run(iter([range(5)]), lambda c: belief).index == 4


def test_bad_input():
    with pytest.raises(ArgumentError, match=r"`cost` is -1.0"):
        AdaptiveBestOfN(cost=-1.0)
    with pytest.raises(ArgumentError, match="`min_candidates` is 3; fewer than 4"):
        AdaptiveBestOfN(cost=1.0, min_candidates=3)
    with pytest.raises(ArgumentError, match="`max_candidates` is 5, below `min_candidates`, 8"):
        AdaptiveBestOfN(cost=1.0, min_candidates=8, max_candidates=5)
    with pytest.raises(ArgumentError, match="`blocks` holds no candidate"):
        AdaptiveBestOfN(cost=1.0).run([], known)
    with pytest.raises(ArgumentError, match=r"belief of shape \(1, 3\) about 4 candidates"):
        AdaptiveBestOfN(cost=1.0).run([[1.0] * 4], lambda c: known(c[:3]))
    with pytest.raises(ArgumentError, match="a prompt has 3 candidates"):
        AdaptiveBestOfN(cost=1.0).expected_gain(known([1.0, 2.0, 3.0]), 1)


@pytest.mark.slow
def test_fewer_samples_than_every_fixed_n_at_equal_expected_reward():
    """Prompts whose rewards are spread differently: what is saved on the narrow ones is spent on the wide ones."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0.0, 1.0, size=500))
    rewards = spread[:, None] * rng.normal(size=(500, 64))
    sizes, reached = [], []
    for row in rewards:
        pick = AdaptiveBestOfN(cost=0.03).run(iter(row.reshape(-1, 4)), known)
        sizes.append(len(pick.candidates))
        reached.append(max(pick.candidates))
    best_so_far = np.maximum.accumulate(rewards, axis=1)
    # At the same mean number of candidates, a fixed n gets less on the same prompts.
    fixed = best_so_far[:, round(np.mean(sizes)) - 1]
    gain = np.array(reached) - fixed
    assert gain.mean() > 3 * gain.std(ddof=1) / 500**0.5
    needed = int(np.argmax(best_so_far.mean(0) >= np.mean(reached))) + 1
    assert np.mean(sizes) < 0.8 * needed

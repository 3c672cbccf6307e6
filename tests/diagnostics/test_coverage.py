"""Coverage of reward differences: truths drawn from the belief itself are covered at the level, others are not."""

import numpy as np
import pytest
import scipy.stats
import torch

import bayesrm as brm
from bayesrm.diagnostics.coverage import coverage
from bayesrm.errors import ArgumentError


def random_belief(num_prompts, num_candidates, seed=0, mask=None):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(num_prompts, num_candidates, generator=generator, dtype=torch.float64)
    root = torch.randn(num_prompts, num_candidates, num_candidates, generator=generator, dtype=torch.float64)
    return brm.RewardBelief(mean, root, mask)


def band(count, level):
    return scipy.stats.binom(count, level).ppf([0.0005, 0.9995]) / count


def test_a_gaussian_belief_covers_truths_drawn_from_it_and_a_surer_one_does_not():
    # One pair a prompt, so that the pairs are independent and the binomial band is exact.
    belief = random_belief(2000, 2)
    truth = belief.sample(1, seed=5)[0]
    sure = brm.RewardBelief(belief.mean, belief.root / 2**0.5)
    right, wrong = (coverage(b, truth, num_resamples=200) for b in (belief, sure))
    for level, found, low in zip(right.levels, right.covered, wrong.covered, strict=True):
        least, most = band(2000, level)
        assert least <= found.value <= most
        assert found.low < found.value < found.high
        assert low.high < level
    assert scipy.stats.kstest(right.pit, "uniform").pvalue > 0.01
    assert scipy.stats.kstest(wrong.pit, "uniform").pvalue < 1e-6
    np.testing.assert_allclose(wrong.width, right.width / 2**0.5)


def test_exaggerated_differences_show_in_the_pit():
    belief = random_belief(2000, 2, seed=1)
    truth = belief.sample(1, seed=6)[0]
    exaggerated = brm.RewardBelief(1.5 * belief.mean, belief.root)
    # Oriented by the belief: the better candidate is not as much better as stated.
    wrong, right = (coverage(b, truth, num_resamples=2).pit.mean() for b in (exaggerated, belief))
    assert wrong < 0.45 < right


@pytest.mark.parametrize("num_draws", [9, 100])
def test_draws_cover_exactly_however_few(num_draws):
    belief = random_belief(3000, 2, seed=2)
    truth = belief.sample(1, seed=7)[0]
    draws = belief.sample(num_draws, seed=8)
    found = coverage(draws, truth, levels=[0.5, 0.85], num_resamples=2)
    for level, share in zip(found.levels, found.covered, strict=True):
        least, most = band(3000, level)
        assert least <= share.value <= most
    narrow = coverage(belief.mean + 0.6 * (draws - belief.mean), truth, levels=[0.85], num_resamples=200)
    assert narrow.covered[0].high < 0.85


def test_many_draws_agree_with_the_gaussian_they_come_from():
    belief = random_belief(50, 3, seed=3)
    truth = belief.sample(1, seed=9)[0]
    exact = coverage(belief, truth, num_resamples=2)
    drawn = coverage(brm.RewardBelief.from_draws(belief.sample(20_000, seed=10)), truth, num_resamples=2)
    # Four standard errors of a distribution function from 20,000 draws, at most 4 * 0.5 / sqrt(20000); a pair whose
    # mean difference is near 0 may be oriented the other way by the draws.
    gap = np.minimum(np.abs(exact.pit - drawn.pit), np.abs(exact.pit - (1 - drawn.pit)))
    assert gap.max() < 0.0142
    np.testing.assert_allclose(exact.width, drawn.width, rtol=0.02)


def test_pit_and_width_by_hand():
    # Differences: N(1, 2), truth 2 (oriented: better minus other); N(-3, 2), truth -3.
    belief = brm.RewardBelief(
        torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    )
    found = coverage(belief, torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64), levels=[0.5])
    np.testing.assert_allclose(found.pit, [scipy.stats.norm.cdf(1 / 2**0.5), 0.5], atol=1e-12)
    assert found.width[0] == pytest.approx(2 * scipy.stats.norm.ppf(0.75) * 2**0.5)
    assert found.covered[0].value == 0.5
    assert str(found).startswith("50% intervals cover 0.500")


def test_order_offset_and_masked_candidates_do_not_matter():
    mask = torch.ones(40, 4, dtype=torch.bool)
    mask[::2, 3] = False
    belief = random_belief(40, 4, seed=4, mask=mask)
    truth = belief.sample(1, seed=11)[0]
    found = coverage(belief, truth)
    assert len(found.pit) == 20 * 3 + 20 * 6
    order = torch.tensor([2, 0, 3, 1])
    shuffled = brm.RewardBelief(belief.mean[:, order], belief.root[:, order], mask[:, order])
    elsewhere = torch.where(mask, truth + 7.0, torch.nan)[:, order]
    again = coverage(shuffled, elsewhere)
    np.testing.assert_allclose(np.sort(found.pit), np.sort(again.pit), atol=1e-9)
    assert [c.value for c in found.covered] == [c.value for c in again.covered]


def test_what_is_known_exactly_tells_nothing_but_a_wrong_point_misses():
    # Candidates 0 and 1 are the same response; candidate 2 is another.
    root = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).expand(5, 3, 2)
    mean = torch.zeros(5, 3, dtype=torch.float64)
    truth = torch.tensor([[0.3, 0.3, 0.1]], dtype=torch.float64).expand(5, 3)
    assert len(coverage(brm.RewardBelief(mean, root), truth).pit) == 10
    point = coverage(brm.RewardBelief(mean, torch.zeros(5, 3, 0, dtype=torch.float64)), truth)
    assert [c.value for c in point.covered] == [0.0] * 4
    assert (point.width == 0).all()


def test_float32_beliefs_and_seeds():
    belief = random_belief(30, 3, seed=5)
    single = brm.RewardBelief(belief.mean.float(), belief.root.float())
    truth = belief.sample(1, seed=12)[0]
    np.testing.assert_allclose(coverage(single, truth.float()).pit, coverage(belief, truth).pit, atol=1e-5)
    draws = belief.sample(50, seed=13)
    a, b = coverage(draws, truth, seed=1), coverage(draws, truth, seed=1)
    assert (a.pit == b.pit).all()
    assert a.covered == b.covered
    assert (coverage(draws, truth, seed=2).pit != a.pit).any()


def test_the_interval_over_prompts_allows_for_pairs_that_share_a_prompt():
    # Fifteen pairs of six candidates share their prompt's errors: rows as clusters would give narrower intervals.
    belief = random_belief(80, 6, seed=6)
    hits = 0
    for seed in range(60):
        found = coverage(belief, belief.sample(1, seed=seed)[0], levels=[0.8], num_resamples=200)
        hits += found.covered[0].low <= 0.8 <= found.covered[0].high
    assert hits >= scipy.stats.binom(60, 0.93).ppf(0.001)


@pytest.mark.slow
def test_a_fitted_posterior_covers_the_rewards_that_made_its_data():
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), brm.likelihoods.BradleyTerry())
    pits = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(120, 3))
        design = brm.Comparisons.from_arrays(x, candidates=np.arange(120).reshape(60, 2), outcome=[0] * 60)
        simulated = model.simulate(design, seed=seed)
        posterior = brm.fit(model, simulated.data, inference=brm.Laplace())
        belief = posterior.predict_items(simulated.data)
        found = coverage(belief, simulated.rewards.reshape(60, 2), num_resamples=2)
        pits.append(found.pit[0])
    # One pair of each data set, so that replicates are independent.
    assert scipy.stats.kstest(pits, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("belief", "truth", "settings", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), {}, "draws have shape"),
        (random_belief(3, 2), torch.zeros(3, 3), {}, "`truth` has shape"),
        (random_belief(3, 2), torch.zeros(3, 2), {"levels": [0.5, 1.0]}, "`levels`"),
        (random_belief(3, 2), torch.full((3, 2), torch.nan), {}, "not finite"),
        (random_belief(3, 1), torch.zeros(3, 1), {}, "fewer than two prompts"),
        (random_belief(1, 3), torch.zeros(1, 3), {}, "fewer than two prompts"),
    ],
)
def test_refuses_nonsense(belief, truth, settings, match):
    with pytest.raises(ArgumentError, match=match):
        coverage(belief, truth, **settings)


def test_clusters_of_prompts_are_redrawn_together():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    belief = brm.RewardBelief(truth + 0.0, torch.eye(2, dtype=torch.float64).expand(20, 2, 2))
    away = truth.clone()
    away[10:, 0] += 5.0
    alone, together = (coverage(belief, away, clusters=c) for c in (None, np.arange(20) // 10))
    assert alone.covered[0].value == together.covered[0].value == 0.5
    # Two clusters, one covered and one not: the share is anything.
    assert (together.covered[0].low, together.covered[0].high) == (0.0, 1.0)
    assert alone.covered[0].low > 0.2
    with pytest.raises(ArgumentError, match="`clusters` has 3 entries for 20 prompts"):
        coverage(belief, away, clusters=np.zeros(3, dtype=np.int64))

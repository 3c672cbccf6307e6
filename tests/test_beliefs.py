"""Beliefs about rewards against Monte Carlo and quadrature."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from bayesrm.beliefs import (
    RewardBelief,
    covariance_root,
    expected,
    lower_bound,
    optimistic,
    risk_averse,
    thompson,
)
from bayesrm.errors import ArgumentError

DRAWS = 200_000
#: A Monte Carlo mean of n draws lies within five standard errors but once in 1.7 million.
SIGMAS = 5.0


def gaussian(seed=0, prompts=2, candidates=4, masked=True):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(prompts, candidates, generator=generator, dtype=torch.float64)
    root = torch.randn(prompts, candidates, 3, generator=generator, dtype=torch.float64)
    mask = torch.ones(prompts, candidates, dtype=torch.bool)
    mask[-1, -1] = not masked
    return RewardBelief(mean, root, mask)


def brute_force(belief, seed=1):
    """Independent draws by numpy from the mean and the dense covariance, shape `(DRAWS, B, K)`."""
    rng = np.random.default_rng(seed)
    covariance = belief.covariance.numpy()
    mean = belief.mean.numpy()
    return np.stack([rng.multivariate_normal(m, c, DRAWS, "ignore") for m, c in zip(mean, covariance, strict=True)], 1)


def assert_mean(found, draws):
    """`found` equals the mean of `draws` over their first axis within its standard error."""
    error = draws.std(0) / np.sqrt(len(draws))
    assert (np.abs(np.asarray(found) - draws.mean(0)) <= SIGMAS * error + 1e-12).all()


def test_moments_are_those_of_the_draws():
    belief = gaussian()
    draws = belief.sample(DRAWS, seed=0).numpy()
    assert draws.shape == (DRAWS, 2, 4)
    assert_mean(belief.mean, draws)
    centred = draws - belief.mean.numpy()
    assert_mean(belief.covariance, centred[..., :, None] * centred[..., None, :])
    assert_mean(belief.variance, centred**2)
    torch.testing.assert_close(belief.std, belief.covariance.diagonal(dim1=1, dim2=2).sqrt())
    assert torch.equal(belief.sample(5, seed=3), belief.sample(5, seed=3))
    assert not torch.equal(belief.sample(5, seed=3), belief.sample(5, seed=4))


@pytest.mark.parametrize("baseline", ["mean", 1, torch.tensor([3, 0])], ids=["mean", "index", "indices"])
def test_differences(baseline):
    belief = gaussian()
    relative = belief.differences(baseline)
    draws, mask = brute_force(belief), belief.valid.numpy()
    if isinstance(baseline, str):
        offset = (draws * mask).sum(2) / mask.sum(1)
    else:
        offset = draws[:, [0, 1], np.broadcast_to(np.asarray(baseline), 2)]
    moved = np.where(mask, draws - offset[..., None], 0.0)
    assert_mean(relative.mean, moved)
    centred = moved - relative.mean.numpy()
    assert_mean(relative.covariance, centred[..., :, None] * centred[..., None, :])


def test_differences_cancel_a_shared_offset():
    belief = gaussian()
    offset = torch.full((2, 4, 1), 1e3, dtype=torch.float64)
    shifted = RewardBelief(belief.mean + 7.0, torch.cat([belief.root, offset], 2), belief.mask)
    torch.testing.assert_close(shifted.differences().mean, belief.differences().mean, rtol=0, atol=1e-13)
    # The offset's rounding is 1e3 * 2^-52.
    torch.testing.assert_close(shifted.differences().covariance, belief.differences().covariance, rtol=0, atol=1e-11)
    assert shifted.std[shifted.valid].min() > 999


def test_prob_better():
    belief = gaussian()
    draws = brute_force(belief)
    greater = (draws[..., :, None] > draws[..., None, :]).astype(float)
    both = (belief.valid[:, :, None] & belief.valid[:, None, :]).numpy()
    diagonal = np.eye(4, dtype=bool) & both
    found = belief.prob_better().numpy()
    error = 0.5 / np.sqrt(DRAWS)
    assert np.abs(found - greater.mean(0))[both & ~diagonal].max() < SIGMAS * error
    assert (found[diagonal] == 0.5).all()
    assert (found[~both] == 0).all()
    np.testing.assert_allclose((found + found.transpose(0, 2, 1))[both], 1.0, rtol=1e-12)


def test_prob_better_without_any_doubt():
    belief = RewardBelief(torch.tensor([[1.0, 0.0, 1.0]]), torch.ones(1, 3, 1))
    assert belief.prob_better()[0].tolist() == [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_preference_matrix(std):
    mean, root = np.array([[0.7, 0.0]]), np.array([[[std], [0.0]]])
    belief = RewardBelief(torch.as_tensor(mean), torch.as_tensor(root))

    def integrand(z):
        return scipy.stats.norm.pdf(z) / (1 + np.exp(-(0.7 + std * z)))

    exact, error = scipy.integrate.quad(integrand, -12, 12, epsabs=1e-12, epsrel=1e-12)
    assert error < 1e-10
    found = belief.preference_matrix()[0]
    # 64-point Gauss-Hermite quadrature converges like exp(-pi sqrt(2 * 64) / std): 7e-6 at a std of 3.
    assert abs(float(found[0, 1]) - exact) < max(1e-9, np.exp(-np.pi * np.sqrt(128) / std))
    assert abs(float(found[0, 1] + found[1, 0]) - 1) < 1e-12
    assert abs(float(found[0, 0]) - 0.5) < 1e-12


def test_preference_matrix_of_many():
    belief = gaussian()
    draws = brute_force(belief)
    both = (belief.valid[:, :, None] & belief.valid[:, None, :]).numpy()
    judged = np.where(both, 1 / (1 + np.exp(draws[..., None, :] - draws[..., :, None])), 0.0)
    # 2e-5 for the quadrature, as above with a std of 3.3 at most.
    error = judged.std(0) / np.sqrt(DRAWS)
    assert (np.abs(belief.preference_matrix().numpy() - judged.mean(0)) <= SIGMAS * error + 2e-5).all()


def test_prob_best():
    belief = gaussian()
    draws = np.where(belief.valid.numpy(), brute_force(belief), -np.inf)
    exact = np.eye(4)[draws.argmax(2)].mean(0)
    found = belief.prob_best(num_samples=40_000, seed=2)
    # Two estimates: standard errors add in squares.
    assert np.abs(found.numpy() - exact).max() < SIGMAS * 0.5 * np.sqrt(1 / 40_000 + 1 / DRAWS)
    torch.testing.assert_close(found.sum(1), torch.ones(2).double())
    assert found[1, 3] == 0


def test_prob_best_of_two_is_prob_better():
    belief = gaussian(prompts=1, candidates=2, masked=False)
    exact = float(belief.prob_better()[0, 0, 1])
    assert abs(float(belief.prob_best(num_samples=DRAWS)[0, 0]) - exact) < SIGMAS * 0.5 / np.sqrt(DRAWS)


def test_draws_agree_with_the_gaussian_they_come_from():
    belief = gaussian()
    of_draws = RewardBelief.from_draws(belief.sample(DRAWS, seed=8), belief.mask)
    raw = of_draws.draws
    torch.testing.assert_close(of_draws.mean[0], raw.mean(0)[0])
    torch.testing.assert_close(of_draws.covariance[0], torch.cov(raw[:, 0].T))
    std = belief.std.max()
    assert (of_draws.mean - belief.mean).abs().max() < SIGMAS * std / DRAWS**0.5
    for question in ("prob_better", "preference_matrix", "prob_best"):
        ours, theirs = getattr(of_draws, question)(), getattr(belief, question)()
        # `prob_best` of the Gaussian has 4,096 draws of its own.
        error = 0.5 * (1 / DRAWS + (1 / 4096 if question == "prob_best" else 0.0)) ** 0.5
        assert (ours - theirs).abs().max() < SIGMAS * error + 2e-5
    relative = of_draws.differences(0)
    torch.testing.assert_close(relative.draws[:, 0], raw[:, 0] - raw[:, 0, :1])
    torch.testing.assert_close(relative.covariance[0], torch.cov((raw[:, 0] - raw[:, 0, :1]).T))


def test_sampling_from_draws_resamples_whole_draws():
    draws = torch.arange(24.0).reshape(3, 2, 4)
    seen = RewardBelief.from_draws(draws).sample(100, seed=0)
    assert {tuple(d.flatten().tolist()) for d in seen} == {tuple(d.flatten().tolist()) for d in draws}


def test_masked_entries_are_zero_and_one_prompt_has_none():
    belief = gaussian()
    assert belief.mean[1, 3] == 0
    assert (belief.root[1, 3] == 0).all()
    single = belief[1]
    assert single.mean.shape == (1, 3)
    torch.testing.assert_close(single.covariance[0], belief.covariance[1, :3, :3])
    torch.testing.assert_close(single.differences().covariance[0], belief.differences().covariance[1, :3, :3])
    assert single.prob_best().shape == (1, 3)
    part = RewardBelief.from_draws(belief.sample(10, seed=0), belief.mask)[1]
    assert part.draws.shape == (10, 1, 3)


def test_covariance_root():
    belief = gaussian(masked=False)
    root = covariance_root(belief.covariance)
    torch.testing.assert_close(root @ root.transpose(1, 2), belief.covariance, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match=r"a covariance has eigenvalue -1 < 0"):
        covariance_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    # A negative eigenvalue of the size of rounding is rounding.
    covariance_root(torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-15]], dtype=torch.float64))


def test_a_covariance_of_nan_is_refused():
    with pytest.raises(ArgumentError, match=r"`covariance` has entries that are not finite"):
        covariance_root(torch.full((2, 2), torch.nan))


def test_errors():
    mean, root = torch.zeros(2, 3), torch.zeros(2, 3, 1)
    with pytest.raises(ArgumentError, match=r"`mean` has entries that are not finite"):
        RewardBelief(torch.full((2, 3), torch.nan), root)
    with pytest.raises(ArgumentError, match=r"`root` has entries that are not finite"):
        RewardBelief(mean, torch.full((2, 3, 1), torch.inf))
    with pytest.raises(ArgumentError, match=r"`mask` must .* leave every prompt at least one candidate"):
        RewardBelief(mean, root, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ArgumentError, match=r"`draws` holds 1 draw; at least 2 are needed"):
        RewardBelief.from_draws(torch.zeros(1, 2, 3))
    draws = torch.zeros(4, 2, 3)
    draws[1, 0, 2] = torch.nan
    with pytest.raises(ArgumentError, match=r"not finite"):
        RewardBelief.from_draws(draws)
    belief = gaussian()
    with pytest.raises(ArgumentError, match=r"`baseline` is 'median'; use 'mean', an index"):
        belief.differences("median")
    with pytest.raises(ArgumentError, match=r"`baseline` is 4; there are 4 candidates"):
        belief.differences(4)
    with pytest.raises(ArgumentError, match=r"`baseline` names a masked candidate"):
        belief.differences(3)


# ----------------------------------------------------------------------------------------------------------- utilities


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize(("utility", "sign"), [(risk_averse, -1.0), (optimistic, 1.0)])
def test_entropic_utilities(utility, sign, deviation):
    b = 4.0
    belief = gaussian(masked=False)
    draws = brute_force(belief)
    centred = draws - draws.mean(2, keepdims=True) if deviation else draws
    back = belief.mean.mean(1, keepdim=True).numpy() if deviation else 0.0
    exponential = np.exp(sign * centred / b)
    exact = sign * b * np.log(exponential.mean(0)) + back
    # Delta method: the error of b log(mean) is b times the relative error of the mean.
    error = b * exponential.std(0) / exponential.mean(0) / np.sqrt(DRAWS)
    found = utility(belief, b, deviation=deviation)
    assert (np.abs(found.numpy() - exact) < SIGMAS * error).all()
    of_draws = utility(RewardBelief.from_draws(torch.as_tensor(draws)), b, deviation=deviation)
    shift = draws.mean((0, 2))[:, None] - belief.mean.mean(1, keepdim=True).numpy() if deviation else 0.0
    np.testing.assert_allclose(of_draws, exact + shift, rtol=1e-10)
    variance = (belief.differences() if deviation else belief).variance
    torch.testing.assert_close(found, belief.mean + sign * variance / (2 * b))


def test_the_risk_averse_utility_survives_large_draws():
    draws = torch.tensor([[[0.0, 5000.0]], [[-5000.0, 4000.0]]]).double()
    found = risk_averse(RewardBelief.from_draws(draws), 1.0, deviation=False)
    # -log((1 + e^5000) / 2) and -log((e^-5000 + e^-4000) / 2)
    np.testing.assert_allclose(found, [[-5000 + np.log(2), 4000 + np.log(2)]], rtol=1e-14)


@pytest.mark.parametrize("utility", [risk_averse, optimistic])
@pytest.mark.parametrize("b", [0.0, -1.0])
def test_temperatures_are_positive(utility, b):
    with pytest.raises(ArgumentError, match="temperature of an entropic utility is positive"):
        utility(gaussian(), b)


def test_lower_bound_mean_and_thompson():
    belief = gaussian()
    assert torch.equal(expected(belief), belief.mean)
    draws = brute_force(belief)
    found = lower_bound(belief, 2.0, deviation=False)
    # The standard error of a standard deviation is std / sqrt(2 n).
    error = 2.0 * float(belief.std.max()) / np.sqrt(2 * DRAWS)
    np.testing.assert_allclose(found, belief.mean.numpy() - 2.0 * draws.std(0), rtol=0, atol=SIGMAS * error)
    single = belief[1]
    bound = lower_bound(belief, 1.5)
    torch.testing.assert_close(bound[1, :3], single.mean[0] - 1.5 * single.differences().std[0])
    assert torch.equal(thompson(belief, seed=5), belief.sample(1, seed=5)[0])


def test_beliefs_made_of_draws_are_concatenated_draw_by_draw():
    draws = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = RewardBelief.from_draws(torch.nn.functional.pad(draws, (0, 1)), torch.arange(5).expand(3, 5) < 4)
    last = torch.nn.functional.pad(draws[:, 2:], (0, 1))
    parts = [
        RewardBelief.from_draws(draws[:, :2]),
        RewardBelief.from_draws(last, torch.tensor([[True, True, True, True, False]])),
    ]
    together = RewardBelief.concatenate(parts)
    for name in ("mean", "root", "mask", "draws"):
        torch.testing.assert_close(getattr(together, name), getattr(whole, name))
    with pytest.raises(ArgumentError, match="`parts` holds 2 beliefs with numbers of draws"):
        RewardBelief.concatenate([parts[0], RewardBelief(torch.zeros(1, 2), torch.zeros(1, 2, 1))])

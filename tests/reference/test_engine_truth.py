"""Every engine against posteriors known by dense quadrature, log densities written by hand.

Coordinates are the whitened weights (prior N(0, I)) and the unconstrained latents. For each engine and model the error
of means and standard deviations is stated in posterior standard deviations; run with `-s` to read the table. NUTS and
corrected Laplace must agree within Monte Carlo error. The others are what they are: the bounds hold what was measured,
with a margin, so that a change for the worse shows.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro.ops.stats import effective_sample_size
from scipy.special import expit, log_expit

import bayesrm as brm
from bayesrm.engines import DrawsPosterior

L = brm.likelihoods
#: The grid reaches this many prior standard deviations to each side, and has so many points a side in 1-3 dimensions.
REACH, POINTS = 6.5, {1: 801, 2: 301, 3: 91}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data, and the log likelihood by hand.

    Attributes:
        likelihood: Of the model; the reward is linear with prior precision 1.
        data: The feedback.
        log_likelihood: Of a grid of coordinates, shape `(D, n)`.
        center: Prior means of the coordinates.
        scale: Prior standard deviations.
    """

    likelihood: object
    data: brm.Comparisons
    log_likelihood: Callable[[np.ndarray], np.ndarray]
    center: tuple[float, ...]
    scale: tuple[float, ...]


def repeated(features, outcome, **columns):
    """Rows that all compare items with the given features, each row a prompt with items of its own."""
    rows, k = len(outcome), len(features)
    candidates = np.arange(rows * k).reshape(rows, k)
    return brm.Comparisons.from_arrays(np.tile(features, (rows, 1)), candidates=candidates, outcome=outcome, **columns)


def pairs(outcome, **columns):
    """Comparisons of an item with feature 1 and one with feature 0, so that the weight is their difference."""
    return repeated([[1.0], [0.0]], outcome, **columns)


def bradley_terry():
    outcome = [0, 0, 0, 0, 0, 1]
    return Case(L.BradleyTerry(), pairs(outcome), lambda x: 5 * log_expit(x[0]) + log_expit(-x[0]), (0.0,), (1.0,))


def davidson():
    outcome = [0, 0, 0, 1, 2, 2]

    def log_likelihood(x):
        # Davidson (1970), eq. 2.2, with strengths pi = exp(r) and nu = exp(x[1]).
        first, second, tie = np.exp(x[0]), np.ones_like(x[0]), np.exp(x[1]) * np.exp(0.5 * x[0])
        total = np.log(first + second + tie)
        return 3 * np.log(first) + np.log(second) + 2 * np.log(tie) - 6 * total

    return Case(L.Davidson(), pairs(outcome), log_likelihood, (0.0, np.log(0.5)), (1.0, 1.0))


def ordinal():
    rating = np.array([0, 1, 2, 2, 1, 2])
    feature = np.array([-1.0, 0.0, 0.5, 1.0, -0.5, 2.0])
    data = brm.Comparisons.from_arrays(feature[:, None], outcome=rating, kind="rating", num_levels=3)

    def log_likelihood(x):
        low, high = x[1], x[1] + np.exp(x[2])
        total = 0.0
        for y, f in zip(rating, feature, strict=True):
            r = x[0] * f
            p = [expit(low - r), expit(high - r) - expit(low - r), expit(r - high)][y]
            total = total + np.log(np.maximum(p, 1e-300))
        return total

    return Case(L.Ordinal(), data, log_likelihood, (0.0, -2.0, np.log(1.5)), (1.0, 2.0, 0.5))


def rater():
    outcome = [0, 0, 0, 0, 1, 0, 0]
    data = pairs(outcome, annotator=["ann"] * len(outcome))

    def log_likelihood(x):
        kept = 0.5 + 0.5 * expit(x[1] + x[2])
        p = kept * expit(x[0]) + (1 - kept) * expit(-x[0])
        return 6 * np.log(p) + np.log1p(-p)

    return Case(L.RaterReliability(L.BradleyTerry()), data, log_likelihood, (0.0, 1.5, 0.0), (1.0, 1.0, 1.0))


def plackett_luce():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [-0.5, -0.5]])
    orders = [[0, 1, 2], [0, 2, 1], [0, 1, 2], [1, 0, 2]]
    data = repeated(features, orders, kind="ranking")

    def log_likelihood(x):
        strength = np.exp(np.tensordot(features, x, axes=1))
        total = 0.0
        for order in orders:
            for place in range(3):
                total = total + np.log(strength[order[place]] / strength[order[place:]].sum(0))
        return total

    return Case(L.PlackettLuce(), data, log_likelihood, (0.0, 0.0), (1.0, 1.0))


CASES = {f.__name__: f for f in (bradley_terry, davidson, ordinal, rater, plackett_luce)}


@dataclasses.dataclass(frozen=True)
class Truth:
    """Moments of the posterior, and its density on the grid."""

    mean: np.ndarray
    std: np.ndarray
    kurtosis: np.ndarray
    log_evidence: float
    grid: np.ndarray
    mass: np.ndarray


def integrate(case, points=None):
    """The posterior by the trapezoidal rule, whose error on smooth peaks falls faster than any power of the step."""
    size = len(case.center)
    count = points or POINTS[size]
    steps = [c + s * np.linspace(-REACH, REACH, count) for c, s in zip(case.center, case.scale, strict=True)]
    grid = np.stack([g.reshape(-1) for g in np.meshgrid(*steps, indexing="ij")])
    center, scale = np.array(case.center)[:, None], np.array(case.scale)[:, None]
    log_prior = (-0.5 * ((grid - center) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(0)
    log_joint = log_prior + case.log_likelihood(grid)
    cell = np.prod([s[1] - s[0] for s in steps])
    mass = np.exp(log_joint) * cell
    evidence = mass.sum()
    mass = mass / evidence
    mean = grid @ mass
    centred = grid - mean[:, None]
    variance = centred**2 @ mass
    return Truth(mean, np.sqrt(variance), centred**4 @ mass / variance**2, float(np.log(evidence)), grid, mass)


@pytest.fixture(scope="module", params=list(CASES))
def known(request):
    case = CASES[request.param]()
    return request.param, case, integrate(case)


def fitted(case, engine, seed=0):
    model = brm.RewardModel(brm.rewards.Linear(standardize=False), case.likelihood)
    posterior = brm.fit(model, case.data, inference=engine, seed=seed)
    assert posterior._whitening.basis is None
    return posterior


def draws_of(posterior):
    return torch.cat([posterior.z, posterior.unconstrained_latents], dim=1)


def moments(posterior):
    """Means and standard deviations of the coordinates."""
    if isinstance(posterior, DrawsPosterior):
        x = draws_of(posterior)
        return x.mean(0).numpy(), x.std(0).numpy()
    if posterior.factor is None:
        return posterior.mode.numpy(), np.zeros(len(posterior.mode))
    factor = posterior.factor
    variance = factor**-2 if factor.dim() == 1 else torch.cholesky_inverse(factor).diagonal()
    return posterior.mode.numpy(), variance.sqrt().numpy()


def total_variation(posterior, truth):
    """Distance of a normal posterior from the truth, by the same grid; probability that it puts in the wrong place."""
    factor = posterior.factor
    precision = torch.diag(factor**2) if factor.dim() == 1 else factor @ factor.T
    centred = truth.grid - posterior.mode.numpy()[:, None]
    log_q = -0.5 * np.einsum("in,ij,jn->n", centred, precision.numpy(), centred)
    q = np.exp(log_q)
    return 0.5 * np.abs(q / q.sum() - truth.mass).sum()


def test_the_truth_is_the_same_on_a_coarser_grid(known):
    _, case, truth = known
    coarse = integrate(case, points=(2 * POINTS[len(case.center)]) // 3)
    np.testing.assert_allclose(coarse.mean, truth.mean, atol=1e-6)
    np.testing.assert_allclose(coarse.std, truth.std, atol=1e-6)
    assert coarse.log_evidence == pytest.approx(truth.log_evidence, abs=1e-6)


def test_the_log_densities_by_hand_are_the_programs(known):
    _, case, _ = known
    posterior = fitted(case, brm.Laplace())
    generator = np.random.default_rng(0)
    x = np.array(case.center) + np.array(case.scale) * generator.normal(size=(20, len(case.center)))
    size = posterior._whitening.size
    features = torch.as_tensor(np.asarray(case.data.features)).double()
    rewards = torch.from_numpy(x[:, :size]) @ features.T
    density = posterior._density_of(case.data)
    found = density.log_joints(rewards, torch.from_numpy(x[:, size:])).numpy()
    centred = (x - case.center) / case.scale
    log_prior = (-0.5 * centred**2 - np.log(case.scale) - 0.5 * np.log(2 * np.pi))[:, size:].sum(1)
    np.testing.assert_allclose(found, case.log_likelihood(x.T) + log_prior, atol=1e-9)


SAMPLERS = {
    "NUTS": brm.NUTS(num_samples=2500, chain_method="vectorized"),
    "corrected Laplace": brm.ImportanceSampling(brm.Laplace(), num_samples=20_000, degrees_of_freedom=6.0),
    "corrected SVI": brm.ImportanceSampling(brm.SVI(num_steps=300), num_samples=20_000, degrees_of_freedom=6.0),
}


def effective(posterior, values):
    """Effective number of draws behind the mean of each column."""
    if "diverging" not in posterior.sample_stats:
        return np.full(values.shape[1], posterior.report.diagnostics["ess"])
    chains = values.reshape(posterior.num_chains, -1, values.shape[1])
    return effective_sample_size(chains, chain_dim=0, sample_dim=1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_exact_engines_agree_within_monte_carlo_error(known, name):
    case_name, case, truth = known
    posterior = fitted(case, SAMPLERS[name])
    x = draws_of(posterior)
    centred = (x - torch.from_numpy(truth.mean)) / torch.from_numpy(truth.std)
    mean_error = np.sqrt(1.0 / effective(posterior, x))
    # The mean of squares of standardised draws is 1, with variance (kurtosis - 1) / ess.
    square_error = np.sqrt((truth.kurtosis - 1.0) / effective(posterior, centred.square()))
    mean, square = centred.mean(0).numpy(), centred.square().mean(0).numpy() - 1.0
    print(f"\n{case_name:15} {name:18} mean {mean.round(3)} (+- {mean_error.round(3)}), square {square.round(3)} "
          f"(+- {square_error.round(3)})")  # fmt: skip
    assert mean_error.max() < 0.03
    # At most 11 numbers a case and 45 cases: 4.5 standard errors are passed by chance once in 300 runs of them all.
    assert (np.abs(mean) < 4.5 * mean_error).all()
    assert (np.abs(square) < 4.5 * square_error).all()


#: Largest error of a mean in posterior standard deviations and of the log of a standard deviation, over all cases.
#: Measured: MAP 0.16; Laplace 0.16 and 0.06; SVI 0.01 and 0.05 (full rank), 0.02 and 0.03 (low rank), 0.06 and 0.15
#: (mean field); ensemble 0.29 and 0.15. Reasons: a mode is not a mean where the posterior is skewed, as six comparisons
#: leave it; normal distributions miss its tails; a diagonal misses correlations; an ensemble has the posterior's spread
#: for many rows only, not for six.
BOUNDS = {
    "MAP": (0.2, 0.0),
    "Laplace": (0.2, 0.08),
    "SVI full_rank": (0.04, 0.08),
    "SVI low_rank": (0.04, 0.08),
    "SVI mean_field": (0.09, 0.2),
    "Ensemble": (0.35, 0.22),
}
ENGINES = {
    "MAP": brm.MAP(),
    "Laplace": brm.Laplace(),
    "SVI full_rank": brm.SVI(num_steps=1000),
    "SVI low_rank": brm.SVI(guide="low_rank", rank=3, num_steps=2000),
    "SVI mean_field": brm.SVI(guide="mean_field", num_steps=2000),
    "Ensemble": brm.Ensemble(num_members=2000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENGINES))
def test_approximations_are_as_far_off_as_stated(known, name):
    case_name, case, truth = known
    posterior = fitted(case, ENGINES[name])
    mean, std = moments(posterior)
    shift = np.abs(mean - truth.mean) / truth.std
    ratio = std / truth.std
    tv = "" if name in ("MAP", "Ensemble") else f", total variation {total_variation(posterior, truth):.3f}"
    print(f"\n{case_name:15} {name:15} mean off by {shift.round(3)} std, std x {ratio.round(3)}{tv}")
    largest_shift, largest_log = BOUNDS[name]
    assert shift.max() <= largest_shift
    if name != "MAP":
        assert np.abs(np.log(ratio)).max() <= largest_log

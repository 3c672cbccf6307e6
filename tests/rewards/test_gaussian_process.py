"""Gaussian-process rewards against a dense implementation in function space, quadrature and the linear head."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import bayesrm as brm
from bayesrm.errors import ArgumentError, ConvergenceWarning, DataError, EngineError
from bayesrm.rewards._kernels import Kernel, covariance, median_distance, pivoted_root

GP = brm.rewards.GaussianProcess
BT = brm.likelihoods.BradleyTerry()
LAPLACE = brm.Laplace(gradient_tolerance=1e-10)


def make_data(items=30, rows=60, num_features=2, *, seed=0, features=None, **columns):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(items, num_features)) if features is None else features
    pairs = np.stack([rng.choice(len(features), 2, replace=False) for _ in range(rows)])
    d = np.sin(2.0 * features[pairs[:, 0]]).sum(1) - np.sin(2.0 * features[pairs[:, 1]]).sum(1)
    outcome = (rng.random(rows) > stats.logistic.cdf(2.0 * d)).astype(int)
    return brm.Comparisons.from_arrays(features, candidates=pairs, outcome=outcome, **columns)


def pairs_of(data):
    (group,) = data.groups()
    chosen = group.items.gather(1, group.outcome[:, None])[:, 0].numpy()
    return chosen, group.items.sum(1).numpy() - chosen


def dense(kernel, data, new, noise):
    """Chu and Ghahramani (2005): Laplace's mode of f by Newton in function space; evidence and belief at new items."""
    chosen, rejected = pairs_of(data)
    x = data.features
    K, n = kernel(x, x), len(x)
    A = np.eye(n)[chosen] - np.eye(n)[rejected]
    f = np.zeros(n)
    for _ in range(100):
        u = A @ f / (math.sqrt(2.0) * noise)
        ratio = np.exp(stats.norm.logpdf(u) - stats.norm.logcdf(u))
        g = A.T @ ratio / (math.sqrt(2.0) * noise)
        W = A.T @ ((ratio * (u + ratio))[:, None] * A) / (2.0 * noise**2)
        f = K @ np.linalg.solve(np.eye(n) + W @ K, W @ f + g)
    evidence = stats.norm.logcdf(u).sum() - 0.5 * f @ g - 0.5 * np.linalg.slogdet(np.eye(n) + W @ K)[1]
    cross = kernel(x, new)
    spread = kernel(new, new) - cross.T @ np.linalg.solve(np.eye(n) + W @ K, W @ cross)
    return evidence, cross.T @ g, spread


KERNELS = {
    "rbf": lambda d: np.exp(-0.5 * d**2),
    "matern52": lambda d: (1 + math.sqrt(5) * d + 5 * d**2 / 3) * np.exp(-math.sqrt(5) * d),
}


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", list(KERNELS))
def test_equals_the_dense_laplace_in_function_space(name, standardize):
    data, noise, precision, lengthscale = make_data(), 0.8, 0.4, 0.9
    used = data.features[np.unique(np.concatenate(pairs_of(data)))]
    spread = used.std(0) if standardize else 1.0

    def kernel(a, b):
        distance = np.linalg.norm((a[:, None] - b[None]) / spread, axis=-1)
        return KERNELS[name](distance / lengthscale) / precision

    new = np.random.default_rng(5).normal(scale=1.5, size=(6, 2))
    new[0] = data.features[3]
    evidence, mean, cov = dense(kernel, data, new, noise)
    process = GP(standardize=standardize, kernel=name, lengthscale=lengthscale)
    model = brm.RewardModel(process, brm.likelihoods.Thurstone(noise), brm.priors.Gaussian(precision))
    posterior = brm.fit(model, data, inference=LAPLACE)
    belief = posterior.predict(candidates=[new])
    assert posterior.report.log_evidence == pytest.approx(evidence, abs=1e-7)
    np.testing.assert_allclose(belief.mean[0], mean, atol=1e-7)
    np.testing.assert_allclose(belief.covariance[0], cov, atol=1e-7)
    # The answers moved it, and left the far points open: the comparison is not one of prior with prior.
    assert np.abs(mean).max() > 0.3
    assert cov[0, 0] < 0.7 * cov.max()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("num_features", [3, 40])
def test_linear_kernel_is_the_linear_head(standardize, num_features):
    data = make_data(num_features=num_features)
    new = [np.random.default_rng(1).normal(size=(4, num_features)), data.features[:3]]
    found = []
    for head in (GP(kernel="linear", standardize=standardize), brm.rewards.Linear(standardize=standardize)):
        posterior = brm.fit(brm.RewardModel(head, BT, brm.priors.Gaussian(2.0)), data, inference=LAPLACE)
        found.append((posterior.report.log_evidence, posterior.predict(candidates=new), posterior))
    (gp_evidence, gp, posterior), (evidence, linear, _) = found
    assert gp_evidence == pytest.approx(evidence, abs=1e-8)
    # The linear head's rewards may differ by the same constant everywhere where features are centred; ours are centred.
    torch.testing.assert_close(gp.mean, linear.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(gp.covariance, linear.covariance, rtol=0, atol=1e-8)
    assert len(posterior.program.reward.items) == min(num_features, len(data.features) - standardize)


def test_amplitude_is_tuned_as_the_weights_of_a_linear_head():
    data = make_data(num_features=3)
    engine = brm.Laplace(prior_precision="marginal_likelihood", gradient_tolerance=1e-9)
    heads = (GP(kernel="linear"), brm.rewards.Linear(standardize=True))
    gp, linear = (brm.fit(brm.RewardModel(head, BT), data, inference=engine) for head in heads)
    assert gp.program.prior.precision == pytest.approx(linear.program.prior.precision, rel=1e-4)
    assert gp.report.log_evidence == pytest.approx(linear.report.log_evidence, abs=1e-6)


def test_what_new_items_leave_open_follows_the_tuned_amplitude():
    data = make_data()
    engine = brm.Laplace(prior_precision="marginal_likelihood", gradient_tolerance=1e-10)
    tuned = brm.fit(brm.RewardModel(GP(lengthscale=0.7), BT), data, inference=engine)
    precision = tuned.program.prior.precision
    assert abs(math.log(precision)) > 0.3
    given = brm.fit(brm.RewardModel(GP(lengthscale=0.7), BT, brm.priors.Gaussian(precision)), data, inference=LAPLACE)
    far = [np.array([[30.0, 0.0], [0.0, 30.0], [0.1, 0.2]])]
    a, b = (p.predict(candidates=far) for p in (tuned, given))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-6, atol=1e-8)
    # Far from all items the prior is what is left.
    assert a.covariance[0, 0, 0].item() == pytest.approx(1.0 / precision, rel=1e-9)
    assert a.covariance[0, 0, 1].item() == pytest.approx(0.0, abs=1e-9)


def test_a_large_offset_costs_differences_nothing():
    data = make_data(num_features=3)
    shifted = data.with_features(np.concatenate([data.features, np.full((data.num_items, 1), 1e3)], 1))
    new = np.random.default_rng(1).normal(size=(4, 3))
    gp = brm.fit(brm.RewardModel(GP(kernel="linear", standardize=False), BT), shifted, inference=LAPLACE)
    linear = brm.fit(brm.RewardModel(brm.rewards.Linear(), BT), data, inference=LAPLACE)
    a = gp.predict(candidates=[np.concatenate([new, np.full((4, 1), 1e3)], 1)])
    b = linear.predict(candidates=[new])
    # The variance of a reward is 1e6, that of a difference of order one: 64-bit numbers hold the latter to 1e-10.
    assert a.covariance[0, 0, 0] > 0.9e6
    torch.testing.assert_close(a.differences().mean, b.differences().mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.differences().covariance, b.differences().covariance, rtol=0, atol=1e-5)
    assert gp.report.log_evidence == pytest.approx(linear.report.log_evidence, abs=1e-5)


def test_quadrature_for_two_items():
    x = np.array([[0.0], [0.7]])
    outcome = [0] * 26 + [1] * 14
    data = brm.Comparisons.from_arrays(x, candidates=[[0, 1]] * 40, outcome=outcome)
    process = GP(lengthscale=1.0, standardize=False)
    posterior = brm.fit(brm.RewardModel(process, BT), data, inference=LAPLACE)
    k = math.exp(-0.5 * 0.7**2)
    variance = 2.0 - 2.0 * k

    def density(d):
        return math.exp(26 * stats.logistic.logcdf(d) + 14 * stats.logistic.logcdf(-d) + 26.0) * stats.norm.pdf(
            d, scale=math.sqrt(variance)
        )

    total, first, second = (integrate.quad(lambda d, i=i: d**i * density(d), -8, 8)[0] for i in range(3))
    mean, var = first / total, second / total - (first / total) ** 2
    belief = posterior.predict(candidates=[np.array([[0.0], [0.7], [1.9]])])
    d = belief.covariance[0]
    # Laplace's own error at 40 answers: the third cumulant of the posterior is 0.02 of a standard deviation cubed.
    assert posterior.report.log_evidence == pytest.approx(math.log(total) - 26.0, abs=5e-3)
    assert (belief.mean[0, 0] - belief.mean[0, 1]).item() == pytest.approx(mean, abs=0.03 * math.sqrt(var))
    assert (d[0, 0] + d[1, 1] - 2 * d[0, 1]).item() == pytest.approx(var, rel=0.03)
    # The third item follows by regression on the difference, with the prior's variance around it.
    cross = math.exp(-0.5 * 1.9**2) - math.exp(-0.5 * 1.2**2)
    assert belief.mean[0, 2].item() == pytest.approx(cross / variance * mean, abs=0.01)
    assert d[2, 2].item() == pytest.approx(1.0 - cross**2 / variance * (1.0 - var / variance), abs=5e-3)


@pytest.mark.parametrize("precision", ["given", pytest.param("marginal_likelihood", marks=pytest.mark.slow)])
def test_the_evidence_finds_the_lengthscale(precision):
    features = np.linspace(-3.0, 3.0, 60)[:, None]
    rng = np.random.default_rng(2)
    pairs = np.stack([rng.choice(60, 2, replace=False) for _ in range(400)])
    design = brm.Comparisons.from_arrays(features, candidates=pairs, outcome=np.zeros(400, int))
    truth = brm.RewardModel(GP(standardize=False, lengthscale=0.5), BT, brm.priors.Gaussian(0.25))
    data = truth.simulate(design, seed=4).data
    process = GP(standardize=False, lengthscale="marginal_likelihood")
    engine = brm.Laplace(prior_precision=precision)
    posterior = brm.fit(brm.RewardModel(process, BT, brm.priors.Gaussian(0.25)), data, inference=engine)
    found = posterior.program.reward.lengthscale
    assert 0.3 < found < 0.8
    if precision == "marginal_likelihood":
        assert 0.05 < posterior.program.prior.precision < 1.0
    for factor in (0.7, 1.4):
        other = GP(standardize=False, lengthscale=found * factor)
        there = brm.fit(brm.RewardModel(other, BT, posterior.program.prior), data, inference=brm.Laplace())
        assert there.report.log_evidence < posterior.report.log_evidence
    assert f"GaussianProcess(rbf, {found:.3g}) reward" in posterior.summary()


def test_a_lengthscale_without_end_is_told():
    # Neighbours a five-hundredth of the median distance apart differ in reward: no shorter lengthscale is short enough.
    x = (np.arange(20.0)[:, None] + [0.0, 0.01]).reshape(-1, 1)
    better = np.random.default_rng(0).integers(2, size=20)
    pairs = np.repeat(np.arange(40).reshape(20, 2), 5, axis=0)
    data = brm.Comparisons.from_arrays(x, candidates=pairs, outcome=np.repeat(better, 5))
    model = brm.RewardModel(GP(lengthscale="marginal_likelihood"), BT, brm.priors.Gaussian(0.2))
    with pytest.warns(ConvergenceWarning, match="still grows as the lengthscale gets shorter"):
        brm.fit(model, data)


def test_repeated_items_are_one_item():
    data = make_data(items=15)
    chosen, rejected = pairs_of(data)
    rng = np.random.default_rng(3)
    copies = np.concatenate([data.features] * 3)
    pairs = np.stack([chosen, rejected], 1) + 15 * rng.integers(3, size=(len(data), 2))
    repeated = brm.Comparisons.from_arrays(copies, candidates=pairs, outcome=np.zeros(len(pairs), int))
    model = brm.RewardModel(GP(lengthscale=0.8, standardize=False), BT)
    a, b = (brm.fit(model, d, inference=LAPLACE) for d in (data, repeated))
    assert len(b.program.reward.items) == len(np.unique(np.concatenate([chosen, rejected])))
    assert a.report.log_evidence == pytest.approx(b.report.log_evidence, abs=1e-8)
    new = [np.random.default_rng(1).normal(size=(3, 2))]
    torch.testing.assert_close(
        a.predict(candidates=new).covariance, b.predict(candidates=new).covariance, atol=1e-8, rtol=0
    )


def test_prior_draws_have_the_kernel_as_covariance():
    data = make_data(items=12, rows=40)
    model = brm.RewardModel(GP(kernel="matern52", lengthscale=1.3, standardize=False), BT, brm.priors.Gaussian(4.0))
    head = model.reward.bind(torch.as_tensor(data.features), torch.zeros(2), torch.ones(2))
    phi = head.encode_features(torch.as_tensor(data.features), [12])
    K = covariance(Kernel.MATERN52, 1.3, *[torch.as_tensor(data.features)] * 2)
    torch.testing.assert_close(phi.values @ phi.values.T, K, atol=1e-9, rtol=0)
    assert phi.outside is None
    one = model.simulate(data, seed=3)
    z = one.parameters["weight"]
    assert torch.equal(one.rewards, phi.values @ z)
    assert torch.equal(one.rewards, model.simulate(data, seed=3).rewards)
    # 12 squared standard normal numbers over the precision 4: their sum is within 4 standard deviations of 3.
    assert abs(z.square().sum().item() - 3.0) < 4 * math.sqrt(2 * 12) / 4


def test_masked_rows_and_unused_items_bring_nothing():
    data = make_data()
    weight = np.ones(len(data))
    weight[40:] = 0.0
    weighted = make_data(weight=weight)
    model = brm.RewardModel(GP(), BT)
    a, b = brm.fit(model, weighted, inference=LAPLACE), brm.fit(model, data.select(np.arange(40)), inference=LAPLACE)
    assert a.program.reward.lengthscale == pytest.approx(b.program.reward.lengthscale, rel=1e-12)
    torch.testing.assert_close(
        a.predict(candidates=[data.features[:5]]).covariance,
        b.predict(candidates=[data.features[:5]]).covariance,
        atol=1e-8,
        rtol=0,
    )


@pytest.mark.parametrize("engine", [brm.Laplace(), brm.MAP(), brm.Laplace(coordinates="dual")])
def test_saved_posteriors_predict_the_same(engine, tmp_path):
    data = make_data()
    model = brm.RewardModel(GP(lengthscale=0.6), brm.likelihoods.Davidson(), brm.priors.Gaussian(0.5))
    posterior = brm.fit(model, data, inference=engine)
    posterior.save_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run")
    new = [np.random.default_rng(1).normal(scale=2.0, size=(3, 2)), data.features[:2]]
    a, b = (p.predict(candidates=new) for p in (posterior, again))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-12)
    assert again.program.reward.process == model.reward
    assert again.summary() == posterior.summary()
    assert again.predict_feedback(data, num_samples=8).nll == pytest.approx(
        posterior.predict_feedback(data, num_samples=8).nll, abs=1e-9
    )
    assert (a.std.max() == 0) == isinstance(engine, brm.MAP)


@pytest.mark.parametrize(
    "engine",
    [
        brm.engines.ImportanceSampling(num_samples=2000),
        pytest.param(brm.engines.SVI(), marks=pytest.mark.slow),
        pytest.param(brm.engines.NUTS(num_chains=2, num_samples=2000), marks=pytest.mark.slow),
    ],
)
def test_other_engines_serve_it_with_what_new_items_leave_open(engine, tmp_path):
    data = make_data(items=20, rows=80)
    model = brm.RewardModel(GP(lengthscale=0.8), BT, brm.priors.Gaussian(4.0))
    new = [np.array([[0.2, -0.1], [8.0, 0.0], [8.0, 0.1]])]
    laplace = brm.fit(model, data).predict(candidates=new)
    posterior = brm.fit(model, data, inference=engine)
    belief = posterior.predict(candidates=new)
    # Far from the data both are the prior, 1 / 4 and its correlation; near them Laplace is off by some hundredths.
    torch.testing.assert_close(belief.mean, laplace.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(belief.covariance, laplace.covariance, rtol=0, atol=0.03)
    assert belief.covariance[0, 1, 2] > 0.2
    assert posterior.draw(data, num_samples=10).rewards.shape == (10, 20)
    posterior.save_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run").predict(candidates=new)
    torch.testing.assert_close(again.covariance, belief.covariance, rtol=1e-10, atol=1e-10)


def test_the_point_of_map_is_the_mode_of_laplace():
    data = make_data()
    model = brm.RewardModel(GP(), BT)
    new = [np.random.default_rng(1).normal(size=(3, 2))]
    point = brm.fit(model, data, inference=brm.MAP(gradient_tolerance=1e-10)).predict(candidates=new)
    torch.testing.assert_close(
        point.mean, brm.fit(model, data, inference=LAPLACE).predict(candidates=new).mean, atol=1e-8, rtol=0
    )


def test_the_fitted_program_is_fitted_again_on_the_same_items_alone():
    data = make_data()
    first = brm.fit(brm.RewardModel(GP(), BT), data, inference=LAPLACE)
    again = brm.fit(first.program, data, inference=LAPLACE)
    assert again.report.log_evidence == first.report.log_evidence
    assert torch.equal(brm.fit(first.program, data.select(range(20))).program.reward.items, first.program.reward.items)
    point = brm.fit(first.program, data, inference=brm.MAP()).program
    for program in (first.program, point):
        with pytest.raises(EngineError, match=r"items of another fit, and 2\d of these 29 items are not among them"):
            brm.fit(program, make_data(seed=1))
    # A declared process takes any data.
    brm.fit(dataclasses.replace(first.program, reward=first.program.reward.process), make_data(seed=1))


def test_texts_go_through_the_extractor():
    extractor = brm.rewards.FeatureExtractor("any/model", inputs=("length",), cache_dir=False)
    prompts = ["a", "b", "c", "d"]
    data = brm.Comparisons.from_pairs(
        prompts, ["one"] * 4, ["one two three four", "one two", "one two three", "one " * 9]
    )
    model = brm.RewardModel(GP(extractor), BT)
    posterior = brm.fit(model, data, inference=LAPLACE)
    lengths = extractor.extract(["a"] * 3, ["one", "one two", "many " * 30])
    read = posterior.predict(["a"], [["one", "one two", "many " * 30]])
    given = posterior.predict(candidates=[lengths])
    torch.testing.assert_close(read.mean, given.mean)
    torch.testing.assert_close(read.covariance, given.covariance)
    assert read.mean[0, 0] > read.mean[0, 1]
    assert posterior.predict_items(data).mean.shape == (4, 2)
    with pytest.raises(DataError, match="item 1: the response is empty"):
        posterior.predict(["a"], [["one", " "]])
    bare = brm.fit(brm.RewardModel(GP(), BT), data.with_features(extractor.extract_items(data)), inference=LAPLACE)
    with pytest.raises(ArgumentError, match="fitted on precomputed features"):
        bare.predict(["a"], [["one", "two"]])
    with pytest.raises(DataError, match="no feature extractor"):
        bare.predict_items(data)


def test_settings_are_checked():
    for wrong in (0.0, -1.0, float("nan"), float("inf"), "median"):
        with pytest.raises(ArgumentError, match="`lengthscale` is"):
            GP(lengthscale=wrong)
    with pytest.raises(ArgumentError, match="kernel='linear' has none"):
        GP(kernel="linear", lengthscale=1.0)
    with pytest.raises(ArgumentError, match="`kernel` must be one of 'rbf', 'matern52', 'linear'"):
        GP(kernel="periodic")
    with pytest.raises(ArgumentError, match="as many parameters as there are training items"):
        GP().parameter_shapes(3)
    with pytest.raises(ArgumentError, match="takes feedback"):
        brm.RewardModel(GP(lengthscale="marginal_likelihood"), BT).simulate(make_data(), seed=0)


def test_what_cannot_be_fitted_is_refused():
    data, model = make_data(), brm.RewardModel(GP(), BT)
    with pytest.raises(EngineError, match=r"on 29 items needs about 2\.5e-05 GiB .* above `memory_gib=1e-06`"):
        brm.fit(model, data, inference=brm.Laplace(memory_gib=1e-6))
    with pytest.raises(DataError, match="the same features or none"):
        brm.fit(brm.RewardModel(GP(kernel="linear"), BT), data.with_features(np.ones((30, 2))))
    posterior = brm.fit(model, data)
    with pytest.raises(ArgumentError, match=r"shape \(2, 5\); the process was fitted on \(items, 2\)"):
        posterior.predict(candidates=[np.zeros((2, 5))])
    with pytest.raises(DataError, match="item 1 are not finite"):
        posterior.predict(candidates=[np.array([[0.0, 0.0], [np.nan, 0.0]])])
    with pytest.raises(DataError, match="every row has weight 0"):
        brm.fit(model, make_data(weight=np.zeros(60)))


def test_median_distance_and_root():
    x = torch.tensor([[0.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    # Distances between different items: 1, 3, 3, 2, 2; the middle one is 2.
    assert median_distance(x) == pytest.approx(2.0)
    assert median_distance(x[:1]) == 1.0
    assert median_distance(x[2:]) == 1.0
    K = covariance(Kernel.RBF, 1.0, x, x)
    root = pivoted_root(K)
    assert len(root.pivots) == 3
    torch.testing.assert_close(root.factor @ root.factor.T, K[root.pivots][:, root.pivots])

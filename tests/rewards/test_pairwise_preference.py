"""Pairwise preferences against quadrature, a direct Newton fit, and rewards, which cannot hold a cycle."""

import dataclasses

import numpy as np
import pytest
import torch
from pyro.ops.stats import effective_sample_size
from scipy import optimize, special

import bayesrm as brm
from bayesrm.errors import ArgumentError, DataError, LikelihoodError
from bayesrm.rewards import PairwiseHead, PairwisePreference, PreferenceBelief

BT = brm.likelihoods.BradleyTerry()
LAPLACE = brm.Laplace(gradient_tolerance=1e-10)


def cyclic_scores(f, strength=2.0):
    """Rock beats scissors beats paper beats rock: f_i x f_j in the plane, no reward at all."""
    return strength * (f[:, None, 0] * f[None, :, 1] - f[:, None, 1] * f[None, :, 0])


def make_data(items=25, rows=200, *, seed=0, scores=cyclic_scores, num_features=2, **columns):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(items, num_features))
    pairs = np.stack([rng.choice(items, 2, replace=False) for _ in range(rows)])
    p = special.expit(scores(features)[pairs[:, 0], pairs[:, 1]])
    outcome = (rng.random(rows) > p).astype(int)
    return brm.Comparisons.from_arrays(features, candidates=pairs, outcome=outcome, prompt_index=[0] * items, **columns)


def program(rank=2, likelihood=BT, **settings):
    prior = settings.pop("prior", brm.priors.Gaussian())
    return brm.RewardModel(PairwisePreference(rank=rank, **settings), likelihood, prior)


def own_features(head, f, g):
    """Features of single pairs, number by number."""
    x, y = ((v - np.array(head.center)) / np.array(head.spread) for v in (f, g))
    directions = np.array(head.directions).reshape(head.rank, -1)
    u, v = directions @ x, directions @ y
    wedge = [u[a] * v[b] - u[b] * v[a] for b in range(len(u)) for a in range(b)]
    return np.concatenate([x - y, wedge])


def own_design(head, data):
    """Signed features of the rows, so that sigmoid(design . theta) is the probability of the answer given."""
    (group,) = data.groups()
    rows = np.stack([own_features(head, *data.features[pair]) for pair in group.items.numpy()])
    return rows * (1 - 2 * group.outcome.numpy())[:, None]


def test_a_cycle_is_recovered_where_a_reward_is_no_better_than_chance():
    data, held_out = make_data(rows=600, seed=1), make_data(rows=2000, seed=1)
    # The same items, other answers.
    held_out = brm.Comparisons.from_arrays(
        data.features, candidates=held_out.groups()[0].items.numpy(), outcome=_answers(data.features, held_out, 5)
    )
    pairwise = brm.fit(program(), data)
    linear = brm.fit(brm.RewardModel(brm.rewards.Linear(standardize=True), BT), data)
    truth = cyclic_scores(data.features)
    (group,) = held_out.groups()
    s = truth[group.items[:, 0], group.items[:, 1]] * (1 - 2 * group.outcome.numpy())
    best = -np.log(special.expit(s)).mean()
    found, scalar = pairwise.predict_feedback(held_out).nll, linear.predict_feedback(held_out).nll
    assert found < best + 0.02
    assert scalar > best + 0.1
    # A reward's probability is a half in the middle of the cycle: no better than a coin.
    assert abs(scalar - np.log(2.0)) < 0.05
    matrix = pairwise.predict_preferences(candidates=[data.features]).preference_matrix()[0].numpy()
    sure = np.abs(truth) > 0.7
    assert ((matrix > 0.5) == (truth > 0))[sure].all()


def _answers(features, data, seed):
    (group,) = data.groups()
    p = special.expit(cyclic_scores(features)[group.items[:, 0], group.items[:, 1]])
    return (np.random.default_rng(seed).random(len(p)) > p).astype(int)


def test_scores_are_antisymmetric_to_the_last_bit():
    data = make_data(num_features=5, rows=60)
    head = PairwisePreference(rank=4).bind(data)
    f = torch.as_tensor(data.features)
    i, j = torch.randint(25, (2, 100), generator=torch.Generator().manual_seed(0))
    there, back = head.encode_pairs(f[i], f[j]), head.encode_pairs(f[j], f[i])
    assert head.num_features == there.shape[1] == 5 + 6
    assert torch.equal(there, -back)
    assert not head.encode_pairs(f[i], f[i]).any()
    np.testing.assert_allclose(there[3], own_features(head, f[i[3]].numpy(), f[j[3]].numpy()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "inference", [brm.Laplace(), brm.MAP(), brm.Ensemble(num_members=4)], ids=lambda e: type(e).__name__
)
def test_preference_matrices_sum_to_one_with_their_transpose(inference):
    data = make_data(num_features=3)
    belief = brm.fit(program(rank=3), data, inference=inference).predict_preferences(
        candidates=[data.features[:4], data.features[4:5], data.features[5:8]]
    )
    sizes = torch.tensor([4, 1, 3])
    valid = torch.arange(4) < sizes[:, None]
    assert torch.equal(belief.mask, valid)
    both = valid[:, :, None] & valid[:, None, :]
    for matrix in (belief.preference_matrix(), belief.prob_better(), *belief.sample(3, seed=0)):
        # 1 - p is exact to half a unit in the last place.
        torch.testing.assert_close(matrix + matrix.transpose(1, 2), both.double(), rtol=0, atol=1.2e-16)
        assert (matrix.diagonal(dim1=1, dim2=2) == 0.5 * valid).all()


def test_laplace_equals_a_direct_newton_fit():
    data = make_data(num_features=3, rows=150, seed=3)
    posterior = brm.fit(
        program(rank=3, prior=brm.priors.Gaussian({"weight": 2.0, "intransitive": 0.5})), data, inference=LAPLACE
    )
    head = posterior.program.reward
    X, precision = own_design(head, data), np.repeat([2.0, 0.5], 3)

    def negative(t):
        return -np.log(special.expit(X @ t)).sum() + 0.5 * (precision * t**2).sum()

    def gradient(t):
        return -X.T @ special.expit(-X @ t) + precision * t

    mode = optimize.minimize(negative, np.zeros(6), jac=gradient, method="BFGS", options={"gtol": 1e-10}).x
    for _ in range(3):
        p = special.expit(X @ mode)
        H = X.T @ ((p * (1 - p))[:, None] * X) + np.diag(precision)
        mode = mode - np.linalg.solve(H, gradient(mode))
    found = torch.cat([posterior.parameters["weight"], posterior.parameters["intransitive"]])
    np.testing.assert_allclose(found, mode, atol=1e-9)
    evidence = -negative(mode) + 0.5 * np.log(precision).sum() - 0.5 * np.linalg.slogdet(H)[1]
    assert abs(posterior.report.log_evidence - evidence) < 1e-8
    phi = own_features(head, data.features[7], data.features[2])
    std = np.sqrt(phi @ np.linalg.solve(H, phi))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = weights @ special.expit(phi @ mode + std * nodes) / weights.sum()
    matrix = posterior.predict_preferences(candidates=[data.features]).preference_matrix()[0]
    assert abs(float(matrix[7, 2]) - expected) < 2e-6


def by_quadrature(data):
    """Posterior mean of the preference probabilities of all items, three parameters on a grid of 33^3 points."""
    head = PairwisePreference(rank=2).bind(data)
    X = own_design(head, data)
    mode = np.zeros(3)
    for _ in range(100):
        p = special.expit(X @ mode)
        H = X.T @ ((p * (1 - p))[:, None] * X) + np.eye(3)
        mode = mode + np.linalg.solve(H, X.T @ (1 - p) - mode)
    axis = np.linspace(-7.0, 7.0, 33)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = mode + np.linalg.solve(np.linalg.cholesky(H).T, grid.T).T
    # Of few items there are few different answers.
    different, count = np.unique(X, axis=0, return_counts=True)
    log_joint = np.log(special.expit(grid @ different.T)) @ count - 0.5 * (grid**2).sum(1)
    weight = np.exp(log_joint - log_joint.max())
    n = data.num_items
    phi = np.stack([own_features(head, data.features[i], data.features[j]) for i in range(n) for j in range(n)])
    return (weight @ special.expit(grid @ phi.T) / weight.sum()).reshape(n, n)


@pytest.fixture(scope="module")
def tiny():
    """Twelve answers, three parameters."""
    data = make_data(items=5, rows=12, seed=2)
    return data, by_quadrature(data)


def test_laplace_approaches_quadrature_as_one_over_the_number_of_answers(tiny):
    def error(data, exact):
        belief = brm.fit(program(), data, inference=LAPLACE).predict_preferences(candidates=[data.features])
        return np.abs(belief.preference_matrix()[0].numpy() - exact).max()

    some, many = (make_data(items=5, rows=rows, seed=2) for rows in (480, 7680))
    error_of_some = error(some, by_quadrature(some))
    assert error_of_some < 0.01
    assert error(many, by_quadrature(many)) < error_of_some / 10
    # With a dozen answers Laplace is far off, so that the comparison can fail.
    assert error(*tiny) > 0.02


def test_nuts_agrees_with_quadrature(tiny):
    data, exact = tiny
    engine = brm.NUTS(num_chains=2, num_samples=800, num_warmup=200)
    belief = brm.fit(program(), data, inference=engine, seed=1).predict_preferences(candidates=[data.features])
    assert belief.scores.draws is not None
    draws = torch.sigmoid(belief.scores.draws)[:, 0, 1:]
    effective = effective_sample_size(draws.reshape(2, 800, -1), chain_dim=0, sample_dim=1)
    error = draws.std(0) / effective.clamp_max(1600.0).sqrt()
    i, j = torch.tril_indices(5, 5, -1)[[1, 0]]
    gap = (draws.mean(0) - torch.as_tensor(exact)[i, j]).abs()
    assert (gap < 4.5 * error).all()
    torch.testing.assert_close(belief.preference_matrix()[0, i, j], draws.mean(0))


def test_importance_sampling_corrects_laplace_to_quadrature(tiny):
    data, exact = tiny
    corrected = brm.fit(program(), data, inference=brm.ImportanceSampling(num_samples=10_000), seed=0)
    found = corrected.predict_preferences(candidates=[data.features]).preference_matrix()[0].numpy()
    rough = brm.fit(program(), data).predict_preferences(candidates=[data.features]).preference_matrix()[0].numpy()
    # A probability varies by at most 1/2; half of the draws count at least.
    assert np.abs(found - exact).max() < 4.5 * 0.5 / np.sqrt(5_000)
    assert np.abs(found - exact).max() < 0.25 * np.abs(rough - exact).max()


def test_the_order_in_which_a_row_names_its_responses_is_immaterial():
    data = make_data(rows=80)
    (group,) = data.groups()
    turned = brm.Comparisons.from_arrays(
        data.features, candidates=group.items.numpy()[:, ::-1].copy(), outcome=1 - group.outcome.numpy()
    )
    one, other = brm.fit(program(), data, inference=LAPLACE), brm.fit(program(), turned, inference=LAPLACE)
    for site in ("weight", "intransitive"):
        torch.testing.assert_close(one.parameters[site], other.parameters[site], rtol=1e-9, atol=1e-9)


def test_without_cycles_the_part_that_holds_them_stays_small_and_tuning_finds_that_out():
    def transitive(f):
        r = 1.5 * f[:, 0] - f[:, 1]
        return r[:, None] - r[None, :]

    def tuned(scores):
        data = make_data(items=60, rows=1500, seed=4, scores=scores)
        prior = brm.priors.Gaussian({"weight": 1.0, "intransitive": 1.0})
        return brm.fit(program(prior=prior), data, inference=brm.Laplace(prior_precision="marginal_likelihood"))

    flat, cyclic = tuned(transitive), tuned(cyclic_scores)
    assert flat.parameters["intransitive"].abs().max() < 0.15
    assert cyclic.parameters["intransitive"].abs().min() > 1.0


def test_ties_margins_raters_and_weights_reach_the_likelihood():
    data = make_data(rows=120)
    (group,) = data.groups()
    outcome = group.outcome.numpy().copy()
    outcome[::5] = 2
    rng = np.random.default_rng(0)
    columns = {
        "annotator": [["ann", "bob"][k] for k in rng.integers(0, 2, 120)],
        "weight": rng.integers(0, 3, 120).astype(float),
        "margin": rng.normal(size=120),
    }
    data = brm.Comparisons.from_arrays(data.features, candidates=group.items.numpy(), outcome=outcome, **columns)
    head = PairwisePreference(rank=2).bind(data)
    (group,), (paired,) = data.groups(), head.pairs(data).groups()
    assert torch.equal(group.outcome, paired.outcome)
    assert torch.equal(group.weight, paired.weight)
    assert torch.equal(group.comparison.annotator, paired.comparison.annotator)
    assert torch.equal(group.comparison.margin, paired.comparison.margin)
    posterior = brm.fit(program(likelihood=brm.likelihoods.Davidson()), data)
    # Weights are as good as repetitions.
    repeated = data.select(np.repeat(np.arange(120), columns["weight"].astype(int)))
    ones = brm.Comparisons.from_arrays(
        repeated.features,
        candidates=repeated.groups()[0].items.numpy(),
        outcome=repeated.groups()[0].outcome.numpy(),
        margin=repeated.groups()[0].comparison.margin.numpy(),
    )
    again = brm.fit(program(likelihood=brm.likelihoods.Davidson()), ones)
    candidates = [data.features[:6]]
    torch.testing.assert_close(
        posterior.predict_preferences(candidates=candidates).preference_matrix(),
        again.predict_preferences(candidates=candidates).preference_matrix(),
        rtol=0,
        atol=1e-5,
    )


def test_everything_that_reads_comparisons_takes_them_as_they_are(tmp_path):
    data = make_data(rows=90)
    posterior = brm.fit(program(), data)
    draws = posterior.draw(data, num_samples=50)
    assert draws.log_ratio is not None
    assert posterior.predict_feedback(data).nll < np.log(2.0)
    assert posterior.to_arviz(data, num_samples=20).log_likelihood["feedback"].shape == (1, 20, 90)
    head = posterior.program.reward
    paired = head.pairs(data)
    assert head.pairs(paired) is paired
    torch.testing.assert_close(posterior.predict_feedback(paired).log_prob, posterior.predict_feedback(data).log_prob)
    # What was fitted can be fitted again.
    again = brm.fit(posterior.program, data)
    torch.testing.assert_close(again.parameters["intransitive"], posterior.parameters["intransitive"])
    assert brm.diagnostics.loo(posterior, data, by="row").elpd < 0.0


@pytest.mark.parametrize("inference", [brm.Laplace(), brm.Ensemble(num_members=3)], ids=lambda e: type(e).__name__)
def test_a_posterior_comes_back_from_disk(inference, tmp_path):
    data = make_data(num_features=4, rows=70)
    posterior = brm.fit(program(rank=3), data, inference=inference)
    posterior.save_pretrained(tmp_path / "run")
    loaded = brm.Posterior.from_pretrained(tmp_path / "run")
    assert loaded.program.reward == posterior.program.reward
    candidates = [data.features[:7], data.features[7:9]]
    one, other = (p.predict_preferences(candidates=candidates) for p in (posterior, loaded))
    # Products of matrices round by where they lie in memory.
    torch.testing.assert_close(one.preference_matrix(), other.preference_matrix(), rtol=0, atol=1e-12)
    torch.testing.assert_close(one.sample(5, seed=1), other.sample(5, seed=1), rtol=0, atol=1e-12)
    assert abs(loaded.predict_feedback(data).nll - posterior.predict_feedback(data).nll) < 1e-12


@pytest.mark.parametrize("as_draws", [False, True])
def test_a_reward_gives_the_same_matrix_by_both_ways(as_draws):
    generator = torch.Generator().manual_seed(0)
    mean, root = torch.randn(2, 4, generator=generator).double(), torch.randn(2, 4, 3, generator=generator).double()
    belief = brm.RewardBelief(mean, root, torch.tensor([[True] * 4, [True, True, False, False]]))
    if as_draws:
        belief = brm.RewardBelief.from_draws(belief.sample(200, seed=0), belief.mask)
    pairwise = PreferenceBelief.from_rewards(belief)
    torch.testing.assert_close(pairwise.preference_matrix(), belief.preference_matrix(), rtol=0, atol=1e-12)
    torch.testing.assert_close(pairwise.prob_better(), belief.prob_better(), rtol=0, atol=1e-12)
    sampled = pairwise.sample(3, seed=4)
    rewards = belief.sample(3, seed=4)
    expected = torch.sigmoid(rewards[..., :, None] - rewards[..., None, :])
    torch.testing.assert_close(sampled[:, 0], expected[:, 0], rtol=0, atol=1e-12)


def test_directions_are_the_leading_ones_of_the_differences():
    rng = np.random.default_rng(0)
    # Prompts are far apart along axis 2, which no comparison sees.
    features = rng.normal(size=(40, 4)) * [3.0, 2.0, 0.0, 0.1]
    features[:, 2] = np.repeat(np.arange(20), 2) * 5.0
    data = brm.Comparisons.from_arrays(features, candidates=np.arange(40).reshape(20, 2), outcome=[0] * 20)
    head = PairwisePreference(rank=2, standardize=False).bind(data)
    directions = np.array(head.directions).reshape(2, 4)
    assert np.abs(directions[:, 2]).max() < 1e-12
    assert (np.abs(directions[:, 3]) < 0.1 * np.abs(directions[:, :2]).max(1)).all()
    g = (features - np.array(head.center)) @ directions.T
    np.testing.assert_allclose(g.std(0), 1.0, rtol=1e-12)


def test_what_cannot_be_served_is_refused_before_work_starts():
    features = np.random.default_rng(0).normal(size=(4, 3))
    ranking = brm.Comparisons.from_arrays(features, candidates=[[0, 1, 2]], outcome=[[2, 0, 1]], kind="ranking")
    pair = brm.Comparisons.from_arrays(features, candidates=[[0, 1]], outcome=[0])
    with pytest.raises(DataError, match=r"row 1: .*ranking of 3"):
        brm.fit(program(), brm.Comparisons.concatenate([pair, ranking]))
    with pytest.raises(DataError, match="approval of 1"):
        brm.fit(program(), brm.Comparisons.from_arrays(features, outcome=[0, 1, 0, 1], kind="approval"))
    data = make_data(rows=20, words=list(range(25)))
    with pytest.raises(LikelihoodError, match="lengths"):
        brm.fit(program(likelihood=brm.likelihoods.LengthBias(BT)), data)

    def good_enough(rewards, comparison):
        return brm.dist.Categorical(logits=torch.cat([rewards, 0.0 * rewards[:, :1]], dim=1))

    with pytest.raises(LikelihoodError, match="more than the difference"):
        brm.fit(program(likelihood=good_enough), pair)
    with pytest.raises(DataError, match="in 1 direction"):
        brm.fit(program(), brm.Comparisons.from_arrays(features, candidates=[[0, 1]] * 5, outcome=[0] * 5))
    nothing = brm.Comparisons.from_arrays(features, candidates=[[0, 1]], outcome=[0], weight=[0.0])
    with pytest.raises(DataError, match="weight 0"):
        brm.fit(program(), nothing)
    with pytest.raises(DataError, match="no features"):
        brm.fit(program(), brm.Comparisons.from_pairs(["Hi"], ["Hello!"], ["What?"]))
    with pytest.raises(ArgumentError, match="rank"):
        PairwisePreference(rank=1)
    with pytest.raises(ArgumentError, match="no reward of a single response"):
        PairwisePreference().parameter_shapes(3)
    posterior = brm.fit(program(), make_data(rows=30))
    with pytest.raises(ArgumentError, match="predict_preferences"):
        posterior.predict(candidates=[np.zeros((2, 2))])
    with pytest.raises(ArgumentError, match="predict_preferences"):
        posterior.predict_items(make_data(rows=30))
    with pytest.raises(ArgumentError, match=r"fitted on \(items, 2\)"):
        posterior.predict_preferences(candidates=[np.zeros((2, 3))])
    with pytest.raises(DataError, match="item 1 are not finite"):
        posterior.predict_preferences(candidates=[np.array([[0.0, 1.0], [np.nan, 0.0]])])
    with pytest.raises(ArgumentError, match="precomputed features"):
        posterior.predict_preferences(["Hi"], [["one", "two"]])
    with pytest.raises(ArgumentError, match="must be"):
        PreferenceBelief(brm.RewardBelief(torch.zeros(1, 3), torch.zeros(1, 3, 1)), torch.ones(1, 3, dtype=torch.bool))


def test_the_head_holds_plain_numbers():
    head = PairwisePreference(rank=2).bind(make_data(rows=30))
    assert isinstance(head, PairwiseHead)
    assert hash(head) == hash(dataclasses.replace(head))


class WordLengths(brm.rewards.FeatureExtractor):
    """Two numbers that need no model."""

    def extract(self, prompts, responses, *, progress=False):
        return np.array([[len(r), len(r.split())] for r in responses], float)

    def extract_items(self, data, *, progress=False):
        return self.extract(*zip(*[data.text(i) for i in range(data.num_items)], strict=True))


def test_texts_go_through_the_extractor():
    extractor = WordLengths("any/model")
    texts = ["one", "one two", "many " * 30, "few words here"]
    data = brm.Comparisons.from_pairs(["a", "a", "b"], texts[:3], texts[1:])
    posterior = brm.fit(program(features=extractor), data)
    bare = brm.fit(program(), data.with_features(extractor.extract_items(data)))
    torch.testing.assert_close(
        posterior.predict_preferences(["a", "b"], [texts, texts[:1]]).preference_matrix(),
        bare.predict_preferences(
            candidates=[extractor.extract([], part) for part in (texts, texts[:1])]
        ).preference_matrix(),
    )
    assert (
        posterior.predict_feedback(data).nll
        == bare.predict_feedback(data.with_features(extractor.extract_items(data))).nll
    )
    with pytest.raises(ArgumentError, match="`prompts` is missing"):
        posterior.predict_preferences(candidates=[texts])
    with pytest.raises(ArgumentError, match="2 prompts but candidates for 1"):
        posterior.predict_preferences(["a", "b"], [texts])
    with pytest.raises(ArgumentError, match="mixes arrays"):
        posterior.predict_preferences(["a", "b"], [texts, np.zeros((1, 2))])

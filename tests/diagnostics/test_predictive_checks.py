"""Statistics against counts by hand and other implementations; checks pass right models and catch planted faults."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

import bayesrm as brm
from bayesrm.diagnostics import Feedback, PredictiveCheck, all_predictive_checks, predictive_check
from bayesrm.diagnostics import feedback_statistics as checks
from bayesrm.errors import ArgumentError


def make(candidates, outcome, *, num_items=None, **settings):
    num_items = num_items or int(np.max(candidates)) + 1
    return brm.Comparisons.from_arrays(np.zeros((num_items, 1)), candidates=candidates, outcome=outcome, **settings)


def design(rows=300, num_items=200, num_features=3, seed=0, **settings):
    """Pairs of random items, in random order."""
    rng = np.random.default_rng(seed)
    return brm.Comparisons.from_arrays(
        rng.normal(size=(num_items, num_features)),
        candidates=np.stack([rng.choice(num_items, 2, replace=False) for _ in range(rows)]),
        outcome=np.zeros(rows, int),
        prompt_index=np.zeros(num_items, int),
        **settings,
    )


def linear(likelihood):
    return brm.RewardModel(brm.rewards.Linear(), likelihood)


def fitted(likelihood, data, engine=None):
    return brm.fit(linear(likelihood), data, inference=engine or brm.Laplace())


# Statistics


def test_rates_of_choices_by_hand():
    data = make(
        [[0, 1], [2, 1], [0, 2], [1, 2], [1, 0]],
        [0, 1, 2, 0, 1],
        words=[10, 30, 20],
        weight=[1.0, 2.0, 1.0, 1.0, 0.0],
    )
    f = Feedback.of(data, np.array([3.0, 2.0, 1.0]))
    assert checks.tie_rate(f) == pytest.approx(1 / 5)
    # Decided: row 0 (first, short), row 1 of weight 2 (second, long), row 3 (first, long).
    assert checks.first_position_rate(f) == pytest.approx(2 / 4)
    assert checks.longest_wins_rate(f) == pytest.approx(3 / 4)
    assert checks.predicted_best_rate(f) == pytest.approx(1.0)
    by_difference = checks.tie_rate_by_difference(f, num_bins=2)
    assert list(by_difference) == ["difference 1: 1 to 1", "difference 2: 1 to 2"]
    # Differences 1, 1, 2, 1: rows 0 and 1, then rows 3 and 2.
    assert list(by_difference.values()) == pytest.approx([0.0, 0.5])


def test_rates_of_rankings_ratings_and_approvals_by_hand():
    ranking = make([[0, 1, 2]] * 4, [[2, 0, 1], [2, 1, 0], [0, 1, 2], [1, 0, 2]], kind="ranking", words=[5, 5, 9])
    f = Feedback.of(ranking, np.array([2.0, 1.0, 3.0]))
    assert checks.longest_wins_rate(f) == 0.5
    assert checks.first_position_rate(f) == 0.25
    # Predicted ranks of the winners: 0, 0, 1, 2.
    assert checks.first_place_entropy(f) == pytest.approx(scipy.stats.entropy([0.5, 0.25, 0.25]))
    rating = brm.Comparisons.from_arrays(np.zeros((5, 1)), outcome=[0, 2, 2, 1, 2], kind="rating", num_levels=4)
    assert checks.rating_levels(Feedback.of(rating)) == {"level 0": 0.2, "level 1": 0.2, "level 2": 0.6, "level 3": 0.0}
    approval = brm.Comparisons.from_arrays(np.zeros((4, 1)), outcome=[0, 1, 1, 1], kind="approval")
    assert checks.approval_rate(Feedback.of(approval)) == 0.75


def test_intransitive_triads_equal_a_count_over_all_triads():
    rng = np.random.default_rng(0)
    pairs = np.array([rng.permutation(pair) for pair in itertools.combinations(range(12), 2) for _ in range(3)])
    pairs = pairs[rng.random(len(pairs)) < 0.6]
    data = make(pairs, rng.integers(0, 3, len(pairs)))
    net = np.zeros((12, 12))
    compared = np.zeros((12, 12), bool)
    for (a, b), outcome in zip(pairs, data.groups()[0].outcome.tolist(), strict=True):
        compared[a, b] = compared[b, a] = True
        net[a, b] += (outcome == 0) - float(outcome == 1)
        net[b, a] -= (outcome == 0) - float(outcome == 1)
    cycles = decided = 0
    for a, b, c in itertools.combinations(range(12), 3):
        if compared[a, b] and compared[b, c] and compared[a, c] and net[a, b] * net[b, c] * net[a, c] != 0:
            wins = [(net[x] > 0)[[a, b, c]].sum() for x in (a, b, c)]
            decided += 1
            cycles += wins == [1, 1, 1]
    assert decided > 20
    assert cycles > 0
    assert checks.intransitive_triads(Feedback.of(data)) == pytest.approx(cycles / decided)


def test_agreement_is_that_of_fleiss():
    # Ten subjects, fourteen raters, five categories: the worked example of https://en.wikipedia.org/wiki/Fleiss'_kappa,
    # observed agreement 0.378, kappa 0.210.
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    level = np.concatenate([np.repeat(np.arange(5), row) for row in table])
    settings = {"kind": "rating", "num_levels": 5, "annotator": [str(i % 14) for i in range(140)]}
    found = checks.rater_agreement(Feedback.of(make(np.repeat(np.arange(10), 14)[:, None], level, **settings)))
    assert found["agreement"] == pytest.approx(0.378, abs=5e-4)
    assert found["kappa"] == pytest.approx(0.210, abs=5e-4)


def test_agreement_of_two_raters_equals_cohens_where_their_marginals_are_equal():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    a = rng.integers(0, 3, 40)
    b = np.where(rng.random(40) < 0.5, a, rng.integers(0, 3, 40))
    # Each pair of ratings also the other way round, so that both raters use each level equally often.
    first, second = np.concatenate([a, b]), np.concatenate([b, a])
    data = make(
        np.tile(np.arange(80), 2)[:, None],
        np.concatenate([first, second]),
        kind="rating",
        num_levels=3,
        annotator=["x"] * 80 + ["y"] * 80,
    )
    assert checks.rater_agreement(Feedback.of(data))["kappa"] == pytest.approx(metrics.cohen_kappa_score(first, second))


def test_agreement_on_choices_knows_candidates_not_positions_and_asks_different_annotators():
    # Two raters prefer item 0 whatever its position; the third answer is a second one of rater x.
    data = make([[0, 1], [1, 0], [0, 1], [2, 3]], [0, 1, 1, 0], annotator=["x", "y", "x", "y"])
    # Pairs of different raters: (row 0, row 1) agree, (row 1, row 2) do not; chance is 1/2 without ties.
    assert checks.rater_agreement(Feedback.of(data)) == {"agreement": 0.5, "kappa": 0.0}
    ties = make([[0, 1], [1, 0], [2, 3], [3, 2]], [2, 2, 0, 1], annotator=["x", "y", "x", "y"])
    chance = 0.5**2 + 0.5**2 / 2
    assert checks.rater_agreement(Feedback.of(ties)) == {"agreement": 1.0, "kappa": pytest.approx((1 - chance) / 0.625)}


def test_agreement_by_annotator_by_hand():
    data = make([[0, 1], [1, 0], [0, 1], [0, 1]], [0, 0, 2, 1], annotator=["b", "a", "b", "b"])
    f = Feedback.of(data, np.array([1.0, 0.0]))
    assert checks.agreement_by_annotator(f) == {"a": 0.0, "b": 0.5}


@pytest.mark.parametrize(
    ("statistic", "data", "match"),
    [
        (checks.tie_rate, brm.Comparisons.from_arrays([[0.0]], outcome=[0], kind="approval"), "needs choices"),
        (checks.first_position_rate, make([[0, 1], [2, 3]], [0, 0]), "list the winner first"),
        (checks.longest_wins_rate, make([[0, 1]], [1]), "lengths"),
        (checks.intransitive_triads, make([[0, 1], [1, 2]], [0, 1]), "three items"),
        (checks.intransitive_triads, make([[0, 1, 2]], [1]), "two candidates"),
        (checks.rater_agreement, make([[0, 1], [1, 2]], [0, 1]), "two annotators"),
        (checks.rating_levels, make([[0, 1]], [1]), "needs ratings"),
        (checks.approval_rate, make([[0, 1]], [1]), "needs approvals"),
        (checks.first_place_entropy, make([[0, 1]], [1]), "three candidates"),
        (checks.agreement_by_annotator, make([[0, 1]], [1]), "named annotators"),
        (checks.predicted_best_rate, make([[0, 1]], [1]), "`rewards` is missing"),
    ],
)
def test_statistics_say_what_they_need(statistic, data, match):
    with pytest.raises(ArgumentError, match=match):
        statistic(Feedback.of(data))


# Checks


def test_replicates_follow_the_predictive_distribution():
    data = linear(brm.likelihoods.Davidson()).simulate(design(rows=100), seed=1).data
    posterior = fitted(brm.likelihoods.Davidson(), data)
    check = predictive_check(posterior, data, checks.tie_rate, num_samples=400, seed=3)
    (group,) = posterior.predict_feedback(data, num_samples=256).groups
    # Mean by another route: Sobol integration of each row's tie probability.
    expected = float(group.probs[:, 2].mean())
    assert check.replicated.mean() == pytest.approx(expected, abs=4 * check.replicated.std() / 400**0.5)
    # A point posterior leaves the Bernoulli spread of independent rows alone.
    point = fitted(brm.likelihoods.Davidson(), data, brm.MAP())
    probs = point.predict_feedback(data).groups[0].probs[:, 2].numpy()
    spread = predictive_check(point, data, checks.tie_rate, num_samples=400, seed=3).replicated.std()
    # Standard error of a standard deviation from 400 draws: 1 / sqrt(800).
    assert spread == pytest.approx((probs * (1 - probs)).sum() ** 0.5 / 100, rel=4 / 800**0.5)


def test_p_values_by_hand():
    check = PredictiveCheck(
        "x", ("a", "b"), np.array([2.0, np.nan]), np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [np.nan, 1.0]])
    )
    assert check.p_greater[0] == pytest.approx(3 / 4)
    assert check.p_less[0] == pytest.approx(3 / 4)
    assert check.p_value[0] == 1.0
    assert np.isnan(check.p_value[1])
    assert str(check).splitlines()[0] == "x, a: 2, replicated 1.1 to 2.9 (90%), p = 1"


#: What is wrong with the data, a likelihood that does not know of it, and the check that must notice.
def order_bias(data, rng):
    group = data.groups()[0]
    return data.with_outcomes([torch.where(torch.as_tensor(rng.random(len(data)) < 0.3), 0, group.outcome)])


def careless_ties(data, rng):
    group = data.groups()[0]
    return data.with_outcomes([torch.where(torch.as_tensor(rng.random(len(data)) < 0.25), 2, group.outcome)])


def one_spammer(data, rng):
    group = data.groups()[0]
    spam = group.comparison.annotator == 0
    return data.with_outcomes([torch.where(spam, torch.as_tensor(rng.integers(0, 2, len(data))), group.outcome)])


def long_wins(data, rng):
    group = data.groups()[0]
    forced = torch.as_tensor(rng.random(len(data)) < 0.3)
    return data.with_outcomes([torch.where(forced, group.comparison.lengths.argmax(1), group.outcome)])


FAULTS = {
    "order": (order_bias, brm.likelihoods.BradleyTerry(), checks.first_position_rate, {}),
    "ties": (careless_ties, brm.likelihoods.Davidson(), checks.tie_rate_by_difference, {}),
    "spammer": (
        one_spammer,
        brm.likelihoods.BradleyTerry(),
        checks.agreement_by_annotator,
        {"annotator": [str(i % 6) for i in range(300)]},
    ),
    "length": (
        long_wins,
        brm.likelihoods.BradleyTerry(),
        checks.longest_wins_rate,
        {"words": np.random.default_rng(2).integers(10, 300, 200)},
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_caught_by_its_check_and_right_data_pass(fault):
    plant, likelihood, statistic, settings = FAULTS[fault]
    right = linear(likelihood).simulate(design(**settings), seed=4).data
    wrong = plant(right, np.random.default_rng(5))
    passed = predictive_check(fitted(likelihood, right), right, statistic, num_samples=200)
    caught = predictive_check(fitted(likelihood, wrong), wrong, statistic, num_samples=200)
    # Bonferroni over the numbers of a check.
    assert passed.p_value.min() > 0.01 / len(passed.labels)
    assert caught.p_value.min() == 2 / 201
    if fault == "spammer":
        assert caught.labels[caught.p_value.argmin()] == "0"


def test_a_likelihood_that_knows_of_length_passes_where_the_plain_one_fails():
    settings = {"words": np.random.default_rng(3).integers(10, 400, 200)}
    aware = brm.likelihoods.LengthBias(brm.likelihoods.BradleyTerry())
    model = linear(aware)
    truth = {"length_coefficient": torch.tensor(1.0)}
    data = model.simulate(design(**settings), seed=6, latents=truth).data
    assert predictive_check(fitted(aware, data), data, checks.longest_wins_rate, num_samples=200).p_value[0] > 0.05
    plain = fitted(brm.likelihoods.BradleyTerry(), data)
    assert predictive_check(plain, data, checks.longest_wins_rate, num_samples=200).p_value[0] == 2 / 201


def test_cycles_are_caught():
    # Forty prompts of three items, each pair judged three times.
    triads = np.arange(120).reshape(40, 3)
    pairs = np.repeat(np.concatenate([triads[:, [0, 1]], triads[:, [1, 2]], triads[:, [2, 0]]]), 3, axis=0)
    x = np.random.default_rng(7).normal(size=(120, 4))
    empty = brm.Comparisons.from_arrays(x, candidates=pairs, outcome=[0] * len(pairs))
    right = linear(brm.likelihoods.BradleyTerry()).simulate(empty, seed=8).data
    around = right.with_outcomes([torch.where(torch.rand(360, generator=torch.Generator().manual_seed(0)) < 0.8, 0, 1)])
    for data, is_wrong in ((right, False), (around, True)):
        check = predictive_check(
            fitted(brm.likelihoods.BradleyTerry(), data), data, checks.intransitive_triads, num_samples=200
        )
        assert (check.p_greater[0] == 1 / 201) == is_wrong


@pytest.mark.slow
def test_p_values_are_rarely_small_when_the_model_is_right():
    p_values = []
    for seed in range(60):
        data = linear(brm.likelihoods.Davidson()).simulate(design(rows=100, seed=seed), seed=seed).data
        posterior = fitted(brm.likelihoods.Davidson(), data)
        p_values.append(predictive_check(posterior, data, checks.tie_rate, num_samples=99, seed=seed).p_value[0])
    # Conservative on the data of the fit: at most as many as a uniform p-value has.
    assert (np.array(p_values) <= 0.1).sum() <= scipy.stats.binom(60, 0.1).ppf(0.999)


def test_all_checks_are_those_the_data_support():
    settings = {"annotator": [str(i % 5) for i in range(300)], "words": np.arange(25) + 5}
    pairs = linear(brm.likelihoods.Davidson()).simulate(design(num_items=25, num_features=2, **settings), seed=9)
    posterior = fitted(brm.likelihoods.Davidson(), pairs.data)
    found = all_predictive_checks(posterior, pairs.data, num_samples=100, seed=1)
    names = [c.name for c in found]
    assert names == [
        "predicted best rate",
        "tie rate",
        "tie rate by difference",
        "first position rate",
        "longest wins rate",
        "intransitive triads",
        "rater agreement",
        "agreement by annotator",
    ]
    assert min(c.p_value.min() for c in found) > 0.0005
    alone = predictive_check(posterior, pairs.data, checks.rater_agreement, num_samples=100, seed=1)
    np.testing.assert_array_equal(alone.replicated, found[6].replicated)


@pytest.mark.parametrize(
    ("likelihood", "settings", "expected"),
    [
        (brm.likelihoods.BradleyTerry(), {"k": 2}, ["predicted best rate", "first position rate"]),
        (
            brm.likelihoods.PlackettLuce(),
            {"kind": "ranking", "k": 4},
            ["predicted best rate", "first position rate", "first place entropy"],
        ),
        (brm.likelihoods.Ordinal(), {"kind": "rating", "k": 1, "num_levels": 4}, ["rating levels"]),
        (brm.likelihoods.Approval(), {"kind": "approval", "k": 1}, ["approval rate"]),
    ],
)
def test_every_kind_has_its_checks_and_the_right_model_passes(likelihood, settings, expected):
    rng = np.random.default_rng(10)
    k, kind = settings.pop("k"), settings.get("kind", "choice")
    outcome = np.tile(np.arange(k), (150, 1)) if kind == "ranking" else np.zeros(150, int)
    empty = brm.Comparisons.from_arrays(
        rng.normal(size=(150 * k, 3)), candidates=np.arange(150 * k).reshape(150, k), outcome=outcome, **settings
    )
    data = linear(likelihood).simulate(empty, seed=11).data
    found = all_predictive_checks(fitted(likelihood, data), data, num_samples=200)
    assert [c.name for c in found] == expected
    assert min(c.p_value.min() for c in found) > 0.01


def test_seeds_reproduce_and_no_random_state_is_touched():
    data = linear(brm.likelihoods.Davidson()).simulate(design(rows=60), seed=12).data
    posterior = fitted(brm.likelihoods.Davidson(), data)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  (the global state is the subject)
    a = predictive_check(posterior, data, checks.tie_rate, num_samples=70, seed=1)
    b = predictive_check(posterior, data, checks.tie_rate, num_samples=70, seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    np.testing.assert_array_equal(a.replicated, b.replicated)
    other = predictive_check(posterior, data, checks.tie_rate, num_samples=70, seed=2)
    assert (a.replicated != other.replicated).any()


def test_own_statistics_and_what_they_must_not_do():
    data = linear(brm.likelihoods.BradleyTerry()).simulate(design(rows=40), seed=13).data
    posterior = fitted(brm.likelihoods.BradleyTerry(), data)

    def first_wins(feedback):
        return float((feedback.groups[0].outcome == 0).double().mean())

    check = predictive_check(posterior, data, first_wins, num_samples=20)
    assert check.labels == ("first wins",)
    assert check.observed[0] == pytest.approx(first_wins(Feedback.of(data)))

    def fickle(feedback):
        return {str(int(feedback.groups[0].outcome.sum())): 1.0}

    with pytest.raises(ArgumentError, match="depend on the comparisons alone"):
        predictive_check(posterior, data, fickle, num_samples=20)
    with pytest.raises(ArgumentError, match="undefined"):
        predictive_check(posterior, data, lambda feedback: float("nan"), num_samples=20)


def test_annotators_are_those_of_the_fit():
    rng = np.random.default_rng(15)
    raters = [f"rater {i % 4}" for i in range(400)]

    def pairs(names):
        x = 3 * rng.normal(size=(2 * len(names), 2))
        order = np.arange(2 * len(names)).reshape(-1, 2)
        return brm.Comparisons.from_arrays(x, candidates=order, outcome=[0] * len(names), annotator=names)

    likelihood = brm.likelihoods.RaterReliability(brm.likelihoods.BradleyTerry(), spread=3.0)
    # Rater 3 answers at random, the others as they mean.
    truth = {"reliability_mean": torch.tensor(3.0), "rater_deviation": torch.tensor([0.0, 0.0, 0.0, -30.0])}
    data = linear(likelihood).simulate(pairs(raters), seed=14, latents=truth).data
    posterior = fitted(likelihood, data)
    # Names that are coded 0 and 1 here, 0 and 3 in the fit.
    check = predictive_check(
        posterior, pairs(["rater 3", "rater 0"] * 50), checks.agreement_by_annotator, num_samples=100
    )
    assert check.labels == ("rater 0", "rater 3")
    careful, careless = check.replicated.mean(0)
    assert careful > 0.85
    assert careless < 0.7

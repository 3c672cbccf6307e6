"""`fit`, `predict` and `predict_feedback`: what they accept, refuse and reproduce."""

import threading

import numpy as np
import pyro
import pytest
import torch

import bayesrm as brm

from .conftest import make_data

L = brm.likelihoods


@pytest.fixture(scope="module")
def model():
    return brm.RewardModel(brm.rewards.Linear(), L.LabelNoise(L.BradleyTerry()))


@pytest.fixture(scope="module")
def data(model):
    return model.simulate(make_data(rows=40), seed=0).data


@pytest.mark.parametrize("head", [brm.rewards.Linear(), brm.rewards.MLP(hidden=(3,))])
def test_the_same_seed_gives_the_same_posterior_and_no_global_state_moves(head):
    model = brm.RewardModel(head, L.BradleyTerry())
    data = model.simulate(make_data(rows=40), seed=0).data
    engine = brm.Laplace(max_iterations=3000, gradient_tolerance=1e-4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    pyro.get_param_store().clear()
    first = brm.fit(model, data, inference=engine, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert len(pyro.get_param_store()) == 0
    torch.manual_seed(8)
    second = brm.fit(model, data, inference=engine, seed=1)
    assert torch.equal(first.mode, second.mode)
    assert torch.equal(first.factor, second.factor)


def test_two_threads_do_not_disturb_each_other(model, data):
    other = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    other_data = other.simulate(make_data(rows=30), seed=4).data
    alone = [brm.fit(model, data), brm.fit(other, other_data)]
    found = [[], []]

    def work(slot, m, d):
        for _ in range(4):
            found[slot].append(brm.fit(m, d))

    threads = [threading.Thread(target=work, args=(i, *a)) for i, a in enumerate([(model, data), (other, other_data)])]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for reference, results in zip(alone, found, strict=True):
        assert len(results) == 4
        for posterior in results:
            assert torch.equal(posterior.mode, reference.mode)


def test_map_is_laplace_without_its_width(model, data):
    laplace, point = brm.fit(model, data), brm.fit(model, data, inference=brm.MAP())
    torch.testing.assert_close(laplace.mode, point.mode)
    new = [np.eye(4)]
    assert float(point.predict(candidates=new).std.max()) == 0.0
    torch.testing.assert_close(laplace.plug_in().predict_feedback(data).log_prob, point.predict_feedback(data).log_prob)


def test_predictive_probabilities_by_plain_monte_carlo():
    model = brm.RewardModel(brm.rewards.Linear(), L.Davidson())
    data = model.simulate(make_data(rows=25), seed=1).data
    posterior = brm.fit(model, data)
    predicted = posterior.predict_feedback(data).groups[0].probs
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    noise = torch.randn(len(posterior.mode), count, generator=generator, dtype=torch.float64)
    draws = (posterior.mode[:, None] + torch.linalg.solve_triangular(posterior.factor.T, noise, upper=True)).T
    features = torch.as_tensor(np.asarray(data.features))
    half = 0.5 * (draws[:, :4] @ (features[0::2] - features[1::2]).T)
    logits = torch.stack([half, -half, draws[:, 4:].expand_as(half)], -1)
    reference = torch.softmax(logits, -1)
    error = reference.std(0) / count**0.5
    # 75 numbers: 4.5 standard errors, plus the Sobol error of 256 latent points.
    assert bool(((predicted - reference.mean(0)).abs() < 4.5 * error + 2e-3).all())


def test_prediction_does_not_depend_on_company(model, data):
    posterior = brm.fit(model, data)
    rng = np.random.default_rng(0)
    candidates = [rng.normal(size=(k, 4)) for k in (1, 5, 2)]
    together = posterior.predict(candidates=candidates)
    assert together.valid.sum(1).tolist() == [1, 5, 2]
    for i, c in enumerate(candidates):
        alone = posterior.predict(candidates=[c])
        torch.testing.assert_close(together[i].covariance, alone.covariance, rtol=0, atol=1e-12)
        torch.testing.assert_close(together[i].mean, alone.mean, rtol=0, atol=1e-12)


def test_rewards_are_free_of_length_bias():
    model = brm.RewardModel(brm.rewards.Linear(), L.LengthBias(L.BradleyTerry()))
    design = make_data(rows=400)
    biased = model.simulate(design, seed=0, latents={"length_coefficient": torch.tensor(2.0)})
    posterior = brm.fit(model, biased.data)
    low, high = torch.quantile(posterior.latents(4000)["length_coefficient"], torch.tensor([0.005, 0.995]).double())
    assert float(low) < 2.0 < float(high)
    error = posterior.parameters["weight"] - biased.parameters["weight"]
    std = posterior.predict(candidates=[np.eye(4)]).std[0]
    assert bool((error.abs() < 4 * std).all())


def test_annotators_are_matched_by_name():
    annotators = [f"rater {i % 4}" for i in range(60)]
    model = brm.RewardModel(brm.rewards.Linear(), L.RaterReliability(L.BradleyTerry()))
    data = model.simulate(make_data(rows=60, annotator=annotators), seed=0).data
    posterior = brm.fit(model, data)
    one = posterior.predict_feedback(data.select(np.flatnonzero([a == "rater 3" for a in annotators])))
    everyone = posterior.predict_feedback(data).log_prob[[a == "rater 3" for a in annotators]]
    torch.testing.assert_close(one.log_prob, everyone, rtol=0, atol=1e-10)
    stranger = make_data(rows=2, annotator=["rater 1", "somebody else"])
    with pytest.raises(brm.errors.LikelihoodError, match=r"annotator 'somebody else' of row 1 .* has 4 \('rater 0'"):
        posterior.predict_feedback(stranger)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, brm.errors.ArgumentError, "`candidates` is missing"),
        ({"candidates": []}, brm.errors.ArgumentError, "empty"),
        ({"candidates": [np.zeros((0, 4))]}, brm.errors.ArgumentError, "at least one candidate"),
        ({"candidates": [np.zeros((2, 5))]}, brm.errors.ArgumentError, r"fitted on \(items, 4\)"),
        (
            {"candidates": [np.zeros((2, 4)), np.zeros((2, 3))]},
            brm.errors.ArgumentError,
            r"candidates\[1\]` has shape \(2, 3\)",
        ),
        ({"candidates": [np.full((2, 4), np.nan)]}, brm.errors.DataError, "item 0 are not finite"),
        ({"prompts": ["a", "b"], "candidates": [np.zeros((2, 4))]}, brm.errors.ArgumentError, "2 prompts"),
        ({"candidates": [["text"]]}, brm.errors.ArgumentError, "`prompts` is missing"),
        ({"prompts": ["a"], "candidates": [["text"]]}, brm.errors.ArgumentError, "precomputed features"),
    ],
)
def test_bad_candidates(model, data, arguments, error, message):
    posterior = brm.fit(model, data)
    with pytest.raises(error, match=message):
        posterior.predict(**arguments)


def test_bad_fits(model, data):
    # Without the test run's type checks, which would speak first.
    fit = getattr(brm.fit, "__wrapped__", brm.fit)
    with pytest.raises(brm.errors.ArgumentError, match="must be a program"):
        fit("davidson", data)
    with pytest.raises(brm.errors.ArgumentError, match="call it to make settings"):
        fit(model, data, inference=brm.Laplace)
    with pytest.raises(brm.errors.DataError, match=r"Comparisons\.load"):
        fit(model, [{"prompt": "a"}])
    with pytest.raises(brm.errors.DataError, match="no features"):
        brm.fit(model, brm.Comparisons.from_pairs(["p"], ["good"], ["bad"]))
    ties = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1], [0, 1]], outcome=[0, 2])
    with pytest.raises(brm.errors.LikelihoodError, match=r"row 1 is a tie.*Davidson"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry()), ties)
    masked = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]], outcome=[0], weight=[0.0])
    with pytest.raises(brm.errors.DataError, match="weight 0"):
        brm.fit(model, masked)


def test_a_likelihood_that_does_not_sum_to_one_is_refused(data):
    def doubled(rewards, comparison):
        return L.outcome(
            log_prob=lambda y: 0.0 * rewards[:, 0] + 0.0 * y,
            support=torch.arange(2),
            batch_shape=(rewards.shape[0],),
            like=rewards,
        )

    with pytest.raises(brm.errors.LikelihoodError, match="sum to 2"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), doubled), data)


def test_a_likelihood_may_return_bernoulli(data):
    def second_wins(rewards, comparison):
        return brm.dist.Bernoulli(logits=rewards[:, 1] - rewards[:, 0])

    head = brm.rewards.Linear()
    mine, theirs = (brm.fit(brm.RewardModel(head, one), data) for one in (second_wins, L.BradleyTerry()))
    assert mine.report.log_evidence == pytest.approx(theirs.report.log_evidence, abs=1e-9)
    np.testing.assert_allclose(
        mine.predict_feedback(data).log_prob, theirs.predict_feedback(data).log_prob, rtol=0, atol=1e-9
    )


def test_the_sum_is_checked_away_from_equal_rewards(data):
    def uneven(rewards, comparison):
        d = rewards[:, 0] - rewards[:, 1]
        table = torch.stack([brm.ops.log_sigmoid(3.0 * d), brm.ops.log_sigmoid(-d)], -1)  # one at d = 0 only
        return L.outcome(
            log_prob=lambda y: table.gather(-1, y[..., None])[..., 0],
            support=torch.arange(2),
            batch_shape=(rewards.shape[0],),
            like=rewards,
        )

    with pytest.raises(brm.errors.LikelihoodError, match="not to 1"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), uneven), data)


def test_an_impossible_answer_may_be_masked():
    features = np.eye(2)
    model = brm.RewardModel(brm.rewards.Linear(), L.BradleyTerry())
    rows = {"candidates": [[0, 1], [0, 1]], "outcome": [0, 2]}
    masked = brm.Comparisons.from_arrays(features, **rows, weight=[1.0, 0.0])
    alone = brm.Comparisons.from_arrays(features, candidates=[[0, 1]], outcome=[0])
    posterior = brm.fit(model, masked)
    torch.testing.assert_close(posterior.mode, brm.fit(model, alone).mode)
    prediction = posterior.predict_feedback(masked)
    assert prediction.log_prob[1] == -torch.inf
    assert prediction.nll == pytest.approx(posterior.predict_feedback(alone).nll)


@pytest.mark.parametrize("engine", [brm.Laplace, brm.MAP])
@pytest.mark.parametrize("setting", [{"gradient_tolerance": float("nan")}, {"max_iterations": 0}, {"memory_gib": -1.0}])
def test_optimiser_settings_are_checked(engine, setting):
    with pytest.raises(brm.errors.ArgumentError, match=f"`{next(iter(setting))}` is"):
        engine(**setting)


def test_a_program_is_made_of_instances():
    make = getattr(brm.RewardModel, "__wrapped__", brm.RewardModel)
    with pytest.raises(brm.errors.ArgumentError, match="call the class to make one"):
        make(brm.rewards.Linear(), L.BradleyTerry)


def test_a_likelihood_of_the_wrong_batch_shape_is_refused(data):
    def one_for_all(rewards, comparison):
        return brm.dist.Categorical(logits=rewards[0])

    with pytest.raises(brm.errors.LikelihoodError, match=r"batch shape \(\) for 40 rows"):
        brm.fit(brm.RewardModel(brm.rewards.Linear(), one_for_all), data)

"""Cross-validation over prompts, against fits by hand and against leave-one-out."""

import dataclasses

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.diagnostics import compare, cross_validate, loo, score
from bayesrm.errors import ArgumentError

MODEL = brm.RewardModel(brm.rewards.Linear(standardize=False), brm.likelihoods.BradleyTerry())


def make_data(num_prompts=30, rows_a_prompt=3, seed=0, weight=None):
    rng = np.random.default_rng(seed)
    rows = num_prompts * rows_a_prompt
    features = rng.normal(size=(rows * 2, 3))
    candidates = np.arange(rows * 2).reshape(rows, 2)
    logits = (features[candidates[:, 0]] - features[candidates[:, 1]]) @ np.array([1.0, -1.0, 0.5])
    outcome = (rng.random(rows) > 1 / (1 + np.exp(-logits))).astype(int)
    prompt = np.repeat(rng.permutation(num_prompts), 2 * rows_a_prompt)
    return brm.Comparisons.from_arrays(
        features, candidates=candidates, outcome=outcome, prompt_index=prompt, weight=weight
    )


def test_every_row_is_predicted_by_a_fit_that_has_not_seen_its_prompt():
    data = make_data(weight=np.random.default_rng(1).choice([0.0, 1.0, 2.5], 90))
    result = cross_validate(MODEL, data, num_folds=4, seed=3)
    prompt = data.prompt_of_row
    for k in range(4):
        inside = result.fold == k
        assert not set(prompt[inside]) & set(prompt[~inside])
        posterior = brm.fit(MODEL, data.select(~inside), seed=3)
        expected = posterior.predict_feedback(data.select(inside))
        rows = torch.from_numpy(np.flatnonzero(inside))
        torch.testing.assert_close(result.prediction.log_prob[rows], expected.log_prob, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.prediction.correct[rows], expected.correct)
    weighted = (result.prediction.weight * result.prediction.log_prob).numpy()
    counted = result.prediction.weight.numpy() > 0
    sums = [weighted[(prompt == p) & counted].sum() for p in result.units]
    np.testing.assert_allclose(result.pointwise.numpy(), sums, atol=1e-12)
    assert result.elpd == pytest.approx(sum(sums))
    assert result.se == pytest.approx(np.sqrt(len(sums)) * np.std(sums, ddof=1))
    assert set(result.units) == set(prompt[counted])


def test_as_many_folds_as_prompts_is_leave_one_out():
    data = make_data(num_prompts=12)
    result = cross_validate(MODEL, data, num_folds=12, inference=brm.MAP())
    exact = loo(
        brm.fit(MODEL, data, inference=brm.MAP()), data, refit=lambda rest: brm.fit(MODEL, rest, inference=brm.MAP())
    )
    assert bool(exact.refitted.all())
    np.testing.assert_array_equal(result.units, exact.units)
    torch.testing.assert_close(result.pointwise, exact.pointwise, rtol=0, atol=1e-6)
    assert (result.elpd, result.se) == (pytest.approx(exact.elpd), pytest.approx(exact.se))


def test_predictions_of_all_kinds_are_put_back_in_place():
    rankings = [{"prompt": f"r{i}", "responses": ["a", "bb", "ccc"], "ranking": [2, 0, 1]} for i in range(6)]
    choices = [{"prompt": f"c{i}", "chosen": "a", "rejected": "bb"} for i in range(6)]
    data = brm.Comparisons.concatenate([brm.Comparisons.load(rankings), brm.Comparisons.load(choices)])
    data = data.with_features(np.random.default_rng(0).normal(size=(data.num_items, 2)))
    model = dataclasses.replace(MODEL, likelihood=brm.likelihoods.PlackettLuce())
    prediction = cross_validate(model, data, num_folds=3).prediction
    rows = torch.cat([g.rows for g in prediction.groups])
    assert sorted(rows.tolist()) == list(range(len(data)))
    for g in prediction.groups:
        observed = g.probs.gather(1, g.observed[:, None])[:, 0].log()
        torch.testing.assert_close(observed, prediction.log_prob[g.rows].to(observed.dtype), rtol=0, atol=1e-9)
    assert score(prediction, data.prompt_of_row).nll.value == pytest.approx(prediction.nll)


def test_texts_are_encoded_once(monkeypatch):
    extractor = brm.rewards.FeatureExtractor("any/model", inputs=("length",), cache_dir=False)
    encode, calls = type(extractor).extract_items, []
    monkeypatch.setattr(type(extractor), "extract_items", lambda *a, **k: calls.append(1) or encode(*a, **k))
    answers = ["w " * n for n in range(1, 21)]
    data = brm.Comparisons.from_pairs([f"p{i}" for i in range(10)], answers[:10], answers[10:])
    model = dataclasses.replace(MODEL, reward=brm.rewards.Linear(features=extractor))
    prediction = cross_validate(model, data).prediction
    assert len(calls) == 1
    by_hand = cross_validate(MODEL, data.with_features(extractor.extract_items(data))).prediction
    torch.testing.assert_close(prediction.log_prob, by_hand.log_prob)


def test_the_better_prior_wins_and_ways_of_scoring_do_not_mix():
    data = make_data()
    flat = dataclasses.replace(MODEL, prior=brm.priors.Gaussian(1e4))
    results = {"flat": cross_validate(flat, data), "declared": cross_validate(MODEL, data)}
    table = compare(results)
    assert [m.name for m in table.models] == ["declared", "flat"]
    assert table.models[1].difference > 2 * table.models[1].difference_se
    assert "p_loo" not in str(table)
    left_out = loo(brm.fit(MODEL, data), data)
    with pytest.raises(ArgumentError, match="'flat' and 'loo' were scored in different ways"):
        compare({"flat": results["flat"], "loo": left_out})
    with pytest.raises(ArgumentError, match="same folds"):
        compare({"one": results["declared"], "other": cross_validate(MODEL, data, seed=1)})


def test_prompts_that_do_not_count_are_in_no_fold():
    weight = np.ones(90)
    weight[9:] = 0.0
    data = make_data(weight=weight)
    result = cross_validate(MODEL, data, num_folds=3)
    assert len(result.units) == 3
    assert sorted(result.fold[:9:3]) == [0, 1, 2]
    with pytest.raises(ArgumentError, match="with feedback on 3 prompts"):
        cross_validate(MODEL, data, num_folds=4)
    weight[3:] = 0.0
    with pytest.raises(ArgumentError, match="about 1 prompt; leaving some out needs at least 2"):
        cross_validate(MODEL, make_data(weight=weight))


def test_other_feedback_is_not_compared():
    results = {}
    for seed in (0, 1):
        data = MODEL.simulate(make_data(), seed=seed).data
        results[str(seed)] = cross_validate(MODEL, data)
    with pytest.raises(ArgumentError, match="'0' and '1' are about other feedback"):
        compare(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_folds": 1}, "`num_folds` is 1; .* between 2 and 30"),
        ({"num_folds": 31}, "`num_folds` is 31; .* between 2 and 30"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        cross_validate(MODEL, make_data(), **arguments)

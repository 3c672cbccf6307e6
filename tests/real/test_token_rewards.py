"""The harness of marked error spans: labels, scores and attributions on made-up and real answers; a smoke run."""

import json

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.errors import DataError
from bayesrm.token_beliefs import TokenBelief


@pytest.fixture
def spans(benchmark_module):
    return benchmark_module("_error_spans")


def made_up(spans, count=60, seed=0, signal=1.0):
    """Answers of 4 to 20 tokens with a score that is `signal` higher where something is wrong."""
    rng = np.random.default_rng(seed)
    found = []
    for question in range(count):
        wrong = rng.random(rng.integers(4, 21)) < rng.uniform(0.1, 0.9)
        # Answers differ by more than their tokens do.
        score = rng.normal(size=len(wrong)) + signal * wrong + 5.0 * rng.normal()
        found.append(spans.Scored(question, score, wrong))
    return found


def test_labels_go_by_half_of_the_characters(spans):
    at = np.array([[0, 4], [4, 6], [6, 7], [7, 11], [11, 11], [12, 15]])
    wrong = [(2, 4, "Redundant"), (5, 7, "Irrelevant"), (6, 8, "Irrelevant"), (13, 15, "Incoherent")]
    by_hand = []
    for start, stop in at:
        marked = [any(a <= i < b for a, b, _ in wrong) for i in range(start, stop)]
        by_hand.append(bool(marked) and 2 * sum(marked) >= len(marked))
    assert by_hand == [True, True, True, False, False, True]
    assert spans.token_labels(at, wrong).tolist() == by_hand
    assert not spans.token_labels(at, []).any()
    assert spans.token_labels(np.zeros((0, 2), dtype=np.int64), wrong).shape == (0,)


@pytest.mark.parametrize("error", [(3, 3, "Redundant"), (-1, 2, "Redundant"), (2, 9, "Redundant"), (0, 2, "Rude")])
def test_errors_that_cannot_be(spans, error):
    with pytest.raises(DataError, match="question 7"):
        spans.Answer(7, "why", "because", (error,))


def test_scores_within_answers_ignore_differences_between_them(spans):
    scored = made_up(spans)
    values = spans.within(scored)
    for one, value in zip(scored, values, strict=True):
        pairs = [(a > b) + 0.5 * (a == b) for a in one.score[one.wrong] for b in one.score[~one.wrong]]
        assert (np.isnan(value) and not one.mixed) or value == pytest.approx(np.mean(pairs))
    estimate = spans.within_estimate(scored)
    assert estimate.value == pytest.approx(np.nanmean(values))
    # Phi(1 / sqrt 2) = 0.760; 60 answers of about 12 tokens.
    assert 0.68 < estimate.low < 0.76 < estimate.high < 0.84
    # Between answers the score says nothing, and over all tokens it is drowned by that.
    assert spans.overall_estimate(scored).value < 0.65
    gain = spans.within_estimate(scored, spans.chance(scored))
    assert gain.low > 0.1
    assert spans.within_estimate(scored, scored).value == 0.0


def test_chance_is_a_half(spans):
    for signal in (0.0, 3.0):
        estimate = spans.within_estimate(spans.chance(made_up(spans, 400, signal=signal)))
        assert estimate.low < 0.5 < estimate.high
        assert estimate.high - estimate.low < 0.08
    informative = spans.within_estimate(made_up(spans, 400, signal=3.0))
    assert informative.low > 0.9


def test_the_trend_along_an_answer_is_taken_off(spans):
    rng = np.random.default_rng(0)
    place = np.arange(12.0)
    noise = rng.normal(size=12)
    one = spans.Scored(0, 3.0 + 0.7 * place + noise, place > 6)
    fitted = np.polynomial.Polynomial.fit(place, one.score, 1)(place)
    np.testing.assert_allclose(one.without_trend().score, one.score - fitted, atol=1e-12)
    trend = spans.Scored(0, place, place > 6)
    assert spans.within([trend])[0] == 1.0
    # Nothing but rounding is left of a score that is position alone.
    np.testing.assert_allclose(trend.without_trend().score, 0.0, atol=1e-12)
    assert spans.Scored(0, place[:2], place[:2] > 0).without_trend().score.tolist() == [0.0, 0.0]


def test_tokens_without_characters_take_no_part(spans):
    answer = spans.Answer(0, "why", "a bc", ((2, 4, "Irrelevant"),))
    at = torch.tensor([[[0, 1], [2, 4], [4, 4], [0, 0]]])
    mask = torch.tensor([[True, True, True, False]])
    belief = TokenBelief((answer.response,), at, torch.tensor([[1.0, -2.0, 9.0, 0.0]]), torch.ones(1, 4), mask)
    (scored,) = spans.of_belief([answer], belief, lambda b: -b.mean)
    assert scored.score.tolist() == [-1.0, 2.0]
    assert scored.wrong.tolist() == [False, True]
    assert spans.within([scored]).tolist() == [1.0]


def test_parts_share_no_question(spans):
    parts = spans.split(50, (30, 5), seed=1)
    assert [len(p) for p in parts] == [30, 5, 15]
    assert sorted(np.concatenate(parts).tolist()) == list(range(50))
    assert all(np.array_equal(a, b) for a, b in zip(parts, spans.split(50, (30, 5), seed=1), strict=True))


def test_real_answers(spans, real_file):
    answers, records = spans.load(real_file("qa_feedback.parquet").parent)
    assert len(answers) == len(records) == 400
    counted = [sum(category == name for a in answers for _, _, category in a.errors) for name in spans.CATEGORIES]
    assert counted == [750, 136, 118, 107, 11]
    assert sum(not a.errors for a in answers) == 27


@pytest.mark.slow
def test_attribution_is_the_derivative_along_the_embedding(spans, real_file, minilm):
    answers, _ = spans.load(real_file("qa_feedback.parquet").parent, 5)
    network = brm.rewards.LoRA(str(minilm), max_length=128, device="cpu").load()
    generator = torch.Generator().manual_seed(0)
    network.set_theta(network.theta() + 0.05 * torch.randn(network.num_parameters, generator=generator))
    found = spans.gradient_times_input(network, answers)
    embedding = network.model.get_input_embeddings()
    for answer, (at, values) in list(zip(answers, found, strict=True))[:2]:
        assert len(at) == len(values)
        (sequence,) = network.tokenize([answer.prompt], [answer.response])
        place, _ = spans.response_place(network, sequence, answer.response)
        for token in (0, len(values) // 2):

            def reward(step, place=place + token, sequence=sequence):
                def move(module, inputs, output):
                    output = output.clone()
                    output[0, place] *= 1.0 + step
                    return output

                handle = embedding.register_forward_hook(move)
                with torch.no_grad():
                    value = float(network(**network.collate([sequence]))[0])
                handle.remove()
                return value

            # A central difference in float32: rounding of the reward by the step, and the square of the step.
            slope = (reward(0.02) - reward(-0.02)) / 0.04
            assert values[token] == pytest.approx(slope, rel=0.02, abs=2e-4)
        text = "".join(answer.response[a:b] for a, b in at)
        assert text == "".join(answer.response.split())[: len(text)]


@pytest.mark.slow
def test_benchmark_runs_and_goes_on_from_its_cache(benchmark_module, real_file, minilm, tmp_path, monkeypatch):
    real_file("qa_feedback.parquet")
    benchmark, file = benchmark_module("token_rewards"), tmp_path / "out.json"
    arguments = ["--quick", "--cache", str(tmp_path / "cache"), "--json", str(file)]
    assert benchmark.command(arguments) == 0
    first = json.loads(file.read_text())
    assert {"AVA-p", "Bradley-Terry, gradient x input", "position in the answer"} <= set(first["spans"]["test"])
    assert all(0 <= e["within"]["value"] <= 1 for part in first["spans"].values() for e in part.values())
    assert set(first["preferences"]) == {"Bradley-Terry", "AVA-p", "AVA-p without constraint"}

    def refuse(*arguments, **settings):
        raise AssertionError("a finished model was fitted again")

    monkeypatch.setattr(brm, "fit", refuse)
    assert benchmark.command(arguments) == 0
    assert json.loads(file.read_text())["claims"] == first["claims"]

"""`align`: rounds of propose, score, weight and project under the Trainer."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import bayesrm as brm
from bayesrm.alignment import Budget, Method, TokenSequences, align, projections
from bayesrm.alignment._round import Round
from bayesrm.alignment._scoring import check_preferences, score
from bayesrm.alignment._trainer import RoundBatches
from bayesrm.errors import ArgumentError, EngineError, PersistenceError

from . import policies
from .align_script import METHODS, count_reward, run

SCRIPT = Path(__file__).with_name("align_script.py")
PROMPTS = [f"w{i} w{i + 1}" for i in range(6)]


class InterruptedRunError(Exception):
    pass


class Interrupt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedRunError


def training(**settings):
    return brm.Training(**{"epochs": 1.0, "batch_size": 3, "learning_rate": 5e-3} | settings)


def all_responses(policy, prompt):
    """Every response of at most two tokens of a policy whose vocabulary ends with token 0."""
    tokens = range(1, len(policy.tokenizer))
    found = [(0,), *((t, 0) for t in tokens), *itertools.product(tokens, tokens)]
    (ids,), _ = policy._codec.prompts([prompt])
    sequences = TokenSequences((ids,) * len(found), tuple(found), tuple(r[-1] == 0 for r in found))
    return sequences, policy.decode(found)


def test_responses_without_words_lose_and_are_not_judged():
    asked = []

    def judge(prompts, candidates):
        asked.append(candidates)
        return torch.full((len(prompts), *[max(map(len, candidates))] * 2), 0.7, dtype=torch.float64)

    found = check_preferences(judge, ["p", "q", "r"], [["a", " ", "b"], ["", ""], ["c", "d"]])
    assert asked == [[["a", "b"], ["c", "d"]]]
    assert found[0].tolist() == [[0.7, 1.0, 0.7], [0.0, 0.5, 0.0], [0.7, 1.0, 0.7]]
    assert found[1, :2, :2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found[2, :2, :2].tolist() == [[0.7, 0.7], [0.7, 0.7]]


def test_a_round_of_another_version_is_told(tmp_path):
    file = tmp_path / "round-00000.safetensors"
    safetensors.torch.save_file({"mean": torch.zeros(1)}, file, {"texts": "[]", "sources": "null"})
    with pytest.raises(PersistenceError, match=r"round-00000.safetensors cannot be read: 'mask'"):
        Round.load(file)


@pytest.mark.parametrize("proposal", ["policy", "reference"])
def test_brain_approaches_the_enumerated_posterior(proposal):
    policy = policies.policy("gpt2", count=4, limits=(4, 2), spread=0.2)
    prompts = ["w1", "w2 w3"]
    method = Method(
        brm.GoodnessPosterior(), projections.ListwiseCrossEntropy(), proposal=proposal, num_candidates=32
    )  # fmt: skip

    def kl():
        total = []
        for prompt in prompts:
            sequences, texts = all_responses(policy, prompt)
            with torch.no_grad():
                log_q = policy.log_probs(sequences).double()
                with policy.using(policy.reference):
                    log_p0 = policy.log_probs(sequences).double()
            assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-5)
            log_target = (log_p0 + score(count_reward, [prompt], [texts]).mean[0]).log_softmax(0)
            total.append(float((log_target.exp() * (log_target - log_q)).sum()))
        return sum(total)

    before = kl()
    settings = training(epochs=4.0, batch_size=2, learning_rate=2e-2)
    align(policy, count_reward, prompts, method=method, rounds=15, training=settings)
    assert before > 0.3
    assert kl() < 0.25 * before


@pytest.mark.parametrize("name", ["brain", "moving", "tokens"])
def test_an_interrupted_run_goes_on_to_the_same_weights(name, tmp_path):
    settings = {"method": name, "save_steps": 3, "schedule": "linear"}
    _, whole, report = run(settings)
    # 4 rounds of 2 passes over 8 prompts in fours of 2: the cut is in the middle of the second round.
    assert report.steps == 32
    place = {"output_dir": str(tmp_path / "run")}
    policy = policies.policy("gpt2")
    with pytest.raises(InterruptedRunError):
        align(
            policy, count_reward, [f"w{i} w{i + 1}" for i in range(10)], method=METHODS[name], rounds=4,
            prompts_per_round=8, seed=3,
            training=training(
                epochs=2.0, batch_size=2, save_steps=3, schedule="linear", callbacks=(Interrupt(13),), **place
            ),
        )  # fmt: skip
    _, resumed, second = run(settings | place)
    assert second.resumed_from == str(tmp_path / "run" / "checkpoint-12")
    assert torch.equal(whole, resumed)
    _, loaded, third = run(settings | place)
    assert torch.equal(whole, loaded)
    assert third.rounds == second.rounds == report.rounds
    assert third.final == second.final == report.final
    with pytest.raises(PersistenceError, match="learning_rate"):
        run(settings | place | {"learning_rate": 1e-4})


def test_reports_say_what_the_candidates_are():
    policy = policies.policy("gpt2")
    report = align(policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=2, training=training())
    first = report.rounds[0]
    assert first.kl_to_reference == pytest.approx(0.0, abs=1e-6)
    assert first.policy_ess == pytest.approx(6.0)
    assert 1.0 <= first.target_ess <= 6.0
    assert 0.0 < first.length <= policy.max_new_tokens
    assert first.reward_std == pytest.approx(0.1, rel=0.1)
    assert [r.step for r in report.rounds] == [0, 2]
    assert report.final.step == 4
    assert report.final.kl_to_reference != 0.0
    assert len(report.final.samples) == 3
    assert report.stopped is None


def test_a_budget_stops_before_the_round_that_exceeds_it():
    policy = policies.policy("gpt2")
    report = align(
        policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=20, budget=Budget(max_kl=0.5),
        training=training(epochs=3.0, learning_rate=1e-2),
    )  # fmt: skip
    assert "KL(policy || reference)" in report.stopped
    assert report.rounds[-1].kl_to_reference > 0.5
    assert all(r.kl_to_reference <= 0.5 for r in report.rounds[:-1])
    assert report.steps == report.rounds[-1].step


def test_given_candidates_are_not_drawn(monkeypatch):
    policy = policies.policy("gpt2")
    monkeypatch.setattr(type(policy), "generate", None)
    given = [[f"w{i}", "w1 w1", "w3"] for i in range(4, 10)]
    report = align(
        policy, count_reward, PROMPTS, method=METHODS["brain"], candidates=given, rounds=3,
        training=training(learning_rate=1e-2),
    )  # fmt: skip
    assert report.rounds[-1].reward > report.rounds[0].reward


def test_adapters_are_trained_and_the_rest_stays():
    policy = policies.policy("gpt2", lora=brm.alignment.PolicyLoRA(rank=2, alpha=8.0))
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    before = policy.snapshot()
    align(policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=2, training=training())
    assert any(not torch.equal(before.values[n], p) for n, p in policy.trainable.items())
    assert all(torch.equal(frozen[n], p) for n, p in policy.model.named_parameters() if not p.requires_grad)


def test_preferences_replace_those_of_the_rewards():
    seen = []

    def nobody(prompts, candidates):
        seen.append(len(prompts))
        n = len(candidates[0])
        return torch.full((len(prompts), n, n), 0.5)

    policy = policies.policy("gpt2")
    method = Method(
        brm.alignment.targets.MirrorDescent(step=1.0), projections.ListwiseCrossEntropy(), num_candidates=4
    )  # fmt: skip
    before = policy.snapshot()
    steps = {"learning_rate": 1.0, "max_grad_norm": 0.0, "warmup_ratio": 0.0, "arguments": {"optim": "sgd"}}

    def moved(preferences):
        policy.assign(before)
        align(
            policy, count_reward, PROMPTS, method=method, rounds=1, preferences=preferences, training=training(**steps)
        )
        return max(float((before.values[n] - p.detach()).abs().max()) for n, p in policy.trainable.items())

    # Nobody is preferred, the target is the policy itself, and so the gradient is zero up to rounding.
    assert moved(nobody) < 1e-5
    assert seen == [6, 6]
    assert moved(None) > 1e-2


def test_responses_without_words_count_as_the_worst():
    belief = score(count_reward, ["a", "b"], [["w1 w1", "", "w1"], [" ", "", ""]])
    assert belief.mean.tolist() == [[2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert belief.prob_better()[0, 1, 2] == 0.5
    repeated = score(count_reward, ["a"], [["w1", "w1", "w2"]])
    assert float(repeated.differences(baseline=0).std[0, 1]) == 0.0


def test_a_round_survives_the_disk(tmp_path):
    policy = policies.policy("gpt2")
    run_folder = tmp_path / "run"
    align(
        policy, count_reward, PROMPTS, method=METHODS["tokens"], rounds=1, keep_rounds=None,
        training=training(output_dir=str(run_folder)),
    )  # fmt: skip
    file = run_folder / "round-00000.safetensors"
    found = Round.load(file)
    found.save(tmp_path / "again.safetensors")
    again = Round.load(tmp_path / "again.safetensors")
    assert again.sequences == found.sequences
    assert again.texts == found.texts
    for name in ("reference", "proposal", "anchor"):
        assert torch.equal(getattr(again.candidates, name), getattr(found.candidates, name))
    assert found.candidates.sources == METHODS["tokens"].sources
    file.write_bytes(b"")
    with pytest.raises(PersistenceError, match="round-00000"):
        Round.load(file)


def test_every_prompt_of_a_round_once_a_pass():
    batches = RoundBatches(11, batch_size=3, passes=2, step_size=3, seed=0)
    batches.begin(1, torch.arange(11).numpy())
    assert len(batches) == 12
    for half in (range(6), range(6, 12)):
        assert sorted(int(i) for b in half for i in batches[b]) == list(range(11))
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps"):
        RoundBatches(2, batch_size=1, passes=1, step_size=3, seed=0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompts": []}, "prompts"),
        ({"rounds": 0}, "rounds"),
        ({"training": brm.Training(epochs=0.5)}, "epochs"),
        ({"training": brm.Training(epochs=1.0, max_steps=3)}, "max_steps"),
    ],
)
def test_bad_arguments(changed, named):
    arguments = {
        "policy": policies.policy("gpt2"), "reward": count_reward, "prompts": PROMPTS, "method": METHODS["brain"]
    }  # fmt: skip
    arguments |= changed
    with pytest.raises(ArgumentError, match=named):
        align(arguments.pop("policy"), arguments.pop("reward"), arguments.pop("prompts"), **arguments)


def test_divergence_is_an_error():
    policy = policies.policy("gpt2")
    with pytest.raises(EngineError, match=r"diverged|not finite"):
        align(
            policy, count_reward, PROMPTS, method=METHODS["brain"], rounds=3,
            training=training(learning_rate=1e30, max_grad_norm=0.0, logging_steps=1),
        )  # fmt: skip


def script(output, settings, *launcher):
    command = [sys.executable, *launcher, str(SCRIPT), str(output), json.dumps(settings)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=170)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brain", "moving"])
def test_two_processes_reach_the_weights_of_one(name, tmp_path):
    settings = {"method": name, "arguments": {"optim": "sgd"}, "learning_rate": 5e-2}
    done = script(tmp_path / "two.pt", settings, "-m", "torch.distributed.run", "--nproc_per_node=2")
    assert done.returncode == 0, done.stderr[-3000:]
    done = script(tmp_path / "one.pt", settings | {"gradient_accumulation_steps": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("two", "one"))
    assert two["steps"] == one["steps"] == 16
    torch.testing.assert_close(two["theta"], one["theta"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    settings = {"method": "moving", "save_steps": 5}
    assert script(tmp_path / "whole.pt", settings).returncode == 0
    settings["output_dir"] = str(tmp_path / "run")
    assert script(tmp_path / "cut.pt", settings | {"kill_at": 22}).returncode == -9
    assert script(tmp_path / "cut.pt", settings).returncode == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "cut"))
    assert resumed["resumed_from"] == str(tmp_path / "run" / "checkpoint-20")
    assert torch.equal(resumed["theta"], whole["theta"])

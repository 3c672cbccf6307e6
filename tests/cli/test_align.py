"""`bayesrm propose` and `bayesrm align`, on a tiny decoder and a posterior of a tiny encoder."""

import json
from pathlib import Path

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import Policy
from bayesrm.cli import main

from .conftest import BAD, GOOD

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("policy")
    words = ["<eos>", *GOOD.split(), *BAD.split(), *(f"q{i}" for i in range(12)), "?"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(write):
    return write("prompts.jsonl", [{"prompt": f"q{i} ?"} for i in (1, 2, 3, 1)])


LIMITS = ["--policy.max-new-tokens", "4", "--policy.max-prompt-tokens", "8"]


def test_proposals_are_draws_with_their_log_probabilities(policy_folder, prompts, tmp_path, capsys):
    output = tmp_path / "drawn.jsonl"
    arguments = ["propose", policy_folder, prompts, "-o", str(output), "--num-candidates", "3", "--seed", "5", *LIMITS]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert result["prompts"] == len(rows) == 3
    assert [row["prompt"] for row in rows] == ["q1 ?", "q2 ?", "q3 ?"]
    policy = Policy.from_pretrained(policy_folder, max_new_tokens=4, max_prompt_tokens=8)
    drawn = policy.generate([row["prompt"] for row in rows], 3, seed=5)
    assert [row["responses"] for row in rows] == [[r.text for r in group] for group in drawn]
    assert rows[0]["log_probs"] == pytest.approx([r.log_prob for r in drawn[0]])
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2", "--method.utility", "risk_averse"]])
def test_align_moves_the_policy_and_saves_it(flags, policy_folder, run_folder, prompts, tmp_path, capsys):
    output = tmp_path / "aligned"
    arguments = [
        "align", "brain", policy_folder, run_folder, prompts, "-o", str(output), "--rounds", "3", *LIMITS,
        "--training.learning-rate", "0.01", "--method.num-candidates", "4", *flags, "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert [r["round"] for r in first["rounds"]] == [0, 1, 2]
    assert first["rounds"][0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    # The first step of the schedule's warm-up has learning rate 0.
    assert first["rounds"][2]["kl_to_reference"] != 0.0
    aligned, before = (
        Policy.from_pretrained(folder, max_new_tokens=4, max_prompt_tokens=8)
        for folder in (first["policy"], policy_folder)
    )
    sequences = before.encode(["q1 ?"], [GOOD])
    with torch.no_grad():
        assert float(aligned.log_probs(sequences)) != float(before.log_probs(sequences))
    # The same command finds the finished run.
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rounds"] == first["rounds"]
    assert again["resumed_from"] == str(output)


def test_given_responses_and_a_budget(policy_folder, run_folder, write, tmp_path, capsys):
    given = write("given.jsonl", [{"prompt": f"q{i} ?", "responses": [GOOD, BAD]} for i in range(1, 5)])
    arguments = [
        "align", "brain", policy_folder, run_folder, given, "--given", "-o", str(tmp_path / "run"), "--rounds", "30",
        *LIMITS, "--method.num-candidates", "2", "--training.learning-rate", "0.03", "--max-kl", "0.01",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "above 0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({1: "no_such_method"}, "no_such_method"),
        ({2: "/no/such/policy"}, "/no/such/policy"),
        ({3: "/no/such/run"}, "/no/such/run"),
        ({4: "/no/such/prompts.jsonl"}, "/no/such/prompts.jsonl"),
    ],
)
def test_what_is_missing_is_named(change, reason, policy_folder, run_folder, prompts, tmp_path, capsys):
    arguments = ["align", "brain", policy_folder, run_folder, prompts, "-o", str(tmp_path / "run")]
    for place, value in change.items():
        arguments[place] = value
    assert main(arguments) in (1, 2)
    assert reason in capsys.readouterr().err


def test_the_posterior_of_the_command_is_that_of_the_library(policy_folder, run_folder, prompts, tmp_path, capsys):
    output = tmp_path / "run"
    assert main([
        "align", "brain", policy_folder, run_folder, prompts, "-o", str(output), "--rounds", "1", *LIMITS, "--json",
        "--method.num-candidates", "4", "--seed", "1",
    ]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)["rounds"][0]
    posterior = brm.Posterior.from_pretrained(run_folder)
    from bayesrm.alignment._round import Round

    found = Round.load(Path(output) / "round-00000.safetensors")
    names = [f"q{i} ?" for i in (1, 2, 3)]
    from bayesrm.alignment._scoring import score

    belief = score(posterior, [names[i] for i in found.prompts.tolist()], found.texts)
    torch.testing.assert_close(belief.mean, found.candidates.belief.mean)
    assert report["reward"] == pytest.approx(float(belief.mean.mean()), abs=1e-6)

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
    assert main(arguments) == 2
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


def test_given_responses_may_be_ragged(policy_folder, run_folder, write, tmp_path, capsys):
    rows = [{"prompt": f"q{i} ?", "responses": [GOOD, BAD, "clear", "rude"][: 1 + i]} for i in range(1, 4)]
    given = write("given.jsonl", rows)
    arguments = ["align", "brain", policy_folder, run_folder, given, "--given", "-o", str(tmp_path / "run"), *LIMITS]
    assert main([*arguments, "--rounds", "2", "--keep-rounds", "1"]) == 0
    assert [file.name for file in (tmp_path / "run").glob("round-*")] == ["round-00002.safetensors"]
    capsys.readouterr()
    arguments[1] = "j_bond"
    assert main([*arguments, "--rounds", "2"]) == 2
    assert "takes no `candidates`" in capsys.readouterr().err


def other_policy(source, folder, *, words=None):
    """The model of a folder with weights of its own, and with another vocabulary where words are given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if words is not None:
        raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
        model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"]])
def test_another_model_is_the_reference(flags, policy_folder, run_folder, prompts, tmp_path, capsys):
    other = other_policy(policy_folder, tmp_path / "other")
    arguments = [
        "align", "brain", policy_folder, run_folder, prompts, "-o", str(tmp_path / "run"), "--rounds", "2", *LIMITS,
        "--method.num-candidates", "40", "--training.learning-rate", "0.01", "--keep-rounds", "all", "--json", *flags,
    ]  # fmt: skip
    assert main([*arguments, "--reference", other]) == 0
    first = json.loads(capsys.readouterr().out)
    from bayesrm.alignment._round import Round

    found = Round.load(tmp_path / "run" / "round-00000.safetensors")
    reference = Policy.from_pretrained(other, max_new_tokens=4, max_prompt_tokens=8)
    with torch.no_grad():
        expected = reference.log_probs(found.sequences).reshape(found.policy.shape)
    torch.testing.assert_close(found.candidates.reference, expected, rtol=0, atol=1e-4)
    # The policy was not the reference at the start: its divergence is the mean log-ratio of its own draws.
    assert first["rounds"][0]["kl_to_reference"] == pytest.approx(float((found.policy - expected).mean()), abs=1e-4)
    assert first["rounds"][0]["kl_to_reference"] > 0.1
    assert main([*arguments, "--reference", other]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == str(tmp_path / "run")
    assert main(arguments) == 1
    assert "policy.reference" in capsys.readouterr().err


def test_an_aligned_policy_goes_on_from_its_origin(policy_folder, run_folder, prompts, tmp_path, capsys):
    """The first run's policy, whole or adapters, is aligned further with the very first model as reference."""
    from bayesrm.alignment._round import Round

    origin = Policy.from_pretrained(policy_folder, max_new_tokens=4, max_prompt_tokens=8)
    for name, flags in (("whole", []), ("adapters", ["--lora-rank", "2"])):
        again = ["--json", "--rounds", "2", *LIMITS, "--method.num-candidates", "6", "--training.learning-rate", "0.05"]
        first, second = str(tmp_path / f"{name}-1"), str(tmp_path / f"{name}-2")
        assert main(["align", "brain", policy_folder, run_folder, prompts, "-o", first, *again, *flags]) == 0
        end = json.loads(capsys.readouterr().out)["policy"]
        arguments = ["align", "brain", end, run_folder, prompts, "-o", second, *again, "--keep-rounds", "all"]
        assert main([*arguments, "--reference", policy_folder]) == 0
        report = json.loads(capsys.readouterr().out)["rounds"][0]
        found = Round.load(Path(second) / "round-00000.safetensors")
        start = Policy.from_pretrained(end, max_new_tokens=4, max_prompt_tokens=8)
        with torch.no_grad():
            for policy, stored in ((origin, found.candidates.reference), (start, found.policy)):
                expected = policy.log_probs(found.sequences).reshape(stored.shape)
                torch.testing.assert_close(stored, expected, rtol=0, atol=1e-4)
        ratio = found.policy - found.candidates.reference
        assert float(ratio.abs().max()) > 0.01, name
        assert report["kl_to_reference"] == pytest.approx(float(ratio.mean()), abs=1e-5)


def test_proposals_tell_how_far_they_are_from_a_reference(policy_folder, prompts, tmp_path, capsys):
    other, output = other_policy(policy_folder, tmp_path / "other"), tmp_path / "drawn.jsonl"
    arguments = ["propose", policy_folder, prompts, "-o", str(output), "--num-candidates", "5", *LIMITS]
    assert main([*arguments, "--reference", other, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    reference = Policy.from_pretrained(other, max_new_tokens=4, max_prompt_tokens=8)
    policy = Policy.from_pretrained(policy_folder, max_new_tokens=4, max_prompt_tokens=8)
    drawn = policy.sequences(policy.generate([row["prompt"] for row in rows], 5, seed=0))
    with torch.no_grad():
        expected = reference.log_probs(drawn).reshape(3, 5).tolist()
    for row, values in zip(rows, expected, strict=True):
        assert row["reference_log_probs"] == pytest.approx(values, abs=1e-4)
    gaps = [p - q for row in rows for p, q in zip(row["log_probs"], row["reference_log_probs"], strict=True)]
    assert result["kl_to_reference"] == pytest.approx(sum(gaps) / 15, abs=1e-9)
    # What was written is read as before.
    assert main([*arguments[:3], "-o", str(tmp_path / "plain.jsonl"), "--num-candidates", "5", *LIMITS]) == 0
    assert "reference_log_probs" not in (tmp_path / "plain.jsonl").read_text()


@pytest.mark.parametrize("command", ["align", "propose"])
def test_what_is_no_reference_is_named(command, policy_folder, run_folder, prompts, tmp_path, capsys):
    words = ["<eos>", "?", *GOOD.split(), *BAD.split(), *(f"q{i}" for i in range(12))]
    other = other_policy(policy_folder, tmp_path / "words", words=words)
    source = ["align", "brain", policy_folder, run_folder, prompts] if command == "align" else [command, policy_folder]
    if command == "propose":
        source.append(prompts)
    for reference, reason in (
        ("/no/such/model", "`reference` '/no/such/model' cannot be loaded"),
        (other, "another voc"),
    ):
        output = str(tmp_path / ("run" if command == "align" else "drawn.jsonl"))
        assert main([*source, "-o", output, *LIMITS, "--reference", reference]) == 2
        assert reason in capsys.readouterr().err


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
        "--method.num-candidates", "4", "--seed", "1", "--keep-rounds", "all",
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

"""Programs below the level of the response through the commands that everything else goes through."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import bayesrm as brm
from bayesrm.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "alignment"))
import policies

FLAGS = {
    "ava": ["--program.max_prompt_tokens", "8", "--program.max_new_tokens", "12"],
    "language_feedback": ["--program.max_prompt_tokens", "40", "--program.max_response_tokens", "12"],
}
ENGINES = {"ava": ["ava"], "language_feedback": ["map", "--engine.prior_precision", "given"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = policies.tokenizer(count=8, pad=True)
    policies.model("gpt2", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def rows():
    rng = np.random.default_rng(0)

    def text(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 8, size=count))

    return [
        {"prompt": f"w{i % 8} w{i // 8}", "chosen": f"{text(3)} w1", "rejected": f"{text(4)} w2"} for i in range(12)
    ]


def sources(tmp_path):
    pairs = rows()
    kinds = {
        "pairs": pairs,
        "demonstrations": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs],
        "corrections": [
            {"prompt": r["prompt"], "response": r["rejected"], "corrected": r["chosen"]} for r in pairs
        ],
        "candidates": [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in pairs],
    }  # fmt: skip
    return {name: lines(tmp_path / f"{name}.jsonl", found) for name, found in kinds.items()}


@pytest.mark.parametrize(
    ("program", "kind"),
    [("ava", "pairs"), ("ava", "demonstrations"), ("language_feedback", "pairs"), ("language_feedback", "corrections")],
)
def test_fit_select_and_report(program, kind, model, tmp_path, capsys):
    source, run = sources(tmp_path), str(tmp_path / "run")
    flags = ["--program.model", model, *FLAGS[program], "--engine.max_steps", "3", "--engine.batch_size", "4"]
    assert (
        main(["fit", program, *ENGINES[program][:1], source[kind], "-o", run, *flags, *ENGINES[program][1:], "--json"])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["data"]["rows"] == 12
    assert record["report"]["training"]["steps"] == 3
    posterior = brm.Posterior.from_pretrained(run)
    tokens = posterior.predict_tokens(["w0 w0"], ["w1 w2"])
    # Two words and the end.
    assert tokens.mask.sum() == 3
    assert main(["select", run, source["candidates"], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["picks"]) == 12
    assert main(["predict", run, source["pairs"], "--json"]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["metrics"]["nll"]["value"])
    page = str(tmp_path / "credit.html")
    assert main(["predict", run, source["candidates"], "--credit", page, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["credit"] == page
    assert "brm-credit-token" in (tmp_path / "credit.html").read_text()
    assert main(["predict", run, source["pairs"], "--credit", page, "--overwrite"]) == 2
    assert "`--credit` shows candidates" in capsys.readouterr().err
    assert main(["report", run, source["pairs"], "-o", str(tmp_path / "report.html")]) == 0
    assert "<html" in (tmp_path / "report.html").read_text().lower()


def test_data_that_the_program_does_not_explain(model, tmp_path, capsys):
    rated = lines(tmp_path / "rated.jsonl", [{"prompt": "w0", "answer": "w1"}])
    flags = ["--program.model", model, *FLAGS["ava"]]
    assert main(["fit", "ava", "ava", rated, "-o", str(tmp_path / "run"), *flags]) == 1
    assert "rated.jsonl" in capsys.readouterr().err
    pairs = sources(tmp_path)["pairs"]
    assert main(["fit", "ava", "laplace_full", pairs, "-o", str(tmp_path / "run"), *flags]) == 1
    assert "Laplace cannot serve an InverseRL" in capsys.readouterr().err


def test_rejected_responses_are_never_imitated(model, tmp_path, capsys):
    labelled = [{"prompt": f"w{i}", "completion": "w1", "label": i % 2 == 0} for i in range(4)]
    source = lines(tmp_path / "labelled.jsonl", labelled)
    flags = ["--program.model", model, *FLAGS["ava"], "--engine.max_steps", "1"]
    # Unpaired answers are read as approvals, which a likelihood of choices does not describe.
    assert main(["fit", "ava", "ava", source, "-o", str(tmp_path / "run"), *flags]) == 1
    assert "approval" in capsys.readouterr().err


def test_a_bad_row_is_named(model, tmp_path, capsys):
    bad = [*rows(), {"prompt": "w0", "chosen": "w1", "rejected": None}]
    flags = ["--program.model", model, *FLAGS["ava"]]
    source = lines(tmp_path / "bad.jsonl", bad)
    assert main(["fit", "ava", "ava", source, "-o", str(tmp_path / "run"), *flags]) == 1
    assert "row 12" in capsys.readouterr().err

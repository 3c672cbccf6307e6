"""What users get wrong: exit code 1 (data, runs) or 2 (calls), one line with the reason, and nothing half-written."""

import shutil

import pytest

import bayesrm as brm
from bayesrm.cli import main

GOOD = {"prompt": "q1 ?", "chosen": "clear", "rejected": "rude"}


def fails(arguments, tmp_path, capsys, code=1):
    """Runs a command that must fail; returns its message."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("program", "rows", "reason"),
    [
        ("bradley_terry", [{"prompt": "q1 ?", "chosen": "clear"}], "the columns ['chosen', 'prompt'] fit no format"),
        ("bradley_terry", [GOOD, {**GOOD, "chosen": ""}], "row 1: `chosen` is empty"),
        ("bradley_terry", [GOOD, {**GOOD, "rejected": None}], "row 1: `rejected` is null"),
        ("bradley_terry", [GOOD, {**GOOD, "rejected": "clear"}], "row 1: `chosen` and `rejected` are the same text"),
        (
            "davidson",
            [{"prompt": "q ?", "response_a": "clear", "response_b": "rude", "winner": "neither"}],
            "row 0: `winner` is 'neither'",
        ),
        ("approval", [{"prompt": "q ?", "completion": "clear", "label": "maybe"}], "row 0: `label` is 'maybe'"),
        ("ratings", [{"prompt": "q ?", "response": "clear", "rating": float("nan")}], "row 0: `rating` is nan"),
        (
            "plackett_luce",
            [{"prompt": "q ?", "responses": ["clear", "rude"], "ranking": [0, 5]}],
            "row 0: `ranking` names response 5, but there are 2 responses",
        ),
    ],
)
def test_rows(program, rows, reason, encoder, write, tmp_path, capsys):
    path = write("rows.jsonl", rows)
    message = fails(
        ["fit", program, "map", path, "-o", str(tmp_path / "run"), "--program.encoder", encoder], tmp_path, capsys
    )
    assert path in message
    assert reason in message


def test_truncated_parquet(encoder, tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    brm.Comparisons.load([GOOD]).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    message = fails(["fit", "davidson", "map", str(path), "-o", str(tmp_path / "run")], tmp_path, capsys)
    assert str(path) in message
    assert "not a readable Parquet file" in message


def test_broken_json_names_the_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n{"prompt"\n')
    message = fails(["fit", "davidson", "map", str(path), "-o", str(tmp_path / "run")], tmp_path, capsys)
    assert f"{path}: line 2 is not valid JSON" in message


@pytest.mark.parametrize("command", [["fit", "davidson", "map"], ["simulate", "davidson"]])
def test_absent_file(command, tmp_path, capsys):
    output = str(tmp_path / ("run" if command[0] == "fit" else "sim.parquet"))
    message = fails([*command, str(tmp_path / "absent.jsonl"), "-o", output], tmp_path, capsys)
    assert f"{tmp_path / 'absent.jsonl'}: there is no such file" in message


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--program.pooling", "median"], "`pooling` must be one of 'mean', 'cls', 'last', 'max', got 'median'"),
        (["--program.inputs", "response,title"], "`inputs` must be one of"),
        (["--program.precision", "-1"], "`precision` is -1.0"),
        (["--program.encoder", "/no/such/folder"], "`model` '/no/such/folder' is neither a folder that exists"),
        (["--program.hidden", "0"], "`hidden` is (0,)"),
        (["--engine.prior_precision", "guessed"], "`prior_precision` is 'guessed'"),
        (["--data.kind", "opinion"], "`kind` is 'opinion'"),
        (["--data.on-bad-row", "ignore"], "`on_bad_row` is 'ignore'"),
        (["--data.levels", "1,5"], "`levels` is given, but"),
    ],
)
def test_flag_values(flags, reason, encoder, pairs, tmp_path, capsys):
    arguments = ["fit", "davidson", "map", pairs, "-o", str(tmp_path / "run"), "--program.encoder", encoder]
    assert reason in fails([*arguments, *flags], tmp_path, capsys, code=2)


def test_prompt_longer_than_the_context(encoder, write, tmp_path, capsys):
    path = write("rows.jsonl", [GOOD, {**GOOD, "prompt": "q1 " * 200}])
    arguments = ["fit", "bradley_terry", "map", path, "-o", str(tmp_path / "run"), "--program.encoder", encoder]
    message = fails([*arguments, "--program.on-long", "raise"], tmp_path, capsys)
    # 200 words and two special tokens in a context of 32 (see the encoder's configuration).
    assert "item 2: the prompt text has 202 tokens, at most 32 fit" in message
    assert main([*arguments, "--engine.prior_precision", "given"]) == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [("ratings", "Ordinal describes feedback of kind rating"), ("bradley_terry", "tie"), ("plackett_luce", "tie")],
)
def test_program_that_does_not_explain_the_data(program, reason, encoder, pairs, tmp_path, capsys):
    arguments = ["fit", program, "map", pairs, "-o", str(tmp_path / "run"), "--program.encoder", encoder]
    assert reason in fails(arguments, tmp_path, capsys)


@pytest.mark.parametrize("command", ["predict", "select"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: shutil.rmtree(run), "manifest.json is missing"),
        (lambda run: (run / "posterior.safetensors").unlink(), "posterior.safetensors is missing"),
        (lambda run: (run / "posterior.json").write_text("{}"), "posterior.json differs from the digest"),
        (lambda run: (run / "manifest.json").write_text('{"format"'), "manifest.json cannot be read"),
        (
            lambda run: (run / "posterior.safetensors").write_bytes((run / "posterior.safetensors").read_bytes()[:-8]),
            "posterior.safetensors differs from the digest",
        ),
    ],
)
def test_damaged_run(command, damage, reason, run_folder, candidates, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    damage(run)
    message = fails([command, str(run), candidates, "-o", str(tmp_path / "out.jsonl")], tmp_path, capsys)
    assert str(run) in message
    assert reason in message


def test_unknown_annotator(encoder, pairs, decided, write, tmp_path, capsys):
    flags = ["--program.encoder", encoder, "--engine.prior_precision", "given"]
    assert main(["fit", "rater_reliability", "map", decided, "-o", str(tmp_path / "run"), *flags]) == 0
    other = write("other.jsonl", [{**GOOD, "annotator": "nobody"}])
    capsys.readouterr()
    assert "annotator 'nobody' of row 0" in fails(["predict", str(tmp_path / "run"), other], tmp_path, capsys)

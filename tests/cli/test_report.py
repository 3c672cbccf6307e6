import json

import pytest

import bayesrm as brm
from bayesrm.cli import main
from bayesrm.diagnostics._report import examine

pytest.importorskip("matplotlib")


def test_the_page_and_its_verdicts(run_folder, pairs, decided, tmp_path, capsys):
    output = tmp_path / "report.html"
    arguments = ["report", run_folder, pairs, "-o", str(output), "--ood", decided, "--title", "<Mine>", "--seed", "1"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    posterior = brm.Posterior.from_pretrained(run_folder)
    expected = examine(posterior, brm.Comparisons.load(pairs), ood=brm.Comparisons.load(decided), seed=1)
    assert [s["verdict"] for s in record["sections"]] == [s.verdict for s in expected]
    assert [s["status"] for s in record["sections"]] == [s.status for s in expected]
    assert record["output"] == str(output)
    page = output.read_text(encoding="utf-8")
    assert "&lt;Mine&gt;" in page
    # The words of the most uncertain comparison are shown.
    assert "clear kind exact" in page
    assert "from elsewhere" in page


def test_for_a_person(run_folder, pairs, tmp_path, capsys):
    assert main(["report", run_folder, pairs, "-o", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Comparisons(12 rows")
    # The fixture's run was fitted on these rows.
    assert "problem  The data: These 12 comparisons are the very data" in out
    assert out.endswith(f"written to {tmp_path / 'r.html'}\n")


def fails(arguments, tmp_path, capsys, code=1):
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    return captured.err.splitlines()[-1]


def test_bad_input(run_folder, pairs, write, tmp_path, capsys):
    output = str(tmp_path / "r.html")
    wrong = fails(["report", run_folder, pairs, "-o", output[:-1]], tmp_path, capsys, code=2)
    assert "its name must end in .html" in wrong
    absent = str(tmp_path / "absent.jsonl")
    assert f"{absent}: there is no such file" in fails(["report", run_folder, absent, "-o", output], tmp_path, capsys)
    for flag in ("--ood", "--train"):
        arguments = ["report", run_folder, pairs, "-o", output, flag, absent]
        assert f"{absent}: there is no such file" in fails(arguments, tmp_path, capsys)
    no_run = fails(["report", str(tmp_path), pairs, "-o", output], tmp_path, capsys)
    assert "manifest.json is missing" in no_run
    masked = write("masked.jsonl", [{"prompt": "q1 ?", "chosen": "clear", "rejected": "rude", "weight": 0}])
    assert "every row of `data` has weight 0" in fails(["report", run_folder, masked, "-o", output], tmp_path, capsys)


def test_an_existing_file_is_refused_and_replaced_on_request(run_folder, pairs, tmp_path, capsys):
    output = tmp_path / "r.html"
    output.write_text("precious")
    assert "pass --overwrite" in fails(["report", run_folder, pairs, "-o", str(output)], tmp_path, capsys, code=2)
    assert output.read_text() == "precious"
    assert main(["report", run_folder, pairs, "-o", str(output), "--overwrite"]) == 0
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")

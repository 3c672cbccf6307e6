import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import bayesrm as brm
from bayesrm.cli import main
from bayesrm.diagnostics import best_of_n_curve, subset_curve
from bayesrm.selection import CVaR, LowerConfidenceBound

WORDS = ["clear", "kind", "exact", "vague", "rude", "wrong"]

# Three to five responses a prompt; gold counts good words.
ROWS = [
    {
        "prompt": f"q{i} ?",
        "responses": [" ".join(WORDS[(i + j + k) % 6] for k in range(1 + j)) for j in range(3 + i % 3)],
        "gold": [sum((i + j + k) % 6 < 3 for k in range(1 + j)) - 0.5 * j for j in range(3 + i % 3)],
    }
    for i in range(8)
]


@pytest.fixture
def source(write):
    return write("gold.jsonl", ROWS)


@pytest.fixture
def believed(run_folder):
    posterior = brm.Posterior.from_pretrained(run_folder)
    belief = posterior.predict([row["prompt"] for row in ROWS], [row["responses"] for row in ROWS])
    gold = np.zeros(belief.mean.shape)
    for i, row in enumerate(ROWS):
        gold[i, : len(row["gold"])] = row["gold"]
    return belief, gold


def result(arguments, capsys):
    assert main(["evaluate", "best-of-n", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_curves_are_those_of_the_library(run_folder, source, believed, capsys):
    rules = ["--rule", "lower_confidence_bound:k=3,mean", "--rule", "cvar:level=0.2:spread=pointwise"]
    found = result([run_folder, source, *rules, "--num-subsets", "12", "--seed", "3"], capsys)
    belief, gold = believed
    mean = best_of_n_curve(belief.mean, gold, mask=belief.mask, seed=3)
    settings = {"num_subsets": 12, "seed": 3}
    lengths = np.zeros(belief.mean.shape)
    for i, row in enumerate(ROWS):
        lengths[i, : len(row["responses"])] = [len(text) for text in row["responses"]]
    expected = {
        "mean": mean,
        "lower_confidence_bound:k=3": subset_curve(belief, LowerConfidenceBound(k=3.0), gold, **settings),
        "cvar:level=0.2:spread=pointwise": subset_curve(belief, CVaR(0.2, "pointwise"), gold, **settings),
        "longest response": best_of_n_curve(lengths, gold, mask=belief.mask, proxy=belief.mean, seed=3),
    }
    assert (found["command"], found["prompts"], found["refused"]) == ("evaluate best-of-n", 8, [])
    assert list(found["curves"]) == list(expected)
    for name, curve in expected.items():
        record = found["curves"][name]
        assert record["num_candidates"] == [1, 2, 3]
        for key in ("kl", "gold", "gold_low", "gold_high", "proxy", "proxy_low", "proxy_high", "monte_carlo_error"):
            np.testing.assert_array_equal(record[key], getattr(curve, key))
        assert record["peak"] == curve.peak
        assert record["over_optimisation"]["high"] == curve.over_optimisation.high
        gaps = curve.difference(mean)
        for key in ("gold", "gold_low", "gold_high"):
            np.testing.assert_array_equal(record["minus_mean"][key], getattr(gaps, key))


def test_table_and_files(run_folder, source, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    arguments = ["evaluate", "best-of-n", run_folder, source, "-n", "3,1", "--rule", "thompson", "--num-subsets", "5"]
    arguments += ["-o", str(output), "--plot", str(plot)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 prompts with 3 to 5 candidates"
    record = json.loads(output.read_text())
    curve = record["curves"]["thompson"]
    assert curve["num_candidates"] == [1, 3]
    row = next(i for i, line in enumerate(lines) if line.startswith("thompson "))
    assert lines[row].split()[:3] == ["thompson", "1", "0.00"]
    assert lines[row].endswith("+0.000 [+0.000, +0.000]")
    shown = f"{curve['gold'][1]:.3f} [{curve['gold_low'][1]:.3f}, {curve['gold_high'][1]:.3f}]"
    gap = curve["minus_mean"]
    assert shown in lines[row + 1]
    assert lines[row + 1].endswith(f"{gap['gold'][1]:+.3f} [{gap['gold_low'][1]:+.3f}, {gap['gold_high'][1]:+.3f}]")
    verdicts = [line for line in lines if line.startswith(("mean: ", "thompson: ", "longest response: "))]
    assert len(verdicts) == 3
    for line in verdicts:
        found = record["curves"][line.split(":")[0]]
        assert ("rises to the end, n = 3" in line) == (found["peak"] == 3)
    assert lines[-1] == f"written to {output} and {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 2
    assert f"{output} exists; pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_prompt_that_comes_twice_is_redrawn_as_one(run_folder, write, source, capsys):
    once = result([run_folder, source], capsys)["curves"]["mean"]
    twice = result([run_folder, write("twice.jsonl", ROWS + ROWS[::-1])], capsys)["curves"]["mean"]
    np.testing.assert_allclose(once["gold_low"], twice["gold_low"], atol=1e-12)


def test_conversations_and_csv_lists(run_folder, write, source, tmp_path, capsys):
    told = [
        {**row, "responses": [[{"role": "assistant", "content": text}] for text in row["responses"]]} for row in ROWS
    ]
    a, b = (result([run_folder, path], capsys)["curves"] for path in (source, write("told.jsonl", told)))
    assert a["longest response"]["gold"] == b["longest response"]["gold"]
    table = tmp_path / "gold.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "responses", "gold"])
        writer.writerows([row["prompt"], json.dumps(row["responses"]), json.dumps(row["gold"])] for row in ROWS)
    assert result([run_folder, str(table)], capsys)["curves"] == a


def fails(arguments, tmp_path, capsys, code=1):
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main(["evaluate", "best-of-n", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gold": [1.0, 2.0]}, "row 1: `gold` holds 2 numbers for 4 responses"),
        ({"gold": [1.0, 2.0, float("nan"), 0.0]}, "row 1: `gold`[2] is nan; give a finite number"),
        ({"gold": [1.0, 2.0, "good", 0.0]}, "row 1: `gold`[2] is 'good'; give a number"),
        ({"gold": 3.0}, "row 1: `gold` is of type float; give a list"),
        ({"gold": None}, "row 1: `gold` is null"),
        ({"responses": ["clear", "kind"], "gold": [1.0, 2.0]}, "row 1: `responses` holds 2, fewer than the 3 that -n"),
        ({"responses": ["clear", " ", "kind"], "gold": [1.0, 2.0, 3.0]}, "row 1: `responses`[1] is empty"),
    ],
)
def test_bad_row(change, reason, run_folder, write, tmp_path, capsys):
    path = write("bad.jsonl", [ROWS[0], {**ROWS[1], **change}, *ROWS[2:]])
    message = fails([run_folder, path, "-n", "1,3", "-o", str(tmp_path / "c.json")], tmp_path, capsys)
    assert f"{path}, {reason}" in message
    found = result([run_folder, path, "-n", "1,3", "--on-bad-row", "skip"], capsys)
    assert found["prompts"] == 7
    assert [entry["row"] for entry in found["refused"]] == [1]
    assert reason.removeprefix("row 1: ") in found["refused"][0]["reason"]


def test_a_file_without_gold_or_with_one_prompt(run_folder, candidates, write, tmp_path, capsys):
    message = fails([run_folder, candidates], tmp_path, capsys)
    assert f"{candidates}, row 0: `gold` is missing" in message
    message = fails([run_folder, candidates, "--on-bad-row", "skip"], tmp_path, capsys)
    assert "none of its rows can be used; the first is row 0: `gold` is missing" in message
    alone = write("alone.jsonl", [ROWS[0], ROWS[0]])
    assert "all rows have one prompt" in fails([run_folder, alone], tmp_path, capsys)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rule", "best"], "`--rule` is 'best'; it is one of mean, lower_confidence_bound"),
        (["--rule", "mean,"], "`--rule` is ''"),
        (["--rule", "mean:k=2"], "the rule is mean"),
        (["--rule", "cvar:level"], "has the setting 'level'; write SETTING=VALUE"),
        (["--rule", "thompson:seed=2"], "has the setting 'seed=2'; write SETTING=VALUE with one of k, "),
        (["--rule", "cvar:level=low"], "has the setting 'level=low'; it takes float"),
        (["--rule", "cvar:level=2"], "`level` is 2.0"),
        (["--rule", "soft_best_of_n"], "`--rule soft_best_of_n` needs `--temperature`"),
        (["--rule", "worst_case"], "`num_members` is None, but a Gaussian belief has no members"),
        (["-n", "2,x"], "`--num-candidates` is '2,x'"),
        (["-n", "0,2"], "`--num-candidates` is '0,2'"),
        (["-n", "9"], "row 0: `responses` holds 3, fewer than the 9 that -n asks for"),
        (["-o", "c.txt"], "`--output` is c.txt; its name must end in .json"),
        (["--plot", "c.pdf"], "`--plot` is c.pdf; its name must end in .png"),
    ],
)
def test_flags_that_cannot_be_used(flags, reason, run_folder, source, tmp_path, capsys):
    # Rows that hold less than the flag asks for are at fault themselves.
    code = 1 if reason.startswith("row") else 2
    assert reason in fails([run_folder, source, *flags], tmp_path, capsys, code)


def test_wrong_usage(run_folder, source, tmp_path, capsys):
    assert "num_subsets" in fails([run_folder, source, "--num-subsets", "1"], tmp_path, capsys, code=2)


def test_a_figure_needs_matplotlib(run_folder, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot = str(Path(tmp_path) / "curves.png")
    message = fails([run_folder, source, "--plot", plot], tmp_path, capsys, code=2)
    assert "`--plot` needs matplotlib; install it with pip install 'bayesrm[plots]'" in message

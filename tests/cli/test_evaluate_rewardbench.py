import json
import random

import pytest

import bayesrm as brm
from bayesrm.cli import main

WORDS = ["clear", "kind", "exact", "vague", "rude", "wrong"]


def rows_1(count=24):
    """Pairs in the format of RewardBench, most of which the posterior answers: it prefers the first three words."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        texts = [" ".join(rng.choices(WORDS[:4], k=3)), " ".join(rng.choices(WORDS[2:], k=3))]
        subset = ("math-prm", "hep-go", "donotanswer")[i % 3]
        row = {"prompt": f"q{i % 12} {i} ?", "chosen": texts[0], "chosen_model": "m", "rejected": texts[1]}
        rows.append({**row, "rejected_model": "n", "subset": subset, "id": i})
    return rows


def rows_2(count=12):
    rng = random.Random(1)
    rows = []
    for i in range(count):
        right = [" ".join(rng.choices(WORDS[:3], k=3))]
        wrong = [" ".join(rng.choices(WORDS[2:], k=3)) for _ in range(3)]
        row = {"id": str(i), "prompt": f"q{i} ?", "chosen": right, "rejected": wrong}
        rows.append({**row, "num_correct": 1, "subset": ("Math", "Focus")[i % 2]})
    for number in (4, 5):
        for kind, right in (("ref", ["clear kind"]), ("tied", ["clear kind", "kind exact"])):
            row = {"id": f"{kind}:{number}", "prompt": f"q{number} ?", "chosen": right, "rejected": ["rude", "vague"]}
            rows.append({**row, "num_correct": len(right), "subset": "Ties"})
    return rows


@pytest.fixture(scope="session")
def other_run(tmp_path_factory, encoder):
    """A posterior that prefers the other words."""
    folder = tmp_path_factory.mktemp("other")
    data = folder / "pairs.jsonl"
    rows = [{"prompt": f"q{i} ?", "chosen": "vague rude", "rejected": "clear kind"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["fit", "bradley_terry", "map", str(data), "-o", str(folder / "run"), "--program.encoder", encoder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESRM_CACHE", str(folder / "cache"))
        assert main(arguments) == 0
    return str(folder / "run")


def numbers(estimate):
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


@pytest.mark.parametrize("rows", [rows_1(), rows_2()], ids=["version 1", "version 2"])
def test_agrees_with_the_library(rows, run_folder, write, tmp_path, capsys):
    path, output = write("bench.jsonl", rows), tmp_path / "found.json"
    assert main(["evaluate", "rewardbench", run_folder, path, "-o", str(output), "--json", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record == json.loads(output.read_text())
    posterior = brm.Posterior.from_pretrained(run_folder)
    expected = brm.diagnostics.evaluate_rewardbench(posterior, path, seed=3)
    assert record["version"] == expected.version
    assert record["overall"] == numbers(expected.overall)
    assert record["sections"] == {name: numbers(score) for name, score in expected.sections.items()}
    assert [s["name"] for s in record["subsets"]] == [s.name for s in expected.subsets]
    assert [s["score"] for s in record["subsets"]] == [numbers(s.score) for s in expected.subsets]
    assert record["calibration"]["p_value"] == expected.calibration.p_value
    assert record["abstention"]["area"] == numbers(expected.abstention.area)
    assert record["missing"] == list(expected.missing)
    assert record["refused"] == []


def test_for_a_person(run_folder, write, capsys):
    path = write("bench.jsonl", rows_1())
    assert main(["evaluate", "rewardbench", run_folder, path]) == 0
    out = capsys.readouterr().out
    starts = [line.split("  ")[0] for line in out.splitlines()]
    # In the order of the sections.
    assert starts[1:7] == ["donotanswer", "math-prm", "hep-go", "Safety", "Reasoning", "overall"]
    assert "Of its picks it is " in out
    assert "20 subsets are missing, so that these are no scores of the benchmark: alpacaeval-easy, " in out


def test_against_another_run(run_folder, other_run, write, capsys):
    path = write("bench.jsonl", rows_1(48))
    command = ["evaluate", "rewardbench", run_folder, path, "--against", other_run]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = [
        brm.diagnostics.evaluate_rewardbench(brm.Posterior.from_pretrained(run), path)
        for run in (run_folder, other_run)
    ]
    expected = brm.diagnostics.compare_rewardbench(*results)
    comparison = found["against"]["comparison"]
    assert comparison["overall"] == numbers(expected.overall)
    assert comparison["p_value"] == expected.p_value
    assert [s["adjusted_p_value"] for s in comparison["subsets"]] == [s.adjusted_p_value for s in expected.subsets]
    assert found["against"]["overall"] == numbers(results[1].overall)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{run_folder} minus {other_run}" in out
    assert "after Holm's correction" in out


def test_a_run_against_itself(run_folder, write, capsys):
    path = write("bench.jsonl", rows_1(6))
    assert main(["evaluate", "rewardbench", run_folder, path, "--against", run_folder]) == 0
    out = capsys.readouterr().out
    assert "RUN minus RUN2" in out
    assert "Overall they cannot be told apart at 5%; after Holm's correction, on no subset." in out


def test_settings(run_folder, write, capsys):
    path = write("bench.jsonl", rows_2())
    posterior = brm.Posterior.from_pretrained(run_folder)
    flags = ["--rule", "lower_confidence_bound", "--k", "4", "--certainty", "best"]
    assert main(["evaluate", "rewardbench", run_folder, path, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = brm.diagnostics.evaluate_rewardbench(
        posterior, path, rule=brm.selection.LowerConfidenceBound(k=4.0), certainty="best"
    )
    assert found["overall"] == numbers(expected.overall)
    assert found["subsets"][0]["confidence"] == expected.subsets[0].confidence
    assert main(["evaluate", "rewardbench", run_folder, path, "--k", "4"]) == 2
    assert "`--k` is 4.0, but the rule is mean" in capsys.readouterr().err
    # Every rule that needs the belief alone; one that draws takes the command's seed.
    assert main(["evaluate", "rewardbench", run_folder, path, "--rule", "thompson", "--seed", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    drawn = brm.diagnostics.evaluate_rewardbench(posterior, path, rule=brm.selection.Thompson(seed=3), seed=3)
    assert found["overall"] == numbers(drawn.overall)
    assert main(["evaluate", "rewardbench", run_folder, path, "--conversational", "--json"]) == 0


def test_bad_rows_and_files(run_folder, write, tmp_path, capsys):
    path = write("bench.jsonl", [*rows_1(4), {**rows_1(1)[0], "chosen": ""}])
    output = tmp_path / "found.json"
    command = ["evaluate", "rewardbench", run_folder, path, "-o", str(output)]
    assert main([*command, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{path}, row 4: `chosen` is empty" in captured.err
    assert not output.exists()
    assert main([*command, "--on-bad-row", "skip"]) == 0
    assert "1 rows refused; the first is row 4: `chosen` is empty" in capsys.readouterr().out
    assert main(command) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    mine = write("mine.jsonl", [{**rows_1(1)[0], "subset": "mine"}])
    assert main(["evaluate", "rewardbench", run_folder, mine]) == 1
    assert "none of the subsets ['mine'] belongs to a section" in capsys.readouterr().err
    assert main(["evaluate", "rewardbench", run_folder, path, "-o", "found.txt"]) == 2
    assert "its name must end in .json" in capsys.readouterr().err


def test_one_item_has_no_calibration(run_folder, write, capsys):
    path = write("one.jsonl", rows_1(1))
    assert main(["evaluate", "rewardbench", run_folder, path]) == 0
    assert "calibration cannot be judged" in capsys.readouterr().out


def test_help_names_the_evaluation(capsys):
    assert main(["evaluate", "rewardbench", "--help"]) == 0
    assert "RUN2" in capsys.readouterr().out

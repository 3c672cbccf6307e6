import json
from pathlib import Path

import pytest

import bayesrm as brm
from bayesrm.cli import main


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ([], brm.selection.LowerConfidenceBound(k=1.0)),
        (["--rule", "mean"], brm.selection.Mean()),
        (["--rule", "lower_confidence_bound", "--k", "3"], brm.selection.LowerConfidenceBound(k=3.0)),
        (["--k", "2", "--spread", "pointwise"], brm.selection.LowerConfidenceBound(k=2.0, spread="pointwise")),
        (["--rule", "variance_penalty", "--k", "0.1"], brm.selection.VariancePenalty(k=0.1)),
        (["--rule", "risk_averse", "--b", "2"], brm.selection.RiskAverse(b=2.0)),
        (["--rule", "cvar", "--level", "0.2"], brm.selection.CVaR(level=0.2)),
        (["--rule", "worst_case", "--num-members", "5"], brm.selection.WorstCase(num_members=5)),
        (["--rule", "uncertainty_weighted", "--weight", "1"], brm.selection.UncertaintyWeighted(weight=1.0)),
        (["--rule", "most_likely_best", "--num-samples", "64"], brm.selection.MostLikelyBest(num_samples=64)),
        (["--rule", "soft_best_of_n", "--temperature", "1", "--seed", "2"], brm.selection.SoftBestOfN(1.0, seed=2)),
        (["--rule", "inference_time_pessimism", "--b", "1"], brm.selection.InferenceTimePessimism(1.0)),
        (["--rule", "thompson"], brm.selection.Thompson(seed=0)),
        (["--rule", "thompson", "--seed", "3"], brm.selection.Thompson(seed=3)),
    ],
)
def test_picks_are_those_of_the_library(flags, rule, run_folder, candidates, capsys):
    assert main(["select", run_folder, candidates, *flags, "--json"]) == 0
    picks = json.loads(capsys.readouterr().out)["picks"]
    source = [json.loads(line) for line in Path(candidates).read_text().splitlines()]
    posterior = brm.Posterior.from_pretrained(run_folder)
    belief = posterior.predict([row["prompt"] for row in source], [row["responses"] for row in source])
    expected = brm.select(belief, rule=rule).tolist()
    assert [pick["index"] for pick in picks] == expected
    assert [pick["response"] for pick in picks] == [
        row["responses"][i] for row, i in zip(source, expected, strict=True)
    ]
    assert [pick["score"] for pick in picks] == [float(rule(belief)[row, i]) for row, i in enumerate(expected)]


def test_file_and_text(run_folder, candidates, tmp_path, capsys):
    output = tmp_path / "picks.jsonl"
    assert main(["select", run_folder, candidates, "-o", str(output), "--rule", "mean"]) == 0
    shown = capsys.readouterr().out.splitlines()
    picks = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.split("  ")[0] for line in shown[:2]] == [
        f"row {pick['row']}: [{pick['index']}] score {pick['score']:+.3f}" for pick in picks
    ]
    assert shown[2] == f"written to {output}"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rule", "mean", "--k", "2"], "`--k` is 2.0, but the rule is mean"),
        (["--rule", "thompson", "--spread", "pointwise"], "`--spread` is pointwise, but the rule is thompson"),
        (["--seed", "3"], "it is a setting of --rule worst_case, most_likely_best, thompson"),
        (["--rule", "soft_best_of_n"], "`--rule soft_best_of_n` needs `--temperature`"),
        (["--k", "-1"], "`k` is -1.0"),
        (["--spread", "wide"], "`spread` is 'wide'"),
    ],
)
def test_settings_that_do_not_fit_the_rule(flags, reason, run_folder, candidates, capsys):
    assert main(["select", run_folder, candidates, *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q ?", "responses": []}, "row 1: `responses` is empty"),
        ({"prompt": "q ?", "responses": ["clear", " "]}, "row 1: `responses`[1] is empty"),
        ({"prompt": "q ?", "responses": "clear"}, "row 1: `responses` is of type str"),
        ({"prompt": None, "responses": ["clear"]}, "row 1: `prompt`"),
    ],
)
def test_bad_row(row, reason, run_folder, write, tmp_path, capsys):
    path = write("c.jsonl", [{"prompt": "q1 ?", "responses": ["clear"]}, row])
    assert main(["select", run_folder, path, "-o", str(tmp_path / "picks.jsonl"), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{path}, {reason}" in captured.err
    assert not (tmp_path / "picks.jsonl").exists()
    assert main(["select", run_folder, path, "--on-bad-row", "skip"]) == 0
    assert "1 rows refused; the first is row 1: " in capsys.readouterr().out


def test_file_without_candidates(run_folder, pairs, capsys):
    assert main(["select", run_folder, pairs]) == 1
    error = capsys.readouterr().err
    assert pairs in error
    assert "accepted are `prompt` and `responses`" in error

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.cli import main


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_feedback_agrees_with_the_library(run_folder, pairs, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert main(["predict", run_folder, pairs, "-o", str(output), "--json", "--seed", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    data = brm.Comparisons.load(pairs)
    prediction = brm.Posterior.from_pretrained(run_folder).predict_feedback(data, seed=2)
    scores = brm.diagnostics.score(prediction, data.prompt_of_row, seed=2)
    for name in ("accuracy", "nll", "brier", "ece"):
        expected = getattr(scores, name)
        assert record["metrics"][name] == {"value": expected.value, "low": expected.low, "high": expected.high}
    rows = lines(output)
    assert [row["row"] for row in rows] == list(range(12))
    assert all(row["outcomes"] == [0, 1, 2] for row in rows)
    # Every row's answer, by the file itself: a, b or tie.
    winners = [row["winner"] for row in lines(Path(pairs))]
    assert [row["observed"] for row in rows] == ["ab".find(winner) if winner != "tie" else 2 for winner in winners]
    assert np.allclose([sum(row["probs"]) for row in rows], 1.0, atol=1e-12)
    assert np.allclose([np.log(row["probs"][row["observed"]]) for row in rows], prediction.log_prob, atol=1e-12)


def test_feedback_for_a_person(run_folder, pairs, capsys):
    assert main(["predict", run_folder, pairs]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Comparisons(12 rows")
    assert all(f"\n{name} " in out for name in ("accuracy", "nll", "brier", "ece"))


def test_one_prompt_has_no_interval(run_folder, write, capsys):
    rows = [
        {"prompt": "q1 ?", "chosen": "clear", "rejected": "rude"},
        {"prompt": "q1 ?", "chosen": "kind", "rejected": "wrong"},
    ]
    path = write("one.jsonl", rows)
    assert main(["predict", run_folder, path, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    expected = brm.Posterior.from_pretrained(run_folder).predict_feedback(brm.Comparisons.load(path)).nll
    assert metrics["nll"] == {"value": pytest.approx(expected, abs=1e-12), "low": None, "high": None}
    assert main(["predict", run_folder, path]) == 0
    assert "(one prompt, no interval)" in capsys.readouterr().out


def test_candidates_agree_with_the_library(run_folder, candidates, tmp_path, capsys):
    assert main(["predict", run_folder, candidates, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    source = lines(tmp_path / "candidates.jsonl")
    posterior = brm.Posterior.from_pretrained(run_folder)
    for row, given in zip(rows, source, strict=True):
        belief = posterior.predict([given["prompt"]], [given["responses"]])
        # The std of the deviation from the candidates' mean, by the definition: C = I - 1/K.
        center = torch.eye(len(given["responses"])) - 1 / len(given["responses"])
        covariance = center.double() @ belief.covariance[0].double() @ center.double()
        # Features are float32 and batched otherwise here: about 1e-5 relative.
        assert np.allclose(row["std"], covariance.diagonal().sqrt(), rtol=1e-4)
        assert np.allclose(row["mean"], belief.mean[0], rtol=1e-4, atol=1e-4)
        assert np.allclose(row["deviation"], belief.mean[0] - belief.mean[0].mean(), atol=1e-4)
        assert sum(row["prob_best"]) == pytest.approx(1.0, abs=1e-6)


def test_candidates_to_a_file_with_a_bad_row_skipped(run_folder, write, tmp_path, capsys):
    rows = [
        {"prompt": "q1 ?", "responses": ["clear"]},
        {"prompt": "q2 ?", "responses": ["clear", ""]},
        {"prompt": [{"role": "user", "content": "q3 ?"}], "responses": ["kind", "rude"]},
    ]
    path, output = write("c.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["predict", run_folder, path, "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert f"error: {path}, row 1: `responses`[1] is empty" in error
    assert not output.exists()
    assert main(["predict", run_folder, path, "-o", str(output), "--data.on-bad-row", "skip", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    # Row numbers stay those of the source.
    assert [row["row"] for row in lines(output)] == [0, 2]
    assert [entry["row"] for entry in record["refused"]] == [1]
    assert lines(output)[0]["std"] == [0.0]


def test_existing_file_is_refused_and_replaced_on_request(run_folder, pairs, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert main(["predict", run_folder, pairs, "-o", str(output)]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main(["predict", run_folder, pairs, "-o", str(output), "--overwrite"]) == 0
    assert len(lines(output)) == 12


def test_output_must_be_json_lines(run_folder, pairs, tmp_path, capsys):
    assert main(["predict", run_folder, pairs, "-o", str(tmp_path / "out.csv")]) == 2
    assert "must end in .jsonl" in capsys.readouterr().err


def test_texts_for_a_posterior_of_features(candidates, tmp_path, capsys):
    data = brm.Comparisons.from_arrays(np.eye(3), candidates=[[0, 1], [1, 2]], outcome=[0, 0])
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
    brm.fit(model, data).save_pretrained(tmp_path / "run")
    assert main(["predict", str(tmp_path / "run"), candidates]) == 2
    assert "fitted on precomputed features" in capsys.readouterr().err


def test_a_gaussian_process_predicts_from_texts(encoder, pairs, decided, tmp_path, capsys):
    folder, output = str(tmp_path / "run"), tmp_path / "rows.jsonl"
    fit = ["fit", "gaussian_process", "laplace_full", decided, "-o", folder, "--program.encoder", encoder]
    assert main(fit) == 0
    assert main(["predict", folder, decided, "-o", str(output)]) == 0
    capsys.readouterr()
    expected = brm.Posterior.from_pretrained(folder).predict_feedback(brm.Comparisons.load(decided)).log_prob
    np.testing.assert_allclose([row["log_prob"] for row in lines(output)], expected, rtol=0, atol=1e-9)
    assert main(["report", folder, decided, "-o", str(tmp_path / "r.html")]) == 0

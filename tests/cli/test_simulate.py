import json

import pytest
import torch

import bayesrm as brm
from bayesrm.cli import main


def simulate(source, encoder, target, *flags):
    arguments = [
        "simulate",
        "davidson",
        source,
        "-o",
        str(target),
        "--program.encoder",
        encoder,
        "--program.precision",
        "0.1",
    ]
    return main([*arguments, *flags])


def test_feedback_and_truth_are_those_of_the_program(encoder, pairs, tmp_path, capsys):
    assert simulate(pairs, encoder, tmp_path / "sim.parquet", "--seed", "4", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    truth = json.loads((tmp_path / "sim.truth.json").read_text())
    assert (record["output"], record["truth"]) == (str(tmp_path / "sim.parquet"), str(tmp_path / "sim.truth.json"))
    head = brm.rewards.text_head(encoder=encoder)
    model = brm.RewardModel(head, brm.likelihoods.Davidson(), brm.priors.Gaussian(0.1))
    expected = model.simulate(brm.Comparisons.load(pairs), seed=4)
    written = brm.Comparisons.load(tmp_path / "sim.parquet")
    assert [g.outcome.tolist() for g in written.groups()] == [g.outcome.tolist() for g in expected.data.groups()]
    assert truth["parameters"]["weight"] == expected.parameters["weight"].tolist()
    assert truth["latents"]["tie_weight"] == float(expected.latents["tie_weight"])
    assert truth["rewards"] == expected.rewards.tolist()
    assert (truth["program"], truth["seed"], truth["settings"]["precision"]) == ("davidson", 4, 0.1)
    assert written.features is None
    assert written.text(0) == brm.Comparisons.load(pairs).text(0)


def test_seed_decides(encoder, pairs, tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert simulate(pairs, encoder, tmp_path / f"{name}.parquet", "--seed", seed) == 0
    a, b, c = (json.loads((tmp_path / f"{name}.truth.json").read_text())["rewards"] for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_fit_reads_what_was_written(encoder, pairs, tmp_path, capsys):
    assert simulate(pairs, encoder, tmp_path / "sim.parquet") == 0
    flags = ["--program.encoder", encoder, "--engine.prior_precision", "given", "-o", str(tmp_path / "run")]
    assert main(["fit", "davidson", "map", str(tmp_path / "sim.parquet"), *flags]) == 0
    assert torch.isfinite(brm.Posterior.from_pretrained(tmp_path / "run").mode).all()


@pytest.mark.parametrize("name", ["sim.parquet", "sim.truth.json"])
def test_existing_files_are_refused(name, encoder, pairs, tmp_path, capsys):
    (tmp_path / name).write_text("precious")
    assert simulate(pairs, encoder, tmp_path / "sim.parquet") == 2
    assert f"{tmp_path / name} exists; pass --overwrite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["pairs.jsonl", name])


def test_failure_while_writing_leaves_nothing(encoder, pairs, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert simulate(pairs, encoder, tmp_path / "sim.parquet") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_texts_without_encoder_are_refused(pairs, tmp_path, capsys):
    assert main(["simulate", "davidson", pairs, "-o", str(tmp_path / "sim.parquet")]) == 2
    assert "pass --program.encoder" in capsys.readouterr().err


CYCLIC = '''"""Preferences that may hold cycles."""

import bayesrm as brm


def build(*, encoder: str, precision: float = 0.1) -> brm.RewardModel:
    """Makes the program.

    Args:
        encoder: Language model.
        precision: Prior precision.
    """
    reward = brm.rewards.PairwisePreference(brm.rewards.FeatureExtractor(encoder), rank=2)
    return brm.RewardModel(reward, brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(precision))
'''


def test_scores_of_pairs_where_no_response_has_a_reward(encoder, decided, tmp_path, capsys):
    program, target = tmp_path / "cyclic.py", tmp_path / "sim.parquet"
    program.write_text(CYCLIC)
    arguments = ["simulate", str(program), decided, "-o", str(target), "--program.encoder", encoder, "--seed", "2"]
    assert main(arguments) == 0
    truth = json.loads((tmp_path / "sim.truth.json").read_text())
    written, given = brm.Comparisons.load(target), brm.Comparisons.load(decided)
    assert "rewards" not in truth
    assert sorted(truth["parameters"]) == ["intransitive", "weight"]
    # The scores are those of the parameters on the features of the responses.
    features = torch.as_tensor(brm.rewards.FeatureExtractor(encoder).extract_items(given)).double()
    head = brm.rewards.PairwisePreference(rank=2).bind(given.with_features(features.numpy()))
    parameters = {name: torch.tensor(value).double() for name, value in truth["parameters"].items()}
    scores, outcomes = torch.zeros(len(given)).double(), torch.zeros(len(given))
    for group, drawn in zip(given.groups(), written.groups(), strict=True):
        encoded = head.encode_pairs(features[group.items[:, 0]], features[group.items[:, 1]])
        scores[group.rows] = head.apply(parameters, encoded)
        outcomes[group.rows] = drawn.outcome.float()
    torch.testing.assert_close(torch.tensor(truth["scores"]).double(), scores, rtol=0, atol=1e-6)
    assert set(outcomes.tolist()) <= {0.0, 1.0}
    assert written.text(0) == given.text(0)
    # It can be fitted, and judged.
    run = tmp_path / "run"
    flags = ["--program.encoder", encoder, "--engine.prior_precision", "given"]
    assert main(["fit", str(program), "laplace_full", str(target), "-o", str(run), *flags]) == 0
    pytest.importorskip("matplotlib")
    assert main(["report", str(run), str(target), "-o", str(tmp_path / "page.html")]) == 0
    assert "Scores of pairs come from" in (tmp_path / "page.html").read_text()


def test_ratings_have_no_scores_of_pairs(encoder, write, tmp_path, capsys):
    program = tmp_path / "cyclic.py"
    program.write_text(CYCLIC)
    rated = write("rated.jsonl", [{"prompt": "q1 ?", "response": "clear", "rating": i} for i in (1, 2, 3)])
    arguments = ["simulate", str(program), rated, "-o", str(tmp_path / "sim.parquet"), "--program.encoder", encoder]
    assert main(arguments) == 1
    assert "a pairwise preference explains choices between two responses" in capsys.readouterr().err
    assert not (tmp_path / "sim.parquet").exists()

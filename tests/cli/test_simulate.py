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
    assert simulate(pairs, encoder, tmp_path / "sim.parquet") == 1
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
    assert main(["simulate", "davidson", pairs, "-o", str(tmp_path / "sim.parquet")]) == 1
    assert "pass --program.encoder" in capsys.readouterr().err

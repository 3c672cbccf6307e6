import json
import os

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm._ready_files import names
from bayesrm.cli import main

RANKED = [
    {"prompt": f"q{i} ?", "responses": ["clear kind", "vague", "rude wrong"], "ranking": [0, 1, 2]} for i in range(6)
]
RATED = [
    {"prompt": f"q{i} ?", "response": text, "rating": level}
    for i in range(4)
    for level, text in enumerate(["rude wrong", "vague", "clear kind"], start=1)
]
APPROVED = [
    {"prompt": f"q{i} ?", "completion": text, "label": text == "clear kind"}
    for i in range(4)
    for text in ("rude", "clear kind")
]
#: Programs below the level of the response have tests of their own.
PROGRAMS = sorted({*names("models")} - {"ava", "avril", "language_feedback"})
SOURCES = {"plackett_luce": RANKED, "ratings": RATED, "approval": APPROVED}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_fits_saves_and_predicts(program, encoder, write, decided, tmp_path, capsys):
    data = write("rows.jsonl", SOURCES[program]) if program in SOURCES else decided
    run = tmp_path / "run"
    flags = ["--program.encoder", encoder, "--engine.prior_precision", "given", "--json"]
    assert main(["fit", program, "map", data, "-o", str(run), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    posterior = brm.Posterior.from_pretrained(run)
    # Adapters are trained for a fixed number of steps, to no mode.
    assert record["report"]["converged"] is (program != "lora_bradley_terry")
    assert set(record["latents"]) == set(posterior.latents(2))
    assert main(["predict", str(run), data, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["nll"]["low"] <= metrics["nll"]["value"] <= metrics["nll"]["high"]


@pytest.mark.parametrize("engine", [name for name in names("inference") if name.startswith("laplace_")])
def test_every_laplace_engine_serves_adapters(engine, encoder, pairs, tmp_path, capsys):
    flags = ["--program.encoder", encoder, "--program.lora_rank", "2", "--engine.prior_precision", "given"]
    flags += ["--engine.max_steps", "3", "--engine.learning_rate", "1e-2", "--json"]
    assert main(["fit", "davidson", engine, pairs, "-o", str(tmp_path / "run"), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["report"]["training"]["steps"] == 3
    training = brm.Training(max_steps=3, learning_rate=1e-2)
    settings = brm.Laplace(structure=engine.removeprefix("laplace_"), training=training)
    model = brm.RewardModel(brm.rewards.LoRA(encoder, rank=2), brm.likelihoods.Davidson())
    direct = brm.fit(model, brm.Comparisons.load(pairs), inference=settings)
    saved = brm.Posterior.from_pretrained(tmp_path / "run")
    a, b = (p.predict(["q1 ?"], [["clear kind", "rude"]]) for p in (saved, direct))
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["laplace_full", "laplace_diag", "map"])
def test_every_engine_saves_what_the_library_fits(engine, encoder, pairs, tmp_path, capsys):
    flags = ["--program.encoder", encoder, "--engine.prior_precision", "given", "--program.precision", "0.5"]
    assert main(["fit", "davidson", engine, pairs, "-o", str(tmp_path / "run"), *flags]) == 0
    out = capsys.readouterr().out
    saved = brm.Posterior.from_pretrained(tmp_path / "run")
    engines = {"laplace_full": brm.Laplace(), "laplace_diag": brm.Laplace(structure="diag"), "map": brm.MAP()}
    head = brm.rewards.text_head(encoder=encoder)
    model = brm.RewardModel(head, brm.likelihoods.Davidson(), brm.priors.Gaussian(0.5))
    direct = brm.fit(model, brm.Comparisons.load(pairs), inference=engines[engine])
    # The same program on the same machine: nothing differs but the way to it.
    assert torch.equal(saved.mode, direct.mode)
    assert (saved.factor is None) == (engine == "map")
    assert saved.factor is None or torch.equal(saved.factor, direct.factor)
    assert "choice of 2: 12 rows, 4 ties" in out
    assert "Linear reward, Davidson likelihood" in out
    assert out.endswith(f"saved to {tmp_path / 'run'}\n")


def test_flags_reach_program_engine_and_reader(encoder, write, tmp_path, capsys):
    rows = [{"q": f"q{i} ?", "chosen": "clear", "rejected": "rude"} for i in range(4)] + [{"q": "?", "chosen": "clear"}]
    flags = ["--program.encoder", encoder, "--program.inputs", "response,length", "--program.hidden=3,2"]
    flags += [
        "--program.pooling=max",
        "--program.normalize",
        "false",
        "--program.standardize=true",
        "--program.precision=2",
    ]
    flags += ["--engine.prior-precision", "given", "--engine.gradient_tolerance", "1e-4"]
    flags += ["--data.on-bad-row", "skip", "--data.columns", '{"prompt": "q"}', "--seed", "5", "--json"]
    assert main(["fit", "thurstone", "map", write("r.jsonl", rows), "-o", str(tmp_path / "run"), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    program = brm.Posterior.from_pretrained(tmp_path / "run").program
    assert program.reward.hidden == (3, 2)
    assert program.reward.standardize
    assert program.reward.features.inputs == ("response", "length")
    assert (str(program.reward.features.pooling), program.reward.features.normalize) == ("max", False)
    assert program.prior.precision == 2.0
    assert record["report"]["engine"]["settings"]["gradient_tolerance"] == 1e-4
    assert record["report"]["seed"] == 5
    assert [entry["row"] for entry in record["data"]["refused"]] == [4]
    assert "`rejected` is missing" in record["data"]["refused"][0]["reason"]


def test_help_shows_the_flags_of_program_and_engine(capsys):
    assert main(["fit", "davidson", "laplace_full", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--program.log_tie_weight_scale" in text
    assert "Prior standard deviation of log nu. (type: float, default: 1.0)" in text
    assert "--program.encoder ENCODER Folder of a language model" in text
    assert "--engine.coordinates" in text
    assert "flags of the program davidson (A choice between two responses, with ties)" in text


def test_data_with_features_need_no_encoder(tmp_path, capsys):
    features = np.random.default_rng(0).normal(size=(6, 2))
    data = brm.Comparisons.from_arrays(features, candidates=[[0, 1], [2, 3], [4, 5]], outcome=[0, 1, 0])
    data.to_parquet(tmp_path / "data.parquet")
    run = tmp_path / "run"
    arguments = ["fit", "bradley_terry", "laplace_full", str(tmp_path / "data.parquet"), "-o", str(run)]
    assert main([*arguments, "--engine.prior_precision", "given"]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "data.parquet"), "--json"]) == 0
    nll = json.loads(capsys.readouterr().out)["metrics"]["nll"]["value"]
    # Fitted by the library under the same settings.
    model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
    direct = brm.fit(model, data, inference=brm.Laplace())
    assert nll == pytest.approx(direct.predict_feedback(data).nll, abs=1e-12)


def test_existing_run_is_refused_before_work_and_replaced_on_request(encoder, pairs, tmp_path, capsys):
    run = str(tmp_path / "run")
    arguments = [
        "fit",
        "davidson",
        "map",
        pairs,
        "-o",
        run,
        "--program.encoder",
        encoder,
        "--engine.prior_precision=given",
    ]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    capsys.readouterr()
    # The data do not exist either; that the folder is named shows that it is looked at first.
    assert main(["fit", "davidson", "map", "absent.jsonl", "-o", run]) == 1
    assert f"{run} holds a saved posterior; pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    assert main([*arguments, "--overwrite", "--program.precision", "7"]) == 0
    assert brm.Posterior.from_pretrained(run).report.prior_precision == 7.0
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "run"]


def test_other_outputs_in_the_way_are_refused(pairs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert main(["fit", "davidson", "map", pairs, "-o", str(tmp_path / "mine"), "--overwrite"]) == 1
    assert "is not a saved posterior" in capsys.readouterr().err
    assert main(["fit", "davidson", "map", pairs, "-o", pairs, "--overwrite"]) == 1
    assert "is a file" in capsys.readouterr().err
    assert main(["fit", "davidson", "map", pairs, "-o", f"{pairs}/run"]) == 1
    assert "is not a folder that can be written to" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


OWN = '''
import bayesrm as brm
from bayesrm.backend import dist, ops, sample

@brm.likelihoods.register("ties-of-a-test")
def constant_ties(rewards, comparison):
    share = sample("tie_share", dist.Beta(1.0, 4.0))
    win = ops.log_sigmoid(rewards[:, 0] - rewards[:, 1])
    lose = ops.log_sigmoid(rewards[:, 1] - rewards[:, 0])
    tie = ops.log(share) + 0.0 * win
    return dist.Categorical(logits=ops.stack([ops.log1p(-share) + win, ops.log1p(-share) + lose, tie], axis=-1))

def build(precision: float = 1.0, **head):
    """Declares it.

    Args:
        precision: How tight.
    """
    return brm.RewardModel(brm.rewards.text_head(**head), constant_ties, brm.priors.Gaussian(precision))
'''


def test_program_and_engine_of_ones_own(encoder, pairs, tmp_path, capsys, monkeypatch):
    from bayesrm.likelihoods import base

    program, engine, run = tmp_path / "own.py", tmp_path / "quick.py", str(tmp_path / "run")
    program.write_text(OWN)
    engine.write_text("import bayesrm as brm\ndef build(steps: int = 50):\n    return brm.MAP(max_iterations=steps)\n")
    assert main(["fit", str(program), str(engine), "--help"]) == 0
    assert "How tight. (type: float, default: 1.0)" in capsys.readouterr().out
    flags = ["--program.encoder", encoder, "--engine.steps", "60", "--json"]
    assert main(["fit", str(program), str(engine), pairs, "-o", run, *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["report"]["engine"]["settings"]["max_iterations"] == 60
    assert list(record["latents"]) == ["tie_share"]
    # As a later process would see it: the file that registers the likelihood has not been run.
    monkeypatch.delitem(base._REGISTRY, "ties-of-a-test")
    assert main(["predict", run, pairs]) == 1
    assert "pass --program with the file that registers it" in capsys.readouterr().err
    assert main(["predict", run, pairs, "--program", str(program), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def build(:\n", "line 1: "),
        ("x = 1\nraise KeyError('gone')\n", "line 2: KeyError: 'gone'"),
        ("model = 1\n", "defines no function `build`"),
        ("def build():\n    return 3\n", "returned int; it must return a program such as bayesrm.RewardModel"),
    ],
)
def test_program_file_that_cannot_be_used(text, reason, tmp_path, capsys):
    program = tmp_path / "own.py"
    program.write_text(text)
    assert main(["fit", str(program), "map", "x.jsonl", "-o", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert str(program) in error
    assert reason in error
    assert not (tmp_path / "run").exists()


def test_interrupted_fit_leaves_nothing(encoder, pairs, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesrm.cli.fit.fit", interrupted)
    assert main(["fit", "davidson", "map", pairs, "-o", str(tmp_path / "run"), "--program.encoder", encoder]) == 130
    assert os.listdir(tmp_path) == ["pairs.jsonl"]
    assert capsys.readouterr().err.endswith("error: interrupted\n")

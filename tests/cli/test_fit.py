import json
import os
import warnings

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm import _ready_files
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


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=[] if name in ("laplace_full", "laplace_kron") else [pytest.mark.slow])
        for name in names("inference")
        if name.startswith("laplace_")
    ],
)
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
    assert main(["fit", "davidson", "map", "absent.jsonl", "-o", run]) == 2
    assert f"{run} holds a saved posterior; pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    assert main([*arguments, "--overwrite", "--program.precision", "7"]) == 0
    assert brm.Posterior.from_pretrained(run).report.prior_precision == 7.0
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "run"]


def test_other_outputs_in_the_way_are_refused(pairs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert main(["fit", "davidson", "map", pairs, "-o", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "is not a saved posterior" in capsys.readouterr().err
    assert main(["fit", "davidson", "map", pairs, "-o", pairs, "--overwrite"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["fit", "davidson", "map", pairs, "-o", f"{pairs}/run"]) == 2
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
    assert main(["predict", run, pairs]) == 2
    assert "pass --program with the file that registers it" in capsys.readouterr().err
    assert main(["predict", run, pairs, "--program", str(program), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 12


def test_a_likelihood_that_is_registered_nowhere(encoder, pairs, candidates, write, tmp_path, capsys):
    program, run = tmp_path / "own.py", str(tmp_path / "run")
    program.write_text(OWN.replace('@brm.likelihoods.register("ties-of-a-test")\n', ""))
    flags = ["--program.encoder", encoder, "--program.precision", "3", "--engine.prior_precision", "given"]
    fit = ["fit", str(program), "laplace_full", pairs, "-o", run, *flags]
    assert main(fit) == 0
    assert f"pass --program {program} to commands that read {run}\n" in capsys.readouterr().out
    assert main([*fit, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs_program"] == str(program)
    page, gold = str(tmp_path / "r.html"), [{"prompt": f"q{i} ?", "responses": ["clear", "rude"]} for i in (1, 2)]
    commands = [
        ["predict", run, pairs],
        ["select", run, candidates],
        ["report", run, pairs, "-o", page],
        ["acquire", run, candidates, "-n", "1"],
        ["evaluate", "best-of-n", run, write("gold.jsonl", [row | {"gold": [1.0, 0.0]} for row in gold])],
    ]
    for command in commands:
        assert main([*command, "--json"]) == 2
        assert f"pass --program with the file of its program (it was fitted from {program})" in capsys.readouterr().err
        assert main([*command, "--program", str(program), "--json"]) == 0
        captured = capsys.readouterr()
        assert "has changed" not in captured.err
        if command[0] == "predict":
            found = json.loads(captured.out)["metrics"]
    # What the library predicts with the likelihood and the settings of the fit.
    module = _ready_files.load_module(program)
    posterior = brm.Posterior.from_pretrained(run, likelihood=module.constant_ties)
    assert posterior.program.prior.precision == 3.0
    assert found["nll"]["value"] == pytest.approx(posterior.predict_feedback(brm.Comparisons.load(pairs)).nll, rel=1e-9)
    program.write_text(program.read_text().replace("Beta(1.0, 4.0)", "Beta(1.0, 5.0)"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["predict", run, pairs, "--program", str(program)]) == 0
    told = capsys.readouterr().err
    assert told.count("the source of likelihood 'constant_ties' has changed since the posterior in") == 1


WRAPPED = """
import dataclasses
import bayesrm as brm

@dataclasses.dataclass(frozen=True)
class Hard:
    scale: float = 1.0
    limits: tuple[float, ...] = (1.0, float("inf"))

    def __call__(self, rewards, comparison):
        return brm.likelihoods.BradleyTerry()(self.scale * rewards, comparison)

def build(scale: float = 1.0, **head):
    return brm.RewardModel(brm.rewards.text_head(**head), {"choice": brm.likelihoods.LabelNoise(Hard(scale))})
"""


def test_a_likelihood_of_ones_own_inside_others(encoder, decided, tmp_path, capsys):
    program, run = tmp_path / "own.py", tmp_path / "run"
    program.write_text(WRAPPED)
    flags = ["--program.encoder", encoder, "--program.scale", "0.5", "--engine.prior_precision", "given"]
    assert main(["fit", str(program), "map", decided, "-o", str(run), *flags]) == 0
    predict = ["predict", str(run), decided, "--program", str(program), "--json"]
    capsys.readouterr()
    assert main(predict) == 0
    assert "has changed" not in capsys.readouterr().err
    wrong = {
        "(self.scale * rewards": ("(2.0 * self.scale * rewards", "likelihood 'Hard' has changed", 0),
        "LabelNoise(Hard(scale))": ("LabelNoise(Hard(2 * scale))", "Hard has the settings {'scale': 1.0", 2),
        "LabelNoise(Hard": ("LengthBias(Hard", "the one is length_bias, the other label_noise", 2),
        '{"choice"': ('{"rating"', "they describe other kinds of feedback", 2),
        "def build": ("def make", "defines no function `build`", 2),
        "scale: float = 1.0, **head": ("factor: float, **head", "cannot be called with the settings of", 2),
    }
    for text, (other, message, code) in wrong.items():
        program.write_text(WRAPPED.replace(text, other))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(predict) == code
        assert message in capsys.readouterr().err
    # A run that Python saved does not hold the settings.
    (run / "program.json").unlink()
    program.write_text(WRAPPED.replace("scale: float = 1.0, **head", "scale: float, **head"))
    assert main(predict) == 2
    assert "the run does not hold them" in capsys.readouterr().err


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
    assert main(["fit", str(program), "map", "x.jsonl", "-o", str(tmp_path / "run")]) == 2
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

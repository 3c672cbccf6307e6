"""Inverse reinforcement learning on states and actions through the commands that everything else goes through."""

import json

import numpy as np
import pytest

import bayesrm as brm
from bayesrm.cli import main
from bayesrm.engines import TrajectoryPosterior
from bayesrm.programs import TabularMDP

pytest.importorskip("matplotlib")

#: A corridor of four squares; its last one ends the episode.
WORLD = TabularMDP(
    [[[1.0, 0, 0, 0], [0, 1, 0, 0]], [[1, 0, 0, 0], [0, 0, 1, 0]], [[0, 1, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 1.0]] * 2],
    [False, False, False, True],
)
FLAGS = ["--program.num-states", "4", "--program.discount", "0.9"]
TABLE = ["--program.hidden", "[]", "--engine.num-steps", "60", "--engine.learning-rate", "0.05"]
CHAINS = ["--engine.num-chains", "2", "--engine.num-warmup", "300", "--engine.num-samples", "500"]


def shown(seed, count=12):
    rewards = np.array([0.0, -1.0, 0.0, 2.0])
    return WORLD.demonstrate(rewards, count, max_steps=6, discount=0.9, rationality=2.0, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with demonstrations, held-out ones, preferences, and two runs."""
    folder = tmp_path_factory.mktemp("control")
    WORLD.save(folder / "world.npz")
    shown(0).to_parquet(folder / "shown.parquet")
    shown(1).to_parquet(folder / "held.parquet")
    rows = []
    for place in range(6):
        ways = (("short", [2, 3]), ("long", [2, 1, 0, 1][: place % 3 + 2]))
        rows += [{"id": f"{kind}{place}", "group": f"start {place}", "states": way, "actions": [1] * len(way)}
                 for kind, way in ways]  # fmt: skip
        rows[-2]["preferred_to"] = [rows[-1]["id"]]
    (folder / "prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = str(folder / "shown.parquet")
    assert main(["fit", "avril", "avril", data, "-o", str(folder / "run"), *FLAGS, *TABLE]) == 0
    dynamics = ["--program.dynamics", str(folder / "world.npz")]
    assert main(["fit", "avril", "nuts", data, "-o", str(folder / "exact"), *FLAGS, *dynamics, *CHAINS]) == 0
    return folder


def told(arguments, capsys):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(arguments, capsys, code=1):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_fit_tells_data_and_report(folder, tmp_path, capsys):
    record = told(["fit", "avril", "avril", folder / "shown.parquet", "-o", tmp_path / "run", *FLAGS, *TABLE], capsys)
    data = shown(0)
    assert record["data"] == {
        "rows": 12, "steps": len(data.actions), "demonstrations": 12, "preferences": 0, "refused": [],
    }  # fmt: skip
    assert record["report"]["engine"]["name"] == "AVRIL"
    assert record["latents"] == {}
    posterior = brm.Posterior.from_pretrained(tmp_path / "run")
    assert isinstance(posterior, TrajectoryPosterior)
    assert posterior.state_reward.num_states == 4


@pytest.mark.parametrize("run", ["run", "exact"])
def test_predict_scores_actions_and_preferences(run, folder, tmp_path, capsys):
    posterior = TrajectoryPosterior.from_pretrained(folder / run)
    record = told(["predict", folder / run, folder / "held.parquet"], capsys)
    data = shown(1)
    log_policy = posterior.policy(data.states).log().numpy()[np.arange(len(data.actions)), data.actions]
    nll = record["metrics"]["action_nll"]
    assert nll["value"] == pytest.approx(-log_policy.mean())
    assert nll["low"] < nll["value"] < nll["high"]
    assert len(record["predictions"]) == 12
    first = record["predictions"][0]
    assert first["action_log_prob"] == pytest.approx(log_policy[: data.lengths[0]].sum())
    assert first["mean"] == pytest.approx(float(posterior.predict(candidates=[data]).mean[0, 0]))
    output = tmp_path / "rows.jsonl"
    record = told(["predict", folder / run, folder / "prefs.jsonl", "-o", output], capsys)
    assert "predictions" not in record
    prediction = posterior.predict_feedback(brm.Trajectories.load(folder / "prefs.jsonl"))
    assert record["metrics"]["preference_nll"]["value"] == pytest.approx(prediction.nll)
    assert "action_nll" not in record["metrics"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows[:2]] == ["short0", "long0"]
    assert rows[0]["prob_best"] + rows[1]["prob_best"] == pytest.approx(1.0)


def test_predict_for_a_person(folder, capsys):
    assert main(["predict", str(folder / "run"), str(folder / "prefs.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "short0: " in out
    assert "against the others of group start 0" in out
    assert "preference_accuracy" in out


def test_select_picks_one_of_each_group(folder, tmp_path, capsys):
    record = told(["select", folder / "exact", folder / "prefs.jsonl", "--rule", "mean"], capsys)
    data = brm.Trajectories.load(folder / "prefs.jsonl")
    belief = TrajectoryPosterior.from_pretrained(folder / "exact").predict_items(data)
    assert [pick["index"] for pick in record["picks"]] == belief.mean.argmax(1).tolist()
    assert [pick["group"] for pick in record["picks"]] == [f"start {i}" for i in range(6)]
    assert all(pick["id"] == f"{('short', 'long')[pick['index']]}{i}" for i, pick in enumerate(record["picks"]))
    assert main(["select", str(folder / "exact"), str(folder / "prefs.jsonl"), "-o", str(tmp_path / "p.jsonl")]) == 0
    assert "group start 0: " in capsys.readouterr().out
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("run", ["run", "exact"])
def test_report_writes_a_page(run, folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["report", folder / run, folder / "held.parquet", "-o", page, "--train", folder / "shown.parquet"]
    record = told(arguments, capsys)
    names = [section["name"] for section in record["sections"]]
    assert names == ["data", "model", "engine", "actions", "rewards", "uncertainty"]
    assert "12 trajectories" in page.read_text()


def test_what_cannot_be_done_is_said_in_one_line(folder, tmp_path, capsys):
    run, prefs, shown_file = folder / "run", folder / "prefs.jsonl", folder / "shown.parquet"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"states": [0, 1], "actions": [0]}))
    new = ["-o", tmp_path / "new"]
    for arguments, message in (
        (["fit", "avril", "avril", pairs, *new], "hold no trajectories"),
        (["fit", "avril", "avril", bad, *new], "bad.jsonl, row 0: `states` has 2 entries and `actions` 1"),
        (["fit", "avril", "avril", shown_file, *new], "give its `num_states`"),
        (["fit", "avril", "nuts", shown_file, *new, *FLAGS], "NUTS needs the dynamics"),
        (["fit", "avril", "laplace_full", shown_file, *new, *FLAGS], "an InverseRL; use AVRIL()"),
        (["fit", "avril", "avril", shown_file, *new, "--data.kind", "choice"], "--data.kind cannot be used"),
        (["fit", "bradley_terry", "map", prefs, *new], "fit no format"),
        (["predict", run, pairs], "hold no trajectories"),
        (["select", run, pairs], "hold no trajectories"),
        (["report", run, prefs, "-o", tmp_path / "r.html", "--ood", prefs], "`ood` is for comparisons"),
        (["report", run, pairs, "-o", tmp_path / "r.html"], "hold no trajectories"),
    ):
        wrong_call = "cannot be used" in message or "`ood`" in message
        assert message in error(arguments, capsys, code=2 if wrong_call else 1)
    assert not (tmp_path / "new").exists()


def test_bad_rows_may_be_skipped(folder, tmp_path, capsys):
    rows = (folder / "prefs.jsonl").read_text() + "\n" + json.dumps({"states": [0], "actions": [], "group": "g"})
    (tmp_path / "some.jsonl").write_text(rows)
    record = told(["select", folder / "run", tmp_path / "some.jsonl", "--on-bad-row", "skip"], capsys)
    assert [entry["row"] for entry in record["refused"]] == [12]
    assert len(record["picks"]) == 6

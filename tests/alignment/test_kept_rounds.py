"""Files of rounds: they go when no resuming needs them, and a run cut anywhere reaches the same weights."""

import json
import shutil

import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.alignment import Budget, _align, _rounds, align
from bayesrm.alignment._propose import Proposer
from bayesrm.alignment._round import Round
from bayesrm.engines._processes import Processes
from bayesrm.engines._run_folder import RunFolder
from bayesrm.errors import ArgumentError, PersistenceError

from . import policies
from .align_script import METHODS, count_reward
from .test_align import Interrupt, InterruptedRunError

PROMPTS = [f"w{i} w{i + 1}" for i in range(6)]
#: Steps of a round of 2 passes over 6 prompts in threes, and rounds.
STEPS, ROUNDS = 4, 4


def run(place=None, *, method="brain", callbacks=(), keep=0, budget=None, **settings):
    policy = policies.policy("gpt2")
    training = {"epochs": 2.0, "batch_size": 3, "learning_rate": 5e-3, "save_steps": 3} | settings
    report = align(
        policy, count_reward, PROMPTS, method=METHODS[method], rounds=ROUNDS, seed=3, keep_rounds=keep, budget=budget,
        training=brm.Training(**training, callbacks=callbacks, output_dir=None if place is None else str(place)),
    )  # fmt: skip
    return torch.cat([p.detach().reshape(-1) for p in policy.trainable.values()]), report


def numbers(place):
    return sorted(int(file.stem[-5:]) for file in place.glob("round-*.safetensors"))


def steps(place):
    return sorted(int(folder.name.rpartition("-")[2]) for folder in place.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole():
    return {name: run(method=name) for name in ("brain", "moving")}


class Watch(transformers.TrainerCallback):
    """What is on disk after each step."""

    def __init__(self, place):
        self.place, self.seen = place, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append((state.global_step, numbers(self.place), steps(self.place)))


def test_the_folder_holds_what_its_checkpoints_need_and_no_more(tmp_path, whole):
    watch = Watch(tmp_path)
    theta, report = run(tmp_path, callbacks=(watch,))
    assert torch.equal(theta, whole["brain"][0])
    assert report.rounds == whole["brain"][1].rounds
    for step, rounds, checkpoints in watch.seen:
        now = step // STEPS
        oldest = checkpoints[0] // STEPS if checkpoints else 0
        assert rounds == list(range(oldest, now + 1)), step
    # Two checkpoints are kept, 3 steps apart, so that never more than three rounds are.
    assert max(len(rounds) for _, rounds, _ in watch.seen) <= 3
    assert numbers(tmp_path) == []
    assert len(json.loads((tmp_path / "rounds.json").read_text())["rounds"]) == ROUNDS


@pytest.mark.parametrize(("keep", "left"), [(0, []), (1, [4]), (3, [2, 3, 4]), (None, [0, 1, 2, 3, 4])])
def test_the_last_rounds_stay_when_asked_for(keep, left, tmp_path):
    run(tmp_path, keep=keep)
    assert numbers(tmp_path) == left
    for number in left:
        assert Round.load(tmp_path / f"round-{number:05d}.safetensors").counts == [6] * 6
    # The setting is no part of what the run is, and reading a finished run removes nothing.
    _, again = run(tmp_path, keep=0)
    assert again.resumed_from == str(tmp_path)
    assert numbers(tmp_path) == left


@pytest.mark.parametrize(("keep", "left"), [(3, [9, 10, 11]), (5, [7, 8, 9, 10, 11]), (20, list(range(12)))])
def test_pruning_on_the_way_keeps_the_last_rounds(keep, left, tmp_path):
    folder = RunFolder(tmp_path, Processes(), True)
    for number in range(12):
        (tmp_path / f"round-{number:05d}.safetensors").touch()
        # As on the way: the round at hand is needed.
        _rounds.prune_rounds(folder, keep, before=number)
    assert numbers(tmp_path) == left


@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        ("brain", (STEPS, STEPS + 1)),
        ("moving", (4, 9, 15)),
        pytest.param("brain", range(1, STEPS * ROUNDS), marks=pytest.mark.slow, id="brain-every-step"),
    ],
)
def test_a_run_cut_after_any_step_reaches_the_same_weights(method, cuts, tmp_path, whole):
    for cut in cuts:
        place = tmp_path / str(cut)
        with pytest.raises(InterruptedRunError):
            run(place, method=method, callbacks=(Interrupt(cut),))
        theta, report = run(place, method=method)
        assert torch.equal(theta, whole[method][0]), cut
        assert report.rounds == whole[method][1].rounds, cut
        assert report.final == whole[method][1].final, cut
        assert numbers(place) == [], cut


@pytest.mark.parametrize("stage", [
    "while a round is drawn", "after its file is written", "before the last round is drawn",
    "before the end is written", "after the end is written",
])  # fmt: skip
def test_a_run_cut_between_the_steps_reaches_the_same_weights(stage, tmp_path, whole, monkeypatch):
    calls, propose = [], Proposer.propose
    number = {"while a round is drawn": 3, "before the last round is drawn": ROUNDS + 1}.get(stage)

    def cut(*args, **kwargs):
        raise InterruptedRunError

    def proposing(*args):
        calls.append(1)
        return cut() if len(calls) == number else propose(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Proposer, "propose", proposing)
        if stage == "after its file is written":
            patch.setattr(_rounds.Rounds, "_write_reports", cut)
        elif stage == "before the end is written":
            patch.setattr(_align, "finish", cut)
        elif stage == "after the end is written":
            patch.setattr(_rounds, "prune_rounds", lambda *_, before=None: cut() if before is None else None)
        with pytest.raises(InterruptedRunError):
            run(tmp_path)
    theta, report = run(tmp_path)
    assert torch.equal(theta, whole["brain"][0])
    assert report.rounds == whole["brain"][1].rounds
    assert report.final == whole["brain"][1].final
    # A run that has ended is read, not tidied.
    assert numbers(tmp_path) == (list(range(ROUNDS + 1)) if stage == "after the end is written" else [])


def test_a_run_goes_on_from_every_checkpoint_that_is_kept(tmp_path, whole):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, callbacks=(Interrupt(14),))
    assert steps(tmp_path) == [9, 12]
    shutil.rmtree(tmp_path / "checkpoint-12")
    theta, report = run(tmp_path)
    assert report.resumed_from.endswith("checkpoint-9")
    assert torch.equal(theta, whole["brain"][0])


def test_a_round_that_has_begun_is_not_drawn_again(tmp_path):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, callbacks=(Interrupt(10),))
    (tmp_path / "round-00002.safetensors").unlink()
    with pytest.raises(PersistenceError, match=r"round-00002\.safetensors is missing: the checkpoint stopped"):
        run(tmp_path)
    (tmp_path / "rounds.json").write_text('{"rounds": []}')
    with pytest.raises(PersistenceError, match=r"rounds\.json tells of 0 rounds, the checkpoint of 2"):
        run(tmp_path)


def test_a_run_that_a_budget_stops_leaves_nothing_behind(tmp_path):
    theta, report = run(tmp_path, budget=Budget(max_kl=0.02), learning_rate=1e-2)
    assert report.stopped is not None
    assert numbers(tmp_path) == []
    again, found = run(tmp_path, budget=Budget(max_kl=0.02), learning_rate=1e-2)
    assert torch.equal(theta, again)
    assert found.rounds == report.rounds


def test_the_number_is_checked():
    with pytest.raises(ArgumentError, match="`keep_rounds` must be an integer of at least 0, got -1"):
        run(keep=-1)

"""Fits on adapter weights that die and go on, and fits on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayesrm as brm
from bayesrm.engines import _derivatives
from bayesrm.engines._work import plan_work
from bayesrm.errors import PersistenceError
from bayesrm.rewards import LoRA

from ..rewards import lora_models as models

PROMPTS, CANDIDATES = ["w1 w2", "w3"], [["w3 w4 w5", "w30 w31", "w10 w20"], ["w1", "w39 w2"]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 8 items; the list of the blocks computed, and a switch that makes the next ones fail."""
    monkeypatch.setattr(_derivatives, "BLOCK", 8)
    compute = _derivatives.Derivatives._compute
    calls, limit = [], [10_000]

    def counted(self, items):
        if len(calls) >= limit[0]:
            raise KeyboardInterrupt
        calls.append(list(items))
        return compute(self, items)

    monkeypatch.setattr(_derivatives.Derivatives, "_compute", counted)
    return calls, limit


def fit(path, folder, *, seed=0, **settings):
    model = brm.RewardModel(
        LoRA(path, rank=2, dtype="float64"), brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(4.0)
    )
    training = brm.Training(epochs=2.0, learning_rate=3e-3, batch_size=8, output_dir=str(folder))
    engine = brm.Laplace(training=training, **settings)
    return brm.fit(model, models.pairs(24), inference=engine, seed=seed)


#: 48 items make 6 blocks; the sketch passes over them twice, and its check differentiates some once more.
CASES = {
    "full": ({"structure": "full"}, 6, 4),
    "sketch, first pass": ({"structure": "sketch", "sketch_rank": 2}, 13, 4),
    "sketch, second pass": ({"structure": "sketch", "sketch_rank": 2}, 13, 9),
}


def too_little_to_keep_derivatives(path, itemsize):
    shapes = {site: tuple(p.shape) for site, p in LoRA(path, rank=2).load().sites.items()}
    sizes = {"items": 48, "contrasts": 24, "sketch_rank": 2, "itemsize": itemsize, "disk_gib": 1.0}
    least = plan_work("sketch", shapes, memory_gib=0.0, **sizes).memory_gib * 1.001
    assert plan_work("sketch", shapes, memory_gib=least, **sizes).derivatives == "nowhere"
    return least


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_fit_that_died_goes_on_at_its_last_block(path, case, blocks, tmp_path):
    settings, whole, until = CASES[case]
    if case != "full":
        settings = settings | {"memory_gib": too_little_to_keep_derivatives(path, 8)}
    calls, limit = blocks
    reference = fit(path, tmp_path / "reference", **settings)
    assert len(calls) == whole
    calls.clear()
    limit[0] = until
    with pytest.raises(KeyboardInterrupt):
        fit(path, tmp_path / "run", **settings)
    assert len(calls) == until
    calls.clear()
    limit[0] = 10_000
    resumed = fit(path, tmp_path / "run", **settings)
    assert resumed.report.training["resumed_from"] == str(tmp_path / "run")
    # What was saved last may lie a block or two back in a pass that keeps sums: saving is rationed by its cost.
    assert whole - until <= len(calls) <= whole - until + (0 if case == "full" else 3)
    a, b = (p.predict(PROMPTS, CANDIDATES) for p in (resumed, reference))
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=0, atol=1e-10)


def test_a_second_fit_reads_the_derivatives_and_other_weights_do_not(path, blocks, tmp_path):
    calls, _ = blocks
    fit(path, tmp_path, structure="full")
    calls.clear()
    fit(path, tmp_path, structure="full", prior_precision="marginal_likelihood")
    assert not calls
    with pytest.raises(PersistenceError):
        fit(path, tmp_path, structure="full", seed=1)


def test_sums_of_other_settings_are_not_used(path, blocks, tmp_path):
    """A pass that died with one rank of the sketch starts again with another."""
    calls, limit = blocks
    memory = too_little_to_keep_derivatives(path, 8)
    limit[0] = 4
    with pytest.raises(KeyboardInterrupt):
        fit(path, tmp_path, structure="sketch", sketch_rank=2, memory_gib=memory)
    calls.clear()
    limit[0] = 10_000
    fit(path, tmp_path, structure="sketch", sketch_rank=1, memory_gib=memory)
    assert len(calls) == 13
    assert not list(tmp_path.glob("directions.*"))


def test_damaged_sums_are_named(path, blocks, tmp_path):
    calls, limit = blocks
    settings = {"structure": "sketch", "sketch_rank": 2, "memory_gib": too_little_to_keep_derivatives(path, 8)}
    limit[0] = 3
    with pytest.raises(KeyboardInterrupt):
        fit(path, tmp_path, **settings)
    [file] = tmp_path.glob("directions.*.safetensors")
    file.write_bytes(b"nonsense")
    limit[0] = 10_000
    with pytest.raises(PersistenceError, match=r"directions\.0\.safetensors"):
        fit(path, tmp_path, **settings)
    assert calls


SCRIPT = Path(__file__).with_name("fit_on_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "sketch"])
def test_two_processes_give_the_answer_of_one(path, structure, tmp_path):
    settings = {"structure": structure}
    if structure == "sketch":
        settings |= {"sketch_rank": 2, "memory_gib": too_little_to_keep_derivatives(path, 4)}
    answers = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        launch = (
            [sys.executable] if count == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        )
        launch += [] if count == 1 else ["--master-port=0", "--standalone"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        arguments = [str(SCRIPT), path, str(out), json.dumps(settings), str(3 - count)]
        done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append({name: torch.tensor(value) for name, value in json.loads(out.read_text()).items()})
    one, two = answers
    torch.testing.assert_close(two["mean"], one["mean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["covariance"], one["covariance"], rtol=1e-5, atol=1e-5)
    # Each process computed its share alone.
    assert two["blocks"] <= (one["blocks"] + 3) // 2 + 1

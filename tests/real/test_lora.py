"""The benchmarks of Laplace on LoRA as smoke runs, and the parts of them that could be wrong unseen."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesrm as brm

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def heldout(benchmark_module, minilm):
    return benchmark_module("laplace_lora_heldout")


@pytest.fixture
def study(heldout, real_file):
    folder = real_file("hh_harmless_pairs.parquet").parent
    return heldout.load(folder, num_test=40, num_validation=20, num_unfamiliar=12, seed=0)


def test_parts_share_no_prompt_and_leave_nothing_out(study):
    parts = (study.pool, study.validation, study.test)
    prompts = [{str(part.text(item)[0]) for item in range(part.num_items)} for part in parts]
    assert [len(p) for p in prompts[1:]] == [20, 40]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert sum(map(len, parts)) == 2003


def test_shuffled_replies_keep_their_words(heldout, study):
    for (prompt, ours), (other, theirs) in zip(
        heldout.pairs_of(study.test), study.unfamiliar["words of the replies shuffled"], strict=False
    ):
        assert prompt == other
        for a, b in zip(ours, theirs, strict=True):
            assert sorted(a[0]["content"].split()) == sorted(b[0]["content"].split())


def test_the_factor_of_the_temperature_has_the_least_loss(heldout):
    rng = np.random.default_rng(0)
    difference = rng.normal(0.5, 2.0, size=200)
    grid = np.linspace(0.0, 3.0, 3001)
    losses = np.logaddexp(0.0, -grid[:, None] * difference).mean(1)
    assert heldout.fit_scale(difference) == pytest.approx(grid[losses.argmin()], abs=1e-3)
    # Rewards that are wrong more often than right are best ignored.
    assert heldout.fit_scale(-difference) == pytest.approx(0.0, abs=1e-3)


def test_gains_are_differences_of_losses_to_the_best_without_a_posterior(heldout, study):
    rng = np.random.default_rng(0)
    names = ("trained", "temperature", "full, plug-in", "full")
    chance = {name: rng.uniform(0.2, 0.9, size=len(study.test)) for name in names}
    found = heldout.collect(chance, study.test, ("full",))
    losses = {name: -np.log(p).mean() for name, p in chance.items()}
    best = min(names[:3], key=losses.__getitem__)
    assert found["gains"]["full"]["best"] == best
    assert found["gains"]["full"][best]["value"] == pytest.approx(losses[best] - losses["full"])
    assert found["scores"]["full"]["nll"]["value"] == pytest.approx(losses["full"])
    assert all(found["best_scale"][name] <= min(losses[name], np.log(2)) + 1e-9 for name in names)


def test_shared_derivatives_change_no_prediction(heldout, study):
    data = study.pool.select(np.arange(6))
    inference = brm.Laplace(structure="full", training=brm.Training(epochs=0.0))
    posterior = brm.fit(heldout.program(), data, inference=inference)
    prompts, candidates = zip(*heldout.pairs_of(study.test)[:3], strict=True)
    before = posterior.predict(prompts, candidates)
    store = {}
    heldout.share_derivatives(posterior, store)
    first, second = (posterior.predict(prompts, candidates) for _ in range(2))
    assert len(store) == 6
    # The same sums in batches of another make-up: float32.
    torch.testing.assert_close(first.covariance, before.covariance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second.covariance, first.covariance, rtol=0, atol=0)


def test_heldout_study_runs_and_goes_on_from_its_cache(heldout, real_file, tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    arguments = ["--quick", "--cache", str(tmp_path / "cache"), "--json", str(file)]
    assert heldout.command(arguments) == 0
    first = json.loads(file.read_text())
    assert [size["num_pairs"] for size in first["sizes"]] == [16, 24]
    assert set(first["sizes"][0]["gains"]) == set(heldout.POSTERIORS)
    assert all(0 <= e["value"] <= 1 for a in first["sizes"][0]["auroc"].values() for e in a.values())

    def refuse(*arguments, **settings):
        raise AssertionError("a finished size was fitted again")

    monkeypatch.setattr(brm, "fit", refuse)
    assert heldout.command(arguments) == 0
    assert json.loads(file.read_text())["claims"] == first["claims"]


def test_laplace_lora_runs(real_file, minilm, tmp_path):
    real_file("hh_harmless_pairs.parquet")
    pytest.importorskip("trl", reason="training is compared with TRL's, which is not installed")
    file = tmp_path / "out.json"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "laplace_lora.py"), "--quick", "--json", str(file)]
    subprocess.run(command, check=True)
    found = json.loads(file.read_text())
    bounded = [c["name"] for c in found["claims"] if c["minimum"] is not None or c["maximum"] is not None]
    # One for fitting, five for predicting, four for the sketch, one for training.
    assert len(bounded) == 11
    assert all(np.isfinite(c["estimate"]["value"]) for c in found["claims"])
    # Conditioning on data only takes variance away.
    probes = found["probes"]
    for structure in ("full", "sketch"):
        assert (np.array(probes[structure]["differences"]) <= np.array(probes["prior"]["differences"]) * 1.001).all()

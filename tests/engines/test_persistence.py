"""A saved posterior predicts the same in a fresh process; a damaged one is refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.backend import dist, ops, sample

from .conftest import CASES, make_data

L = brm.likelihoods


def fit(likelihood, design, head=None, **settings):
    model = brm.RewardModel(head or brm.rewards.Linear(), likelihood)
    data = model.simulate(make_data(**design), seed=3).data
    return brm.fit(model, data, inference=brm.Laplace(**settings)), data


def same(a, b):
    # The numbers on disk are the same; matrix products may round differently when operands lie elsewhere in memory.
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", list(CASES))
def test_round_trip(tmp_path, name):
    posterior, data = fit(*CASES[name])
    posterior.save_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run")
    assert again.program == posterior.program
    new = [np.random.default_rng(0).normal(size=(3, 4))]
    same(again.predict(candidates=new).covariance, posterior.predict(candidates=new).covariance)
    same(again.predict_feedback(data).log_prob, posterior.predict_feedback(data).log_prob)
    assert again.summary() == posterior.summary()


@pytest.mark.parametrize("settings", [{"structure": "diag"}, {"coordinates": "dual"}])
def test_structures_and_heads(tmp_path, settings):
    head = brm.rewards.MLP(hidden=(3,), standardize=True)
    posterior, data = fit(L.Davidson(), {"rows": 20}, head, max_iterations=5000, gradient_tolerance=1e-4, **settings)
    posterior.save_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run")
    same(again.predict_feedback(data).log_prob, posterior.predict_feedback(data).log_prob)


def test_a_fresh_process_predicts_the_same(tmp_path):
    posterior, _ = fit(*CASES["rater_reliability"])
    posterior.save_pretrained(tmp_path / "run")
    code = (
        "import sys, json, numpy as np, bayesrm as brm\n"
        "p = brm.Posterior.from_pretrained(sys.argv[1])\n"
        "b = p.predict(candidates=[np.arange(12.0).reshape(3, 4)])\n"
        "print(json.dumps([b.mean.tolist(), b.covariance.tolist()]))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    mean, covariance = json.loads(found.stdout)
    belief = posterior.predict(candidates=[np.arange(12.0).reshape(3, 4)])
    np.testing.assert_allclose(mean, belief.mean, rtol=1e-12)
    np.testing.assert_allclose(covariance, belief.covariance, rtol=1e-10)


def constant_ties(rewards, comparison):
    share = sample("tie_share", dist.Beta(1.0, 4.0))
    d = rewards[:, 0] - rewards[:, 1]
    decided = ops.log1p(-share)
    return dist.Categorical(
        logits=ops.stack(
            [decided + ops.log_sigmoid(d), decided + ops.log_sigmoid(-d), ops.log(share) + 0.0 * d], axis=-1
        )
    )


def test_an_unregistered_likelihood_is_passed_back_in(tmp_path):
    posterior, data = fit(constant_ties, {})
    posterior.save_pretrained(tmp_path / "run")
    with pytest.raises(brm.errors.LikelihoodError, match="unregistered"):
        brm.Posterior.from_pretrained(tmp_path / "run")
    again = brm.Posterior.from_pretrained(tmp_path / "run", likelihood=constant_ties)
    same(again.predict_feedback(data).log_prob, posterior.predict_feedback(data).log_prob)

    def other(rewards, comparison):
        return constant_ties(2.0 * rewards, comparison)

    with pytest.warns(brm.errors.LikelihoodChangedWarning):
        brm.Posterior.from_pretrained(tmp_path / "run", likelihood=other)


def test_a_changed_source_is_noticed(tmp_path):
    posterior, _ = fit(*CASES["davidson"])
    posterior.save_pretrained(tmp_path / "run")
    _edit(tmp_path / "run", lambda s: s["program"]["likelihood"].update(source="0" * 16))
    with pytest.warns(brm.errors.LikelihoodChangedWarning, match="davidson"):
        brm.Posterior.from_pretrained(tmp_path / "run")


def _edit(run, change):
    import hashlib

    settings = json.loads((run / "posterior.json").read_text())
    change(settings)
    (run / "posterior.json").write_text(json.dumps(settings))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["sha256"]["posterior.json"] = hashlib.sha256((run / "posterior.json").read_bytes()).hexdigest()
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["manifest.json", "posterior.json", "posterior.safetensors"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    posterior, _ = fit(*CASES["bradley_terry"])
    posterior.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(brm.errors.PersistenceError, match=name):
        brm.Posterior.from_pretrained(tmp_path / "run")
    file.unlink()
    with pytest.raises(brm.errors.PersistenceError, match=name):
        brm.Posterior.from_pretrained(tmp_path / "run")


def test_another_format_version_is_refused(tmp_path):
    posterior, _ = fit(*CASES["bradley_terry"])
    posterior.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "manifest.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(brm.errors.PersistenceError, match="version 99"):
        brm.Posterior.from_pretrained(tmp_path / "run")


def test_saving_replaces_a_run_but_nothing_else(tmp_path):
    posterior, _ = fit(*CASES["bradley_terry"])
    posterior.save_pretrained(tmp_path / "run")
    posterior.save_pretrained(tmp_path / "run")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(brm.errors.PersistenceError, match="not a saved posterior"):
        posterior.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_nothing_half_written_when_writing_fails(tmp_path, monkeypatch):
    import safetensors.torch

    posterior, _ = fit(*CASES["bradley_terry"])

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(brm.errors.PersistenceError, match="no space left"):
        posterior.save_pretrained(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []

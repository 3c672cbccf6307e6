"""Training against the trace of the same program, full-batch gradients, and runs on other processes or cut in two."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pyro import poutine

import bayesrm as brm
from bayesrm.engines._batches import MicroBatches
from bayesrm.engines._density import FeedbackDensity
from bayesrm.engines._trainer import JointLoss
from bayesrm.engines.training import Training, train
from bayesrm.errors import ArgumentError, EngineError, PersistenceError
from bayesrm.rewards import LoRA

from ..rewards import lora_models as models

L = brm.likelihoods
SCRIPT = Path(__file__).with_name("training_script.py")
#: One plain gradient step of known length: the weights move by the gradient of the loss.
ONE_STEP = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "arguments": {"optim": "sgd"}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.bert(tmp_path_factory.mktemp("bert"))


def responses(rng, k, longest=12):
    return [" ".join(rng.choice(models.WORDS, size=rng.integers(1, longest))) + f" w{i}" for i in range(k)]


def pairs(rows, seed=0, longest=12, **columns):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"w{i % 40} w{i // 40}", "responses": responses(rng, 2, longest)}
        | {"choice": "tie" if i % 4 == 3 else int(rng.integers(2))}
        | {name: values[i] for name, values in columns.items()}
        for i in range(rows)
    ]


def rankings(rows, k=3, seed=1):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"w{i % 40}", "responses": responses(rng, k), "ranking": rng.permutation(k).tolist()}
        for i in range(rows)
    ]


def ratings(rows, seed=2):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"w{i % 40}", "response": r, "rating": int(rng.integers(1, 5))}
        for i, r in enumerate(responses(rng, rows))
    ]


def load(*tables):
    return brm.Comparisons.concatenate([brm.Comparisons.load(table) for table in tables])


RATERS = [f"rater {i % 3}" for i in range(19)]
DESIGNS = {
    "ties": (lambda: load(pairs(19, weight=[0.0, 2.0, *[1.0] * 17])), L.Davidson()),
    "raters": (lambda: load(pairs(19, annotator=RATERS)), L.RaterReliability(L.LengthBias(L.Davidson()))),
    "rankings": (lambda: load(rankings(11), rankings(6, k=4)), L.PlackettLuce()),
    "ratings": (lambda: load(ratings(13)), L.Ordinal()),
    "mixed": (
        lambda: load(pairs(13), ratings(10), rankings(5)),
        {"choice": L.Davidson(), "rating": L.Ordinal(), "ranking": L.PlackettLuce()},
    ),
}


def setup(path, data, likelihood=L.BradleyTerry(), *, dtype="float32", precision=1.0, **lora):  # noqa: B008
    model = brm.RewardModel(
        LoRA(path, rank=2, dtype=dtype, device="cpu", **lora), likelihood, brm.priors.Gaussian(precision)
    )
    return model, model.reward.load(0), FeedbackDensity(model, data.groups())


def run(path, data, likelihood=L.BradleyTerry(), *, seed=1, dropout=0.0, **settings):  # noqa: B008
    model, network, density = setup(path, data, likelihood, dropout=dropout)
    report = train(network, model, data, density, Training(**settings), seed=seed, progress=False)
    return network, report


def partition(network, data, density, *, batch_size=4, step_size=3, group_by_length=True, seed=0):
    sequences = network.tokenize_items(data)
    return MicroBatches(
        network, density, sequences, batch_size=batch_size, step_size=step_size, group_by_length=group_by_length,
        seed=seed,
    )  # fmt: skip


def moved(path, data, likelihood, precision=2.0):
    """A program with its network and latents away from their starting points, in float64."""
    model, network, density = setup(path, data, likelihood, dtype="float64", precision=precision)
    generator = torch.Generator().manual_seed(5)
    theta = network.theta()
    network.set_theta(theta + 0.3 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype))
    latents = density.initial_latents + 0.3 * torch.randn(density.num_latents, generator=generator, dtype=torch.float64)
    return model, network, density, latents


def traced_log_joint(model, network, data, density, latents):
    """The log joint of the program's own Pyro trace, with the Jacobian to unconstrained latents."""
    values = {f"reward.{site}": p.detach() for site, p in network.sites.items()} | density.constrain(latents)
    live = poutine.condition(dataclasses.replace(model, reward=network), data=values)
    batch = network.collate(network.tokenize_items(data))
    total = poutine.trace(live).get_trace(batch, data.groups()).log_prob_sum()
    for s in density.sites:
        u = latents[s.start : s.stop].reshape(s.unconstrained_shape)
        total = total + s.transform.log_abs_det_jacobian(u, s.transform(u)).sum()
    return float(total)


def declared_loss(model, network, density, data, latents):
    """-(log joint)/N of all rows, from the loss of every batch."""
    batches = partition(network, data, density)
    loss = JointLoss(network, model, density, num_rows=len(data), num_batches=len(batches))
    if density.num_latents:
        loss.latents.data.copy_(latents)
    with torch.no_grad():
        return float(torch.stack([loss(**batches[i]) for i in range(len(batches))]).mean())


@pytest.mark.parametrize("design", DESIGNS)
def test_loss_over_a_partition_is_the_negative_log_joint_of_the_trace(path, design):
    make, likelihood = DESIGNS[design]
    data = make()
    model, network, density, latents = moved(path, data, likelihood)
    average = declared_loss(model, network, density, data, latents)
    expected = traced_log_joint(model, network, data, density, latents)
    assert -len(data) * average == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("design", ["ties", "mixed"])
@pytest.mark.parametrize("accumulation", ["whole epoch", "short last window"])
def test_accumulated_step_is_the_full_batch_gradient(path, design, accumulation):
    make, likelihood = DESIGNS[design]
    data = make()
    model, network, density = setup(path, data, likelihood, dtype="float64")
    start = network.theta()
    count = len(partition(network, data, density, step_size=1))
    # More micro-batches a step than fill whole batches: they are split until they fit.
    steps = count if accumulation == "whole epoch" else count + 2
    rate = 1e-3
    report = train(
        network, model, data, density,
        Training(
            epochs=1.0, batch_size=4, gradient_accumulation_steps=steps, learning_rate=rate, latent_learning_rate=rate,
            **ONE_STEP,
        ),
        seed=0, progress=False,
    )  # fmt: skip
    assert report.steps == report.planned_steps == 1
    found = torch.cat([start - network.theta(), density.initial_latents - report.latents]) * len(data) / rate

    network.set_theta(start)
    latents = density.initial_latents.requires_grad_(True)
    weights = list(network.sites.values())
    rewards = network(**network.collate(network.tokenize_items(data)))
    joint = density.log_joint(density.gather(rewards), latents)
    for site, p in network.sites.items():
        joint = joint - 0.5 * model.prior.of(site) * (p - network.initial[site]).square().sum()
    gradient = torch.autograd.grad(-joint, [*weights, latents])
    expected = torch.cat([g.reshape(-1) for g in gradient])
    # The difference of weights before and after a step of 1e-3 loses three digits.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_row_is_in_one_batch_of_an_epoch(path, group_by_length):
    data = load(pairs(19, weight=[0.0, *[1.0] * 18]), rankings(7), ratings(10))
    likelihood = {"choice": L.Davidson(), "rating": L.Ordinal(), "ranking": L.PlackettLuce()}
    _, network, density = setup(path, data, likelihood)
    batches = partition(network, data, density, step_size=6, group_by_length=group_by_length)
    assert len(batches) % 6 == 0
    orders = []
    for epoch in (0, 1, 2):
        batches.set_epoch(epoch)
        rows = [batches[i]["feedback"].groups[0].rows.tolist() for i in range(len(batches))]
        assert sorted(itertools.chain(*rows)) == list(range(1, len(data)))
        assert all(1 <= len(r) <= 4 for r in rows)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    again = partition(network, data, density, step_size=6, group_by_length=group_by_length)
    again.set_epoch(2)
    assert [again[i]["feedback"].groups[0].rows.tolist() for i in range(len(again))] == orders[2]


def test_a_batch_reads_each_distinct_item_once(path):
    rng = np.random.default_rng(0)
    texts = responses(rng, 5)
    rows = [{"prompt": "w1", "responses": [texts[i], texts[j]], "choice": 0} for i in range(5) for j in range(i)]
    data = brm.Comparisons.load(rows)
    _, network, density = setup(path, data)
    batches = partition(network, data, density, batch_size=16, step_size=1)
    assert len(batches) == 1
    assert batches[0]["sequences"]["input_ids"].shape[0] == 5
    places = batches[0]["places"]
    assert places.shape == (10, 2)
    sequences = network.tokenize_items(data)
    ids = batches[0]["sequences"]["input_ids"]
    for row, items in zip(places, density.groups[0].items[batches.plan[0][1]], strict=True):
        for place, item in zip(row, items, strict=True):
            np.testing.assert_array_equal(ids[place][: len(sequences[item])], sequences[item])


def test_grouping_by_length_saves_padding(path):
    data = load(pairs(240, longest=40))
    _, network, density = setup(path, data, L.Davidson())

    def padded(group_by_length):
        batches = partition(network, data, density, group_by_length=group_by_length, batch_size=8)
        masks = [batches[i]["sequences"]["attention_mask"] for i in range(len(batches))]
        return sum(m.numel() for m in masks) / sum(int(m.sum()) for m in masks)

    grouped, ungrouped = padded(True), padded(False)
    assert grouped - 1 < 0.7 * (ungrouped - 1)


def test_training_raises_the_log_joint_and_learns_the_tie_latent(path):
    """Three rows in four are ties: the tie latent rises from its prior towards their share."""
    rows = pairs(40)
    for i, row in enumerate(rows):
        row["choice"] = "tie" if i % 4 else 0
    data = load(rows)
    network, report = run(
        path, data, L.Davidson(), epochs=8.0, learning_rate=5e-3, latent_learning_rate=0.1, batch_size=20,
        logging_steps=2,
    )  # fmt: skip
    density = FeedbackDensity(brm.RewardModel(brm.rewards.Linear(), L.Davidson()), data.groups())
    assert report.latents.dtype == torch.float64
    assert not any(module.training for module in network.modules())
    losses = [entry["loss"] for entry in report.log]
    assert losses[-1] < losses[0]
    before, after = (density.constrain(u) for u in (density.initial_latents, report.latents))
    [site] = density.sites
    shares = []
    for value in (before, after):
        with brm.backend.Recorder(value):
            [d] = brm.RewardModel(brm.rewards.Linear(), L.Davidson()).feedback(
                [torch.zeros(1, 2, dtype=torch.float64)],
                [dataclasses.replace(density.groups[0].comparison, num_rows=1, lengths=None)],
            )
        shares.append(float(d.log_prob(torch.tensor([2])).exp()))
    assert shares[1] > shares[0] + 0.1, site.name


@pytest.mark.parametrize("design", ["raters", "rankings", "ratings", "mixed"])
def test_every_kind_of_feedback_trains(path, design):
    make, likelihood = DESIGNS[design]
    data = make()
    model, network, density = setup(path, data, likelihood)
    before = declared_loss(model, network, density, data, density.initial_latents)
    training = Training(epochs=3.0, batch_size=8, learning_rate=2e-3, latent_learning_rate=0.05)
    report = train(network, model, data, density, training, seed=1, progress=False)
    assert declared_loss(model, network, density, data, report.latents) < before
    assert not torch.equal(network.theta(), network.initial_theta())


class At(transformers.TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


class Cut(Exception):  # noqa: N818
    pass


def cut(control):
    raise Cut


def stop(control):
    control.should_training_stop = True


def test_early_stop_is_reported(path):
    _, report = run(path, load(pairs(16)), L.Davidson(), epochs=3.0, batch_size=4, callbacks=(At(5, stop),))
    assert (report.steps, report.planned_steps, report.stopped_early) == (5, 12, True)
    assert report.summary()["stopped_early"]
    json.dumps(report.summary())


@pytest.mark.parametrize(("at", "save_steps"), [(5, 2), (8, 4)], ids=["inside", "boundary"])
def test_a_cut_run_goes_on_to_the_same_weights(path, tmp_path, at, save_steps):
    """With dropout and accumulation; cut inside an epoch, and at its end."""
    data = load(pairs(30))
    settings = {
        "epochs": 3.0, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "dropout": 0.3,
        "save_steps": save_steps, "save_total_limit": 1,
    }  # fmt: skip
    whole, expected = run(path, data, L.Davidson(), output_dir=str(tmp_path / "whole"), **settings)
    folder = str(tmp_path / "cut")
    with pytest.raises(Cut):
        run(path, data, L.Davidson(), output_dir=folder, callbacks=(At(at, cut),), **settings)
    again, report = run(path, data, L.Davidson(), output_dir=folder, **settings)
    step = (at - 1) // save_steps * save_steps
    assert report.resumed_from == (str(Path(folder) / f"checkpoint-{step}") if step else None)
    assert torch.equal(again.theta(), whole.theta())
    assert torch.equal(report.latents, expected.latents)
    assert report.steps == expected.steps == 12


def test_a_finished_run_is_loaded(path, tmp_path):
    data = load(pairs(12))
    settings = {"epochs": 2.0, "batch_size": 4, "logging_steps": 1, "output_dir": str(tmp_path / "run")}
    first, report = run(path, data, L.Davidson(), **settings)
    second, loaded = run(path, data, L.Davidson(), callbacks=(At(1, cut),), **settings)
    assert torch.equal(first.theta(), second.theta())
    assert torch.equal(report.latents, loaded.latents)
    assert loaded.resumed_from == settings["output_dir"]
    ours = dataclasses.replace(loaded, latents=report.latents, resumed_from=None)
    assert ours == report

    # Killed between the last checkpoint and the end.
    (tmp_path / "run" / "finished.json").unlink()
    third, late = run(path, data, L.Davidson(), **settings)
    assert torch.equal(first.theta(), third.theta())
    assert torch.equal(report.latents, late.latents)
    assert (late.steps, late.stopped_early) == (6, False)


def test_checkpoints_hold_trained_weights_alone(path, tmp_path):
    from safetensors.torch import load_file

    network, _ = run(path, load(pairs(12)), L.Davidson(), epochs=3.0, batch_size=4, output_dir=str(tmp_path))
    folders = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-6", "checkpoint-9"]
    stored = load_file(tmp_path / "checkpoint-9" / "weights.safetensors")
    assert set(stored) == {f"reward.{site}" for site in network.sites} | {"latents"}
    assert not list(tmp_path.rglob("training_args.bin"))


def test_a_checkpoint_written_in_part_is_passed_over(path, tmp_path):
    data = load(pairs(24))
    settings = {"epochs": 2.0, "batch_size": 4, "save_steps": 2, "output_dir": str(tmp_path)}
    whole, _ = run(path, data, L.Davidson(), **(settings | {"output_dir": None}))
    with pytest.raises(Cut):
        run(path, data, L.Davidson(), callbacks=(At(7, cut),), **settings)
    partial = tmp_path / "checkpoint-8"
    partial.mkdir()
    (partial / "trainer_state.json").write_text('{"global_st')
    again, report = run(path, data, L.Davidson(), **settings)
    assert report.resumed_from == str(tmp_path / "checkpoint-6")
    assert torch.equal(again.theta(), whole.theta())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed: 1 there, 2 here"),
        ({"learning_rate": 1e-3}, "training.learning_rate"),
        ({"likelihood": L.RaoKupper()}, "likelihood."),
        ({"data": 13}, "data.feedback"),
    ],
)
def test_a_folder_of_another_run_is_refused(path, tmp_path, change, named):
    def go(data=12, likelihood=L.Davidson(), **settings):  # noqa: B008
        values = {"epochs": 1.0, "batch_size": 4, "output_dir": str(tmp_path)} | settings
        return run(path, load(pairs(data)), likelihood, **values)

    go()
    with pytest.raises(PersistenceError, match=named):
        go(**change)


def test_checkpoints_of_an_unknown_run_are_refused(path, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(PersistenceError, match="not known"):
        run(path, load(pairs(12)), L.Davidson(), output_dir=str(tmp_path))


def test_no_epochs_leave_the_weights(path):
    network, report = run(path, load(pairs(8)), L.Davidson(), epochs=0.0)
    assert torch.equal(network.theta(), network.initial_theta())
    assert (report.steps, report.planned_steps, report.stopped_early) == (0, 0, False)
    assert report.latents.shape == (1,)


def legacy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002 (the state that transformers seeds)


def test_nothing_of_the_process_changes(path, capsys, tmp_path, monkeypatch):
    from accelerate.state import PartialState

    monkeypatch.chdir(tmp_path)
    data = load(pairs(12))
    model, network, density = setup(path, data, L.Davidson(), dropout=0.2)
    training = Training(epochs=1.0, batch_size=4)
    states = torch.get_rng_state(), random.getstate(), legacy_state(), dict(PartialState._shared_state)
    verbosity = transformers.logging.get_verbosity()
    report = train(network, model, data, density, training, seed=1, progress=False)
    torch.testing.assert_close(torch.get_rng_state(), states[0], rtol=0, atol=0)
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(legacy_state(), states[2])
    assert dict(PartialState._shared_state) == states[3]
    assert transformers.logging.get_verbosity() == verbosity
    captured = capsys.readouterr()
    assert "loss" not in captured.out + captured.err
    assert not list(tmp_path.iterdir())
    again, two = run(path, data, L.Davidson(), epochs=1.0, batch_size=4, dropout=0.2)
    assert torch.equal(network.theta(), again.theta())
    assert torch.equal(report.latents, two.latents)
    without, _ = run(path, data, L.Davidson(), epochs=1.0, batch_size=4)
    assert not torch.equal(network.theta(), without.theta())


def test_the_logged_loss_is_the_declared_one(path):
    """At the first step the weights are at their prior mean and all rewards 0."""
    data = load([row | {"choice": 0} for row in pairs(16)])
    network, report = run(path, data, epochs=1.0, batch_size=16, logging_steps=1)
    constant = 0.5 * network.num_parameters * math.log(2 * math.pi) / len(data)
    assert report.log[0]["loss"] == pytest.approx(math.log(2) + constant, rel=1e-6)
    assert report.log[0]["loss_without_constants"] == pytest.approx(math.log(2), rel=1e-6)


def test_divergence_is_an_error(path):
    with pytest.raises(EngineError, match="learning_rate"):
        run(
            path, load(pairs(16)), L.Davidson(), epochs=40.0, batch_size=4, logging_steps=1, learning_rate=1e30,
            arguments={"optim": "sgd"}, max_grad_norm=0.0, schedule="constant",
        )  # fmt: skip


def test_too_few_rows_for_a_step(path):
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps"):
        run(path, load(pairs(4)), L.Davidson(), gradient_accumulation_steps=5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epochs": -1.0}, "`epochs` is -1"),
        ({"epochs": math.inf}, "`epochs`"),
        ({"max_steps": 0}, "`max_steps` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"latent_learning_rate": math.nan}, "`latent_learning_rate`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps`"),
        ({"warmup_ratio": 1.0}, "`warmup_ratio`"),
        ({"schedule": "zigzag"}, "`schedule` is 'zigzag'"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm`"),
        ({"arguments": {"weight_decay": 0.1}}, "weight_decay.*prior"),
        ({"arguments": {"learning_rate": 0.1}}, "learning_rate"),
        ({"arguments": {"remove_unused_columns": True}}, "remove_unused_columns"),
        ({"arguments": {"dataloader_drop_last": True}}, "dataloader_drop_last"),
        ({"arguments": {"adam_beta1": object()}}, "JSON"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(ArgumentError, match=named):
        Training(**settings)


@pytest.mark.parametrize("arguments", [{"no_such_argument": 1}, {"optim": "no_such_optimiser"}])
def test_arguments_that_transformers_refuses(path, arguments):
    with pytest.raises(ArgumentError, match="no_such"):
        run(path, load(pairs(8)), L.Davidson(), arguments=arguments)


def test_settings_are_json():
    config = Training(callbacks=(At(1, stop),), report_to=("tensorboard",), arguments={"optim": "sgd"}).to_config()
    assert json.loads(json.dumps(config)) == config
    assert config["callbacks"] == ["At"]


def script(path, output, settings, *launcher):
    command = [sys.executable, *launcher, str(SCRIPT), path, str(output), json.dumps(settings)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=170)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_two_processes_reach_the_weights_of_one(path, tmp_path, optim):
    settings = {"epochs": 2.0, "batch_size": 4, "learning_rate": 2e-2, "arguments": {"optim": optim}}
    done = script(path, tmp_path / "two.pt", settings, "-m", "torch.distributed.run", "--nproc_per_node=2")
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    done = script(path, tmp_path / "one.pt", settings | {"gradient_accumulation_steps": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["steps"] == one["steps"] == 10
    torch.testing.assert_close(two["theta"], one["theta"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["latents"], one["latents"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(path, tmp_path):
    settings = {"epochs": 3.0, "batch_size": 4, "dropout": 0.3, "save_steps": 4}
    assert script(path, tmp_path / "whole.pt", settings).returncode == 0
    settings["output_dir"] = str(tmp_path / "run")
    assert script(path, tmp_path / "cut.pt", settings | {"kill_at": 14}).returncode == -9
    assert not (tmp_path / "cut.pt").exists()
    assert script(path, tmp_path / "cut.pt", settings).returncode == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "cut"))
    assert resumed["resumed_from"] == str(tmp_path / "run" / "checkpoint-12")
    assert torch.equal(resumed["theta"], whole["theta"])
    assert torch.equal(resumed["latents"], whole["latents"])

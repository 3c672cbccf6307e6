"""Ensembles of adapters against members trained by hand, cut runs, and the priors they are anchored at."""

import dataclasses

import numpy as np
import pytest
import torch

import bayesrm as brm
from bayesrm.engines import Posterior, _lora_ensemble
from bayesrm.engines._lora_ensemble import Member, MovedPrior, fit_members
from bayesrm.engines.training import Training, TrainingReport, train
from bayesrm.errors import ArgumentError, ConvergenceWarning, EngineError
from bayesrm.rewards import LoRA, LoRANetwork

from ..rewards import lora_models as models
from .test_training import At, Cut, cut, declared_loss, load, moved, pairs, partition, setup

L = brm.likelihoods


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.bert(tmp_path_factory.mktemp("bert"))


def fit(path, data, *, members=3, anchored=True, bootstrap=False, precision=2.0, seed=1, likelihood=None, **training):
    model = brm.RewardModel(
        LoRA(path, rank=2, device="cpu"), likelihood or L.Davidson(), brm.priors.Gaussian(precision)
    )
    values = {"epochs": 1.0, "batch_size": 4, "learning_rate": 5e-3} | training
    return fit_members(
        model, data, Training(**values), num_members=members, anchored=anchored, bootstrap=bootstrap, seed=seed,
        progress=False,
    )  # fmt: skip


def test_members_are_those_that_are_trained_by_hand(path):
    data = load(pairs(12))
    posterior = fit(path, data, members=2, anchored=True, bootstrap=True)
    assert len(posterior) == 2
    for number in range(2):
        member = Member.of(1, number)
        model, network, density = setup(path, data, L.Davidson(), precision=2.0)
        network = model.reward.load(1)
        network.set_initial(member.anchor(network, model, network.initial_theta()))
        weighted = member.reweighted(model, data, density)
        training = Training(epochs=1.0, batch_size=4, learning_rate=5e-3)
        report = train(
            network, model, data, weighted, training, seed=member.order_seed, progress=False,
            objective=member.moved(density),
        )  # fmt: skip
        assert torch.equal(posterior.network_draws.draws[number], network.theta())
        assert torch.equal(posterior.unconstrained_latents[number], report.latents)


def test_anchors_are_draws_from_the_declared_prior(path):
    model, network, _ = setup(path, load(pairs(4)), L.Davidson())
    prior = brm.priors.Gaussian({"*.lora_A": 4.0, "*": 0.25})
    model = dataclasses.replace(model, prior=prior)
    center = network.initial_theta()
    anchors = torch.stack([Member.of(0, i).anchor(network, model, center) for i in range(300)])
    away = (anchors - center).split([p.numel() for p in network.sites.values()], dim=1)
    for site, part in zip(network.sites, away, strict=True):
        count = part.numel()
        spread = prior.of(site) ** -0.5
        assert float(part.std()) == pytest.approx(spread, rel=4 / (2 * count) ** 0.5)
        assert abs(float(part.mean())) < 4 * spread / count**0.5


def log_prior(density, u):
    return density.distributions([torch.zeros(g.items.shape).double() for g in density.groups], u)[1]


def test_shifts_are_draws_of_a_normal_prior(path):
    """The modes of the moved prior of normal latents are draws of that prior."""
    data = load(pairs(6))
    _, _, density = setup(path, data, L.LengthBias(L.Davidson()))
    shifts = torch.tensor([Member.of(0, i).moved(density).shift for i in range(144)], dtype=torch.float64)
    u = density.initial_latents
    precision = -torch.autograd.functional.hessian(lambda x: log_prior(density, x), u)
    torch.testing.assert_close(precision, precision.diagonal().diag(), rtol=0, atol=1e-10)
    scale = precision.diagonal().rsqrt()
    assert len(u) == 2
    assert bool((shifts.mean(0).abs() < 4 * scale / 12).all())
    torch.testing.assert_close(shifts.std(0), scale, rtol=4 / 288**0.5, atol=0)


def test_the_moved_loss_is_the_log_joint_under_the_moved_prior(path):
    data = load(pairs(9))
    model, network, density, latents = moved(path, data, HeavyTailed())
    batches = partition(network, data, density)
    loss = MovedPrior((0.7,)).loss(network, model, density, num_rows=9, num_batches=len(batches))
    loss.latents.data.copy_(latents)
    with torch.no_grad():
        average = torch.stack([loss(**batches[i], number=i) for i in range(len(batches))]).mean()

    def by_hand(u):
        """Half-Cauchy of scale 1 at exp(u), with its Jacobian."""
        return float(np.log(2 / np.pi) - np.log1p(np.exp(2 * u)) + u)

    u = float(latents)
    expected = -9 * declared_loss(model, network, density, data, latents) - by_hand(u) + by_hand(u - 0.7)
    assert abs(by_hand(u) - by_hand(u - 0.7)) > 0.05
    assert -9 * float(average) == pytest.approx(expected, rel=1e-10)


@dataclasses.dataclass(frozen=True)
class HeavyTailed:
    """Davidson with a half-Cauchy prior: in log nu its log density falls off linearly on both sides."""

    def __call__(self, rewards, comparison):
        tie_weight = brm.backend.sample("tie_weight", brm.backend.dist.HalfCauchy(1.0))
        half = 0.5 * (rewards[..., 0] - rewards[..., 1])
        ops = brm.backend.ops
        return brm.backend.dist.Categorical(logits=ops.stack([half, -half, ops.log(tie_weight) + 0.0 * half], axis=-1))


def test_latents_with_log_linear_tails_have_a_mode_in_every_member(path):
    """Of ties alone the likelihood goes flat as log nu grows, where the prior falls off with slope 1."""
    data = load([row | {"choice": "tie"} for row in pairs(8)])
    model, network, density = setup(path, data, HeavyTailed())
    [batch] = partition(network, data, density, batch_size=8, step_size=1)
    shifts = []
    for number in range(20):
        objective = Member.of(1, number).moved(density)
        loss = objective.loss(network, model, density, num_rows=8, num_batches=1)
        values = {}
        for u in (-30.0, -20.0, 3.0, 20.0, 30.0):
            loss.latents.data.fill_(u)
            values[u] = 8 * float(loss(**batch).detach())
        assert values[-30.0] - values[-20.0] > 5.0
        assert values[30.0] - values[20.0] > 5.0
        assert max(values[20.0], values[-20.0]) - values[3.0] > 5.0
        shifts.append(objective.shift[0])
    # The curvature is 1, and so a linear term with the curvature's spread, which is no anchor here, has these slopes.
    assert max(shifts) > 1.1
    assert min(shifts) < -1.1


def test_latents_that_ran_off_are_refused(path, monkeypatch):
    monkeypatch.setattr(
        _lora_ensemble, "train", lambda *a, **k: TrainingReport(torch.tensor([-torch.inf]).double(), 1, 1, 1.0, 1.0)
    )
    with pytest.raises(EngineError, match=r"member 0 has no mode.*-inf"):
        fit(path, load(pairs(6)))


def test_members_are_drawn_to_their_anchors_where_the_prior_is_strong(path):
    data = load(pairs(12))
    settings = {
        "precision": 1e4,
        "epochs": 30.0,
        "batch_size": 12,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.0,
        "members": 2,
    }
    anchored, plain = (fit(path, data, anchored=a, **settings) for a in (True, False))
    model, network, _ = setup(path, data, L.Davidson(), precision=1e4)
    network = model.reward.load(1)
    center = network.initial_theta()
    for number in range(2):
        anchor = Member.of(1, number).anchor(network, model, center)
        off = anchored.network_draws.draws[number] - anchor
        # The prior's standard deviation is 0.01.
        assert float((anchor - center).std()) == pytest.approx(0.01, rel=0.2)
        assert float(off.square().mean().sqrt()) < 0.003
        assert float((plain.network_draws.draws[number] - center).square().mean().sqrt()) < 0.003


def test_bootstrap_weights_are_exponential_and_shared_inside_a_prompt(path):
    rows = pairs(20) + [row | {"prompt": "w9", "responses": [f"w1 w{i}", "w2"]} for i, row in enumerate(pairs(4))]
    rows[0]["weight"] = 0.0
    data = load(rows)
    model, _, density = setup(path, data, L.Davidson())
    [plain] = density.groups
    found = []
    for number in range(80):
        [group] = Member.of(0, number).reweighted(model, data, density).groups
        assert torch.equal(group.weight == 0, plain.weight == 0)
        same = group.weight[plain.rows >= 20]
        torch.testing.assert_close(same, same[:1].expand(4), rtol=0, atol=0)
        found.append(group.weight[plain.weight > 0][:7])
    found = torch.stack(found)
    assert len({tuple(row.tolist()) for row in found}) == 80
    # Exp(1) has mean 1, variance 1 and fourth central moment 9; 560 numbers.
    assert float(found.mean()) == pytest.approx(1.0, abs=4 / 560**0.5)
    assert float(found.var()) == pytest.approx(1.0, abs=4 * (8 / 560) ** 0.5)


def test_one_backbone_is_loaded_and_its_settings_come_back(path, monkeypatch):
    loads = []
    load_network = LoRA.load

    def counted(self, seed=0):
        loads.append(seed)
        return load_network(self, seed)

    monkeypatch.setattr(LoRA, "load", counted)
    posterior = fit(path, load(pairs(8)))
    assert len(loads) == 1
    network = posterior.network_draws.network
    assert torch.equal(network.initial_theta(), load_network(LoRA(path, rank=2, device="cpu"), 1).theta())
    assert torch.equal(network.theta(), posterior.network_draws.draws[0])


def test_a_cut_run_goes_on_inside_its_member(path, tmp_path, monkeypatch):
    data = load(pairs(16))
    settings = {"epochs": 2.0, "save_steps": 2, "bootstrap": True}
    whole = fit(path, data, **settings)

    class Second(At):
        """Counts the runs that begin; cuts in the second."""

        runs = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.runs += 1

        def on_step_end(self, args, state, control, **kwargs):
            if self.runs == 2:
                super().on_step_end(args, state, control, **kwargs)

    with pytest.raises(Cut):
        fit(path, data, output_dir=str(tmp_path), callbacks=(Second(5, cut),), **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["member-000", "member-001"]
    steps = []
    counter = At(0, cut)
    counter.on_step_end = lambda args, state, control, **kwargs: steps.append(state.global_step)
    again = fit(path, data, output_dir=str(tmp_path), callbacks=(counter,), **settings)
    assert steps == [*range(5, 9), *range(1, 9)]
    assert torch.equal(again.network_draws.draws, whole.network_draws.draws)
    assert torch.equal(again.unconstrained_latents, whole.unconstrained_latents)
    steps.clear()
    more = fit(path, data, output_dir=str(tmp_path), members=4, callbacks=(counter,), **settings)
    assert steps == list(range(1, 9))
    assert torch.equal(more.network_draws.draws[:3], whole.network_draws.draws)


def test_the_report_and_the_round_trip(path, tmp_path):
    data = load(pairs(12))
    posterior = fit(path, data, anchored=False)
    report = posterior.report
    assert (report.engine["name"], report.iterations, report.converged) == ("Ensemble", 9, True)
    assert np.isnan(report.gradient_norm)
    assert report.training["steps"] == report.training["planned_steps"] == 9
    assert isinstance(posterior.network_draws.network, LoRANetwork)
    # Members differ by the order of their data alone, and a little.
    belief = posterior.predict(["w1"], [["w2 w3", "w39"]])
    assert 0.0 < float(belief.std.max()) < 1.0
    posterior.save_pretrained(tmp_path / "run")
    again = Posterior.from_pretrained(tmp_path / "run")
    assert torch.equal(again.predict(["w1"], [["w2 w3", "w39"]]).draws, belief.draws)
    np.testing.assert_array_equal(again.draw(data).latents, posterior.unconstrained_latents)
    assert posterior.draw(data).log_ratio is None


def test_a_run_that_was_stopped_early_says_so(path):
    def stop(control):
        control.should_training_stop = True

    with pytest.warns(ConvergenceWarning, match="4 of 6 steps"):
        posterior = fit(path, load(pairs(12)), members=2, callbacks=(At(2, stop),))
    assert not posterior.report.converged
    assert posterior.report.training["stopped_early"]


@pytest.mark.parametrize(("settings", "named"), [({"members": 1}, "num_members"), ({"epochs": 0.0}, "0 epochs")])
def test_bad_settings(path, settings, named):
    with pytest.raises(ArgumentError, match=named):
        fit(path, load(pairs(4)), **settings)

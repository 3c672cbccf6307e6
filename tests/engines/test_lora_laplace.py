"""Laplace on adapter weights against dense linear algebra on explicit Jacobians from torch.func."""

import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy.optimize import minimize
from scipy.special import expit

import bayesrm as brm
from bayesrm.engines._work import plan_work
from bayesrm.errors import ArgumentError, ConvergenceWarning, EngineError, PersistenceError
from bayesrm.rewards import LoRA

from ..rewards import lora_models as models

SHORT = brm.Training(epochs=3.0, learning_rate=3e-3, batch_size=8)
LIKELIHOOD = brm.likelihoods.BradleyTerry()
PROMPTS = ["w1 w2", "w3", "w30 w7"]
CANDIDATES = [["w3 w4 w5", "w30 w31", "w10 w20"], ["w1", "w39 w2"], ["w5 w6 w7 w8", "w35", "w11", "w12 w38"]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data():
    return models.pairs(40)


def fit(path, data, *, dtype="float64", precision=4.0, likelihood=LIKELIHOOD, lora=None, training=SHORT, **settings):
    model = brm.RewardModel(LoRA(path, rank=2, dtype=dtype, **(lora or {})), likelihood, brm.priors.Gaussian(precision))
    return brm.fit(model, data, inference=brm.Laplace(training=training, **settings))


class Dense:
    """The posterior of the tangent model by dense algebra over all P weights, from torch.func Jacobians."""

    def __init__(self, network, data, precision):
        self.network, self.precision = network, precision
        self.theta = network.theta()
        [group] = data.groups()
        rewards, jacobian = self.derivatives(network.tokenize_items(data))
        first, second = group.items[:, 0], group.items[:, 1]
        self.differences = (jacobian[first] - jacobian[second]).numpy()
        base = (rewards[first] - rewards[second]).numpy()
        center = network.initial_theta().numpy()
        start = self.theta.numpy() - center

        def negative(delta):
            d = base + self.differences @ (delta - start)
            value = np.logaddexp(0, -d).sum() + 0.5 * precision * delta @ delta
            return value, -self.differences.T @ expit(-d) + precision * delta

        found = minimize(negative, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000})
        self.log_joint, self.delta, self.start = -found.fun, found.x, start
        d = base + self.differences @ (self.delta - start)
        weight = expit(d) * expit(-d)
        self.hessian = (self.differences.T * weight) @ self.differences + precision * np.eye(len(start))
        self.covariance = np.linalg.inv(self.hessian)

    def derivatives(self, sequences):
        values = {site: p.detach() for site, p in self.network.sites.items()}
        rewards, rows = [], []
        for sequence in sequences:
            batch = self.network.collate([sequence])
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                found = torch.func.jacrev(lambda p, b=batch: self.network.apply_parameters(p, b))(values)
            rows.append(torch.cat([found[site].reshape(-1) for site in self.network.sites]))
            rewards.append(self.network(**batch).detach()[0])
        return torch.stack(rewards), torch.stack(rows)

    def belief(self, prompt, candidates):
        rewards, jacobian = self.derivatives(self.network.tokenize([prompt] * len(candidates), candidates))
        jacobian = jacobian.numpy()
        return rewards.numpy() + jacobian @ (self.delta - self.start), jacobian @ self.covariance @ jacobian.T

    @property
    def log_evidence(self):
        size = len(self.start)
        prior = 0.5 * size * np.log(self.precision)
        return self.log_joint + prior - 0.5 * np.linalg.slogdet(self.hessian)[1]


@pytest.fixture(scope="module")
def exact(path, data):
    """A fitted `full` posterior and the dense computation around the same trained weights."""
    posterior = fit(path, data)
    return posterior, Dense(posterior.program.reward.network, data, 4.0)


class TestFull:
    def test_means_and_covariances_equal_dense_algebra(self, exact):
        posterior, dense = exact
        belief = posterior.predict(PROMPTS, CANDIDATES)
        for i, (prompt, candidates) in enumerate(zip(PROMPTS, CANDIDATES, strict=True)):
            mean, covariance = dense.belief(prompt, candidates)
            k = len(candidates)
            np.testing.assert_allclose(belief.mean[i, :k], mean, atol=1e-6)
            np.testing.assert_allclose(belief.covariance[i, :k, :k], covariance, rtol=1e-6, atol=1e-8)

    def test_evidence_equals_the_dense_one(self, exact):
        posterior, dense = exact
        assert posterior.report.log_evidence == pytest.approx(dense.log_evidence, abs=1e-6)

    def test_the_report_says_where_the_trained_weights_stand(self, exact):
        posterior, dense = exact
        move = posterior.report.refinement
        assert move["distance"] == pytest.approx(np.linalg.norm(dense.delta - dense.start) * 2.0, rel=1e-5)
        before = dense.differences @ (dense.delta * 0)
        r0 = -dense.differences @ dense.start  # offset of the linear model relative to the trained rewards
        assert before.shape == r0.shape
        assert move["log_joint_gain"] > 0
        assert move["trained_gradient_norm"] > 1e-3
        assert posterior.report.converged

    def test_its_program_is_a_linear_model_for_any_engine(self, exact, data):
        posterior, _ = exact
        again = brm.fit(posterior.program, data, inference=brm.Laplace())
        mode = brm.fit(posterior.program, data, inference=brm.MAP())
        a, b, c = (p.predict(PROMPTS, CANDIDATES) for p in (again, posterior, mode))
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(c.mean, b.mean, rtol=0, atol=1e-7)

    def test_its_program_refuses_what_would_leave_the_rest_of_its_prior_behind(self, exact, path, data):
        posterior, _ = exact
        with pytest.raises(EngineError, match="holds its prior in its own scale"):
            brm.fit(posterior.program, data, inference=brm.Laplace(prior_precision="marginal_likelihood"))
        other = dataclasses.replace(posterior.program, prior=brm.priors.Gaussian(5.0))
        with pytest.raises(EngineError, match="holds its prior in its own scale"):
            brm.fit(other, data)
        with pytest.raises(EngineError, match="no coordinates"):
            brm.fit(fit(path, data, structure="diag").program, data)

    def test_a_prior_for_no_site_is_refused(self, path, data):
        with pytest.raises(ArgumentError, match=r"'\*lora_C', which fits no parameter site"):
            fit(path, data, precision={"*lora_C": 5.0, "*": 1.0})

    def test_primal_and_dual_agree(self, path):
        # 24 weights against 80 comparisons: one adapter of rank 1 on one module, then both coordinates are possible.
        lora = {"target_modules": ("layer.1.attention.self.query",)}
        many = models.pairs(80)
        model = brm.RewardModel(LoRA(path, rank=1, dtype="float64", **lora), LIKELIHOOD, brm.priors.Gaussian(4.0))
        primal = brm.fit(model, many, inference=brm.Laplace(training=SHORT))
        assert primal.report.num_coordinates == primal.report.num_parameters == 49
        few = many.select(np.arange(30))
        dual = brm.fit(model, few, inference=brm.Laplace(training=SHORT))
        assert dual.report.num_coordinates == 30
        for posterior, rows in ((primal, many), (dual, few)):
            dense = Dense(posterior.program.reward.network, rows, 4.0)
            belief = posterior.predict(PROMPTS[:1], CANDIDATES[:1])
            mean, covariance = dense.belief(PROMPTS[0], CANDIDATES[0])
            np.testing.assert_allclose(belief.mean[0], mean, atol=1e-6)
            np.testing.assert_allclose(belief.covariance[0], covariance, rtol=1e-8, atol=1e-10)

    def test_both_coordinates_agree_to_1e_10(self, path, data):
        lora = {"target_modules": ("layer.1.attention.self.query",)}
        few = data.select(np.arange(30))
        a, b = (
            fit(path, few, lora=lora, coordinates=coordinates).predict(PROMPTS, CANDIDATES)
            for coordinates in ("primal", "dual")
        )
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=0, atol=1e-10)

    def test_float32_is_close_to_float64(self, path, data, exact):
        posterior, _ = exact
        single = fit(path, data, dtype="float32")
        # Training follows its own rounding, so the trained weights are made equal first.
        assert single.program.reward.network.theta().dtype == torch.float32
        a, b = (p.predict(PROMPTS, CANDIDATES) for p in (single, posterior))
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=2e-3)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=0, atol=2e-3)

    def test_data_far_away_leave_the_prior(self, path, data):
        """With all weights at 1e-9 the rows say nothing, and the belief is the prior's."""
        rows = data.rows.to_dict()
        rows["weight"] = [1e-9] * len(data)
        faint = dataclasses.replace(data, _rows=dataclasses.replace(data._rows, weight=np.full(len(data), 1e-9)))
        posterior = fit(path, faint)
        dense = Dense(posterior.program.reward.network, data, 4.0)
        _, jacobian = dense.derivatives(dense.network.tokenize([PROMPTS[0]] * 3, CANDIDATES[0]))
        prior = (jacobian @ jacobian.T / 4.0).numpy()
        np.testing.assert_allclose(posterior.predict(PROMPTS[:1], CANDIDATES[:1]).covariance[0], prior, rtol=1e-6)


class TestStructures:
    def test_a_sketch_of_all_directions_is_the_full_posterior(self, path, data, exact):
        posterior, _ = exact
        sketch = fit(path, data, structure="sketch", sketch_rank=64)
        assert sketch.report.structure_check["variance_ratio"] == pytest.approx(1.0, abs=1e-8)
        a, b = (p.predict(PROMPTS, CANDIDATES) for p in (sketch, posterior))
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-6, atol=1e-8)

    def test_a_sketch_says_by_how_much_it_errs_and_errs_less_the_wider_it_is(self, path, data):
        ratios = []
        for rank in (1, 2, 12):
            sketch = fit(path, data, structure="sketch", sketch_rank=rank)
            ratios.append(sketch.report.structure_check["variance_ratio"])
            assert sketch.report.structure_check["num_probes"] == 10
        errors = [abs(ratio - 1.0) for ratio in ratios]
        assert errors[0] > errors[1] > errors[2]
        assert errors[0] > 0.05
        assert errors[2] < 0.01

    def test_last_layer_equals_a_linear_head_on_the_pooled_features(self, path, data):
        posterior = fit(path, data, structure="last_layer")
        tangent = posterior.program.reward
        assert set(tangent.sites) == {"classifier.weight", "classifier.bias"}
        features = last_features(tangent.network, tangent.network.tokenize_items(data))
        head = brm.fit(
            brm.RewardModel(brm.rewards.Linear(), LIKELIHOOD, brm.priors.Gaussian(4.0)), data.with_features(features)
        )
        new = last_features(tangent.network, tangent.network.tokenize([PROMPTS[0]] * 3, CANDIDATES[0]))
        a = posterior.predict(PROMPTS[:1], CANDIDATES[:1]).differences()
        b = head.predict(candidates=[new]).differences()
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-6, atol=1e-8)
        assert posterior.report.log_evidence == pytest.approx(head.report.log_evidence, abs=1e-6)

    @pytest.mark.parametrize("structure", ["kron", "diag"])
    def test_cheap_structures_keep_the_mean_and_are_compared_with_full(self, path, data, exact, structure):
        posterior, dense = exact
        cheap = fit(path, data, structure=structure)
        a, b = (p.predict(PROMPTS, CANDIDATES) for p in (cheap, posterior))
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-6)
        assert {"variance_ratio", "rank_correlation", "num_probes"} <= set(cheap.report.structure_check)
        if structure == "diag":
            _, jacobian = dense.derivatives(dense.network.tokenize([PROMPTS[0]] * 3, CANDIDATES[0]))
            expected = (jacobian.numpy() / np.diag(dense.hessian)) @ jacobian.numpy().T
            np.testing.assert_allclose(a.covariance[0, :3, :3], expected, rtol=1e-6)
            assert cheap.report.log_evidence is None

    @pytest.mark.parametrize("structure", ["full", "sketch", "last_layer", "kron", "diag"])
    def test_coordinates_move_no_mean(self, path, data, structure):
        few = data.select(np.arange(12))
        known = ("auto", "primal") if structure == "diag" else ("auto", "primal", "dual")
        beliefs = [fit(path, few, structure=structure, coordinates=c).predict(PROMPTS, CANDIDATES) for c in known]
        for other in beliefs[1:]:
            torch.testing.assert_close(other.mean, beliefs[0].mean, rtol=0, atol=1e-7)
            torch.testing.assert_close(other.covariance, beliefs[0].covariance, rtol=1e-6, atol=1e-8)

    def test_a_posterior_of_ties_conditions_or_integrates_its_latent(self, path, data):
        rng = np.random.default_rng(0)
        [group] = data.groups()
        tied = data.with_outcomes([np.where(rng.random(len(data)) < 0.3, 2, group.outcome.numpy())])
        full = fit(path, tied, likelihood=brm.likelihoods.Davidson())
        kron = fit(path, tied, likelihood=brm.likelihoods.Davidson(), structure="kron")
        spread = {name: next(iter(p.latents(2000).values())).std() for name, p in (("full", full), ("kron", kron))}
        assert spread["full"] > 0.05
        assert spread["kron"] < 1e-12
        assert full.predict_feedback(tied).groups[0].probs.sum(1).allclose(torch.ones(len(data), dtype=torch.float64))

    def test_heads_refuse_what_is_for_networks(self):
        plain = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]], outcome=[0])
        head = brm.RewardModel(brm.rewards.Linear(), LIKELIHOOD)
        for settings in ({"structure": "sketch"}, {"structure": "kron"}, {"precision_groups": "layer"}):
            with pytest.raises(EngineError, match="LoRA"):
                brm.fit(head, plain, inference=brm.Laplace(**settings))


def last_features(network, sequences):
    caught = []
    head = network.model.get_submodule("base_model.model.classifier.modules_to_save.default")
    handle = head.register_forward_hook(lambda _, inputs, __: caught.append(inputs[0].detach()))
    for sequence in sequences:
        network(**network.collate([sequence]))
    handle.remove()
    return torch.cat(caught).numpy()


class TestEvidence:
    @pytest.mark.filterwarnings("ignore:the marginal likelihood still grows")
    def test_tuning_raises_the_evidence_and_groups_raise_it_further(self, path, data):
        given = fit(path, data, precision=50.0)
        one = fit(path, data, precision=50.0, prior_precision="marginal_likelihood")
        module = fit(path, data, precision=50.0, prior_precision="marginal_likelihood", precision_groups="module")
        assert given.report.log_evidence < one.report.log_evidence <= module.report.log_evidence + 1e-4
        precision = module.report.prior_precision
        assert len({v for k, v in precision.items() if k.endswith("query.lora_A")}) == 1
        assert len(set(precision.values())) > 1

    def test_the_tuned_precision_is_the_best_on_a_grid_of_dense_evidences(self, path, data):
        one = fit(path, data, precision=4.0, prior_precision="marginal_likelihood")
        network = one.program.reward.network
        tuned = one.report.prior_precision
        best = Dense(network, data, tuned).log_evidence
        assert one.report.log_evidence == pytest.approx(best, abs=1e-5)
        assert best >= max(Dense(network, data, tuned * f).log_evidence for f in (0.8, 1.25)) - 1e-9

    def test_a_sketch_and_a_last_layer_are_tuned_too(self, path, data):
        for structure in ("sketch", "last_layer"):
            given, tuned = (
                fit(path, data, precision=50.0, structure=structure, prior_precision=p)
                for p in ("given", "marginal_likelihood")
            )
            assert tuned.report.log_evidence > given.report.log_evidence


class TestPoint:
    def test_map_is_the_trained_network_and_reports_its_gradient(self, path, data):
        model = brm.RewardModel(LoRA(path, rank=2, dtype="float64"), LIKELIHOOD, brm.priors.Gaussian(4.0))
        point = brm.fit(model, data, inference=brm.MAP(training=SHORT))
        network = point.program.reward.network
        belief = point.predict(PROMPTS[:1], CANDIDATES[:1])
        rewards = network(**network.collate(network.tokenize([PROMPTS[0]] * 3, CANDIDATES[0]))).detach()
        torch.testing.assert_close(belief.mean[0], rewards, rtol=0, atol=1e-12)
        assert belief.std.max() == 0
        assert not point.report.converged
        assert "NOT CONVERGED" in point.summary()
        full = fit(path, data)
        assert point.report.gradient_norm == pytest.approx(full.report.refinement["trained_gradient_norm"], rel=1e-6)

    def test_stopping_early_warns_that_it_is_no_mode(self, path, data):
        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= 2

        model = brm.RewardModel(LoRA(path, rank=2), LIKELIHOOD)
        training = dataclasses.replace(SHORT, callbacks=(Stop(),))
        with pytest.warns(ConvergenceWarning, match="stopped after 2 of 15 steps"):
            point = brm.fit(model, data, inference=brm.MAP(training=training))
        assert "STOPPED EARLY" in point.summary()

    def test_without_training_the_latents_are_at_their_mode(self, path, data):
        rng = np.random.default_rng(0)
        [group] = data.groups()
        tied = data.with_outcomes([np.where(rng.random(len(data)) < 0.3, 2, group.outcome.numpy())])
        model = brm.RewardModel(LoRA(path, rank=2), brm.likelihoods.Davidson())
        point = brm.fit(model, tied, inference=brm.MAP(training=brm.Training(epochs=0.0)))
        head = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.Davidson())
        same = brm.fit(head, tied.with_features(np.zeros((data.num_items, 1))), inference=brm.MAP())
        torch.testing.assert_close(point.mode, same.mode[1:], rtol=0, atol=1e-5)

    def test_tuning_needs_the_curvature(self, path, data):
        model = brm.RewardModel(LoRA(path), LIKELIHOOD)
        with pytest.raises(EngineError, match="plug_in"):
            brm.fit(model, data, inference=brm.MAP(prior_precision="marginal_likelihood"))


class TestWork:
    def test_what_does_not_fit_is_refused_before_training_with_what_would(self, path, data):
        class Exploding(transformers.TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                raise AssertionError("training began")

        training = dataclasses.replace(SHORT, callbacks=(Exploding(),))
        with pytest.raises(EngineError, match=r"memory_gib.*structure='last_layer'"):
            fit(path, data, memory_gib=1e-4, disk_gib=1e-9, training=training)

    def test_the_plan_is_logged(self, path, data, caplog):
        with caplog.at_level(logging.INFO, logger="bayesrm"):
            fit(path, data, structure="last_layer")
        assert "last_layer: 80 items, 17 weights" in caplog.text

    def test_derivatives_on_disk_or_computed_again_change_nothing(self, path, data, tmp_path):
        training = dataclasses.replace(SHORT, output_dir=str(tmp_path / "run"))
        network = LoRA(path, rank=2, dtype="float64").load()
        shapes = {site: tuple(p.shape) for site, p in network.sites.items()}
        for structure, place in (("full", "disk"), ("sketch", "nowhere")):
            sizes = {"items": 80, "contrasts": 40, "itemsize": 8, "disk_gib": 1.0}
            least = plan_work(structure, shapes, memory_gib=0.0, **sizes).memory_gib * 1.001
            assert plan_work(structure, shapes, memory_gib=least, **sizes).derivatives == place
            kept = fit(path, data, structure=structure, training=training)
            other = fit(path, data, structure=structure, memory_gib=least)
            a, b = (p.predict(PROMPTS, CANDIDATES) for p in (kept, other))
            torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-7)
            torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-7, atol=1e-9)
        assert (tmp_path / "run" / "derivatives.bin").stat().st_size == 80 * 273 * 8


class TestPrediction:
    def test_batches_and_company_change_nothing(self, exact):
        posterior, _ = exact
        together = posterior.predict(PROMPTS, CANDIDATES)
        streamed = list(posterior.predict_stream(zip(PROMPTS, CANDIDATES, strict=True), chunk_size=2))
        assert len(streamed) == 3
        for i, one in enumerate(streamed):
            k = len(CANDIDATES[i])
            torch.testing.assert_close(one.mean[0], together.mean[i, :k], rtol=0, atol=1e-10)
            torch.testing.assert_close(one.covariance[0], together.covariance[i, :k, :k], rtol=0, atol=1e-10)

    def test_feedback_agrees_with_quadrature_over_the_difference(self, exact):
        posterior, dense = exact
        test = models.pairs(10, seed=9)
        found = posterior.predict_feedback(test)
        [group] = test.groups()
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        for row in range(len(test)):
            items = group.items[row].tolist()
            prompt, _ = test.text(items[0])
            mean, covariance = dense.belief(prompt, [test.text(i)[1] for i in items])
            d, v = mean[0] - mean[1], covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
            p = (weights * expit(d + np.sqrt(v) * nodes)).sum() / weights.sum()
            p = p if int(group.outcome[row]) == 0 else 1 - p
            assert found.log_prob[row].exp() == pytest.approx(p, abs=2e-3)

    def test_plug_in_is_certain_and_has_the_same_mean(self, exact):
        posterior, _ = exact
        point = posterior.plug_in()
        a, b = point.predict(PROMPTS, CANDIDATES), posterior.predict(PROMPTS, CANDIDATES)
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-10)
        assert a.std.max() == 0

    def test_arrays_of_features_are_refused(self, exact):
        with pytest.raises(ArgumentError, match="reads texts"):
            exact[0].predict(candidates=[np.eye(2)])

    def test_a_bad_text_names_its_item(self, exact):
        with pytest.raises(brm.errors.DataError, match="item 1"):
            exact[0].predict(["w1"], [["w2", " "]])


class TestDraws:
    def test_draws_have_the_posterior_covariance_in_the_linear_model(self, exact, tmp_path):
        posterior, dense = exact
        network = dense.network
        kept = network.theta()
        paths = posterior.save_adapter_draws(tmp_path, 400, seed=3)
        assert torch.equal(network.theta(), kept)
        _, jacobian = dense.derivatives(network.tokenize([PROMPTS[0]] * 3, CANDIDATES[0]))
        weights = []
        for path in paths:
            found = load_file(path / "adapter_model.safetensors")
            weights.append(torch.cat([found[_peft_name(site)].reshape(-1).double() for site in network.sites]))
        spread = torch.stack(weights) @ jacobian.T
        _, covariance = dense.belief(PROMPTS[0], CANDIDATES[0])
        sample = np.cov(spread.numpy().T)
        # The relative standard error of a sample variance of 400 draws is sqrt(2 / 399) = 7%; four of them.
        np.testing.assert_allclose(np.diag(sample), np.diag(covariance), rtol=0.28)

    def test_plain_peft_loads_draws_by_name(self, exact, path, tmp_path):
        posterior, dense = exact
        paths = posterior.save_adapter_draws(tmp_path, 2, rest=False)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float64)
        model = peft.PeftModel.from_pretrained(base, paths[0], adapter_name=paths[0].name)
        model.load_adapter(paths[1], adapter_name=paths[1].name)
        batch = dense.network.collate(dense.network.tokenize(["w1"], ["w2 w3"]))
        rewards = []
        for name in ("draw-000", "draw-001"):
            model.set_adapter(name)
            rewards.append(float(model.eval()(**batch).logits.detach()))
        assert rewards[0] != rewards[1]

    def test_heads_have_no_adapters(self):
        plain = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]], outcome=[0])
        posterior = brm.fit(brm.RewardModel(brm.rewards.Linear(), LIKELIHOOD), plain)
        with pytest.raises(ArgumentError, match="no adapters"):
            posterior.save_adapter_draws("nowhere", 1)


def _peft_name(site):
    suffix = ".weight" if site.endswith(("lora_A", "lora_B")) else ""
    return f"base_model.model.{site}{suffix}"


class TestPersistence:
    @pytest.mark.slow
    @pytest.mark.parametrize("structure", ["full", "sketch", "last_layer", "kron", "diag"])
    def test_a_fresh_process_predicts_the_same(self, path, data, structure, tmp_path):
        posterior = fit(path, data, structure=structure, sketch_rank=2, dtype="float32")
        posterior.save_pretrained(tmp_path / "run")
        belief = posterior.predict(PROMPTS, CANDIDATES)
        again = brm.Posterior.from_pretrained(tmp_path / "run")
        networks = (again.program.reward.network, posterior.program.reward.network)
        assert torch.equal(*(network.initial_theta() for network in networks))
        assert again.summary() == posterior.summary()
        other = again.predict(PROMPTS, CANDIDATES)
        torch.testing.assert_close(other.mean, belief.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.covariance, belief.covariance, rtol=1e-4, atol=1e-6)
        if structure != "full":
            return
        script = (
            "import sys, json, bayesrm as brm; p = brm.Posterior.from_pretrained(sys.argv[1]); "
            "b = p.predict(json.loads(sys.argv[2]), json.loads(sys.argv[3])); print(json.dumps(b.mean.tolist()))"
        )
        arguments = [str(tmp_path / "run"), json.dumps(PROMPTS), json.dumps(CANDIDATES)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), belief.mean.numpy(), atol=1e-6)

    def test_the_adapter_folder_is_plain_peft(self, path, data, tmp_path):
        posterior = fit(path, data, dtype="float32")
        posterior.save_pretrained(tmp_path / "run")
        network = posterior.program.reward.network
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
        batch = network.collate(network.tokenize(["w1"], ["w2 w3"]))
        torch.testing.assert_close(plain(**batch).logits[0], network(**batch), rtol=0, atol=1e-6)

    def test_a_damaged_adapter_is_named(self, path, data, tmp_path):
        fit(path, data, structure="last_layer").save_pretrained(tmp_path / "run")
        file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(PersistenceError, match=r"adapter_model\.safetensors"):
            brm.Posterior.from_pretrained(tmp_path / "run")

"""Posteriors over adapter weights themselves against plain forward passes under each draw, one text at a time."""

import dataclasses
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.engines import Posterior
from bayesrm.engines._schema import FeedbackSchema
from bayesrm.engines._shared_prefix import MemberForward
from bayesrm.engines.network_posterior import NetworkDraws, NetworkPosterior, network_report
from bayesrm.engines.training import TrainingReport
from bayesrm.errors import ArgumentError
from bayesrm.rewards import LoRA, per_sample_jacobian

from ..rewards import lora_models as models

PROMPTS = ["w1 w2", "w3", "w30 w7"]
CANDIDATES = [["w3 w4 w5", "w30 w31", "w10 w20"], ["w1", "w39 w2"], ["w5 w6 w7 w8", "w35", "w11", "w12 w38"]]
FAMILIES = {"bert": models.bert, "gpt2": models.gpt2, "llama": models.llama, "roberta": models.roberta}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.bert(tmp_path_factory.mktemp("bert"))


def draws_of(network, count, *, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    theta = network.theta()
    return theta + scale * torch.randn(count, len(theta), generator=generator).to(theta)


def posterior_of(path, data, *, count=5, latents=None, likelihood=None, **lora):
    network = LoRA(path, rank=2, **lora).load(0)
    likelihood = likelihood or brm.likelihoods.BradleyTerry()
    model = brm.RewardModel(NetworkDraws(network, draws_of(network, count), 3), likelihood, brm.priors.Gaussian(4.0))
    schema = FeedbackSchema.of(data, data.groups())
    report = network_report(
        "SVI", model, data, brm.Training(), network, seed=0, seconds=1.0,
        runs=[TrainingReport(torch.zeros(0), 3, 3, 1.0, 1.0)],
    )  # fmt: skip
    latents = torch.zeros(count, 0, dtype=torch.float64) if latents is None else latents
    return NetworkPosterior(model, schema, report, latents)


def hooks_of(network):
    """Modules with hooks, or with a `forward` of their own."""
    return [name for name, m in network.named_modules() if m._forward_hooks or "forward" in vars(m)]


def one_by_one(posterior, prompts, responses):
    """Rewards `(S, items)`: every text alone, through the untouched network, under every draw in turn."""
    network = posterior.network_draws.network
    kept = network.theta()
    rows = []
    for theta in posterior.network_draws.draws:
        network.set_theta(theta)
        batches = [network.collate([s]) for s in network.tokenize(prompts, responses)]
        with torch.no_grad():
            rows.append(torch.cat([network(**batch) for batch in batches]).double())
    network.set_theta(kept)
    return torch.stack(rows)


class TestMemberForward:
    @pytest.mark.parametrize("family", sorted(FAMILIES))
    @pytest.mark.parametrize("layers", [None, (1,), "head"])
    def test_rewards_are_those_of_full_forward_passes(self, family, layers, tmp_path):
        adapted = layers if isinstance(layers, tuple) else None
        network = LoRA(FAMILIES[family](tmp_path), rank=2, layers=adapted).load(0)
        draws = draws_of(network, 4)
        if layers == "head":
            sizes = [p.numel() for p in network.sites.values()]
            for site, part in zip(network.sites, draws.split(sizes, dim=1), strict=True):
                if site not in network.head_sites:
                    part[:] = part[0]
        before = network.theta()
        batch = network.collate(network.tokenize(*models.texts(6)))
        members = MemberForward(network, draws)
        assert members.num_shared_layers == {None: 0, (1,): 1, "head": 2}[layers]
        found = [members(batch) for _ in range(2)]
        assert members.num_shared_layers == {None: 0, (1,): 1, "head": 2}[layers]
        assert members.read_modules
        assert torch.equal(network.theta(), before)
        expected = []
        for theta in draws:
            network.set_theta(theta)
            with torch.no_grad():
                expected.append(network(**batch))
        expected = torch.stack(expected, dim=1)
        assert expected.std(0).min() > 0.02
        for rewards in found:
            torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6)

    def test_left_padded_decoders_are_read_at_their_end(self, tmp_path):
        network = LoRA(models.llama(tmp_path), rank=2, layers=(1,), padding_side="left").load(0)
        draws = draws_of(network, 3)
        batch = network.collate(network.tokenize(*models.texts(6)))
        found = MemberForward(network, draws)(batch)
        for column, theta in zip(found.T, draws, strict=True):
            network.set_theta(theta)
            torch.testing.assert_close(column, network(**batch).detach(), rtol=0, atol=1e-6)

    def test_what_is_shared_runs_once_and_keys_and_values_see_every_token(self, tmp_path):
        """Adapters in the second of three layers and in the last: maps to queries, keys and values of the second."""
        network = LoRA(models.bert(tmp_path, layers=3), rank=2, layers=(1, 2)).load(0)
        members = MemberForward(network, draws_of(network, 5))
        batch = network.collate(network.tokenize(*models.texts(6)))
        members(batch)
        first, second, last = network.model.base_model.model.bert.encoder.layer
        shapes = {}

        def watch(name, module):
            forward = module.forward

            def watched(x):
                shapes.setdefault(name, []).append(tuple(x.shape))
                return forward(x)

            module.forward = watched

        attention, read = second.attention.self, last.attention.self
        watch("layer 0", first.intermediate.dense)
        watch("query 1", attention.query.base_layer)
        watch("adapter 1", attention.query.lora_A["default"])
        watch("key 1", attention.key)
        watch("value 1", attention.value.base_layer)
        watch("dense 1", second.output.dense)
        watch("query 2", read.query.base_layer)
        watch("key 2", read.key)
        watch("value 2", read.value.base_layer)
        watch("dense 2", last.output.dense)
        members(batch)
        n, tokens = batch["input_ids"].shape
        calls = {name: len(found) for name, found in shapes.items()}
        once = ("layer 0", "query 1", "key 1", "value 1")
        assert calls == {name: 1 if name in once else 5 for name in calls}
        every = {name: found[0][:2] == (n, tokens) for name, found in shapes.items()}
        at_one = ("query 2", "dense 2")
        assert every == {name: name not in at_one for name in every}
        assert shapes["query 2"][0] == (n, 16)

    def test_encoder_decoders_run_whole_networks(self, tmp_path, caplog):
        network = LoRA(models.t5(tmp_path), rank=2).load(0)
        draws = draws_of(network, 3)
        batch = network.collate(network.tokenize(*models.texts(4)))
        members = MemberForward(network, draws)
        with caplog.at_level("INFO", logger="bayesrm"):
            found = members(batch)
        assert "whole network" in caplog.text
        assert not members.num_shared_layers
        network.set_theta(draws[2])
        torch.testing.assert_close(found[:, 2], network(**batch).detach(), rtol=0, atol=1e-6)

    def test_sharing_that_would_change_a_reward_is_given_up(self, path, caplog):
        """A sharing that is wrong on purpose: the first layers are shared although their weights vary."""
        network = LoRA(path, rank=2).load(0)
        draws = draws_of(network, 3)
        batch = network.collate(network.tokenize(*models.texts(4)))
        members = MemberForward(network, draws)
        members._shared = list(network.model.base_model.model.bert.encoder.layer)
        with caplog.at_level("INFO", logger="bayesrm"):
            found = members(batch)
        assert "not shared" in caplog.text
        network.set_theta(draws[2])
        torch.testing.assert_close(found[:, 2], network(**batch).detach(), rtol=0, atol=1e-6)

    def test_weights_come_back_after_an_error(self, path):
        network = LoRA(path, rank=2).load(0)
        before, pointers = network.theta(), [p.data_ptr() for p in network.parameters()]
        with pytest.raises(KeyError):
            MemberForward(network, draws_of(network, 2))({})
        assert torch.equal(network.theta(), before)
        assert [p.data_ptr() for p in network.parameters()] == pointers


class TestPredictions:
    def test_beliefs_are_the_draws_of_each_text_alone(self, path):
        posterior = posterior_of(path, models.pairs(4))
        belief = posterior.predict(PROMPTS, CANDIDATES)
        flat = [(p, r) for p, c in zip(PROMPTS, CANDIDATES, strict=True) for r in c]
        expected = one_by_one(posterior, [p for p, _ in flat], [r for _, r in flat])
        torch.testing.assert_close(belief.draws[:, belief.valid], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(belief.mean[belief.valid], expected.mean(0), rtol=0, atol=1e-6)
        block = torch.cov(expected[:, :3].T)
        torch.testing.assert_close(belief.covariance[0, :3, :3], block, rtol=1e-5, atol=1e-6)

    def test_items_streams_and_draws_agree(self, path):
        data = models.pairs(6)
        posterior = posterior_of(path, data)
        joint = posterior.draw(data)
        prompts, responses = zip(*(data.text(i) for i in range(data.num_items)), strict=True)
        torch.testing.assert_close(joint.rewards, one_by_one(posterior, prompts, responses), rtol=0, atol=1e-6)
        assert joint.latents.shape == (5, 0)
        assert joint.log_ratio is None
        items = posterior.predict_items(data)
        torch.testing.assert_close(items.mean.sum(), joint.rewards.mean(0).sum(), rtol=0, atol=1e-6)
        whole = posterior.predict(PROMPTS, CANDIDATES)
        stream = posterior.predict_stream(zip(PROMPTS, CANDIDATES, strict=True), chunk_size=2)
        for i, one in enumerate(stream):
            torch.testing.assert_close(one.draws[:, 0], whole.draws[:, i, : one.mean.shape[1]], rtol=0, atol=1e-6)
        few = posterior.draw(data, num_samples=3).rewards
        torch.testing.assert_close(few, joint.rewards[[0, 2, 4]], rtol=0, atol=0)

    def test_features_that_the_data_carry_are_another_reward_functions(self, path):
        data = models.pairs(4)
        posterior = posterior_of(path, data)
        other = data.with_features(torch.zeros(data.num_items, 5).numpy())
        torch.testing.assert_close(posterior.draw(other).rewards, posterior.draw(data).rewards, rtol=0, atol=0)

    def test_feedback_is_the_mixture_over_draws_of_rewards_and_latents(self, path):
        data = brm.Comparisons.load(
            [{"prompt": f"w{i}", "responses": ["w3 w4", f"w5 w{i}"], "choice": ["tie", 0, 1][i % 3]} for i in range(9)]
        )
        latents = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        posterior = posterior_of(path, data, latents=latents, likelihood=brm.likelihoods.Davidson())
        joint = posterior.draw(data)
        assert torch.equal(joint.latents, latents)
        density = posterior._density_of(data)
        probs = torch.stack(
            [density.row_log_probs(density.gather(r), u)[0].exp() for r, u in zip(joint.rewards, latents, strict=True)]
        )
        found = posterior.predict_feedback(data)
        torch.testing.assert_close(found.log_prob.exp(), probs.mean(0), rtol=1e-10, atol=0)
        [values] = posterior.latents().values()
        assert values.shape[0] == 5

    def test_threads_share_one_network(self, path, tmp_path):
        posterior = posterior_of(path, models.pairs(4))
        network = posterior.network_draws.network
        plain = network.collate(network.tokenize(PROMPTS, ["w1 w2", "w3", "w4 w39"]))
        before, pointers, hooks = network.theta(), [p.data_ptr() for p in network.parameters()], hooks_of(network)

        def predict(_):
            return posterior.predict(PROMPTS, CANDIDATES).draws

        def reward(_):
            with torch.no_grad():
                return network(**plain)

        def jacobian(_):
            return per_sample_jacobian(network, plain)[1]

        def save(number):
            return [f.name for f in posterior.save_adapter_draws(tmp_path / str(number), 2)]

        tasks = (predict, reward, jacobian, save)
        alone = [task("alone") for task in tasks]
        with ThreadPoolExecutor(4) as pool:
            together = [[pool.submit(task, i) for task in tasks] for i in range(6)]
            found = [[future.result() for future in row] for row in together]
        assert alone[0].std() > 0.05
        for row in found:
            for ours, theirs in zip(row[:3], alone[:3], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert row[3] == alone[3]
        assert torch.equal(network.theta(), before)
        assert [p.data_ptr() for p in network.parameters()] == pointers
        assert all(p.requires_grad for p in network.sites.values())
        assert hooks_of(network) == hooks
        weights = [(tmp_path / folder / "draw-001/adapter_model.safetensors").read_bytes() for folder in ("alone", "5")]
        assert weights[0] == weights[1]

    def test_arrays_are_refused_and_so_are_single_draws(self, path):
        data = models.pairs(4)
        posterior = posterior_of(path, data)
        with pytest.raises(ArgumentError, match="reads texts"):
            posterior.predict(candidates=[torch.zeros(2, 5)])
        with pytest.raises(ArgumentError, match="at least 2"):
            posterior_of(path, data, count=1)
        with pytest.raises(ArgumentError, match="one row of them"):
            dataclasses.replace(posterior.network_draws, draws=torch.zeros(3, 7))
        model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        with pytest.raises(ArgumentError, match="NetworkDraws"):
            NetworkPosterior(model, posterior.schema, posterior.report, torch.zeros(3, 0))


READ = """
import json, sys
import bayesrm as brm
posterior = brm.Posterior.from_pretrained(sys.argv[1])
belief = posterior.predict(json.loads(sys.argv[2]), json.loads(sys.argv[3]))
print(json.dumps([belief.draws.tolist(), posterior.unconstrained_latents.tolist(), repr(posterior)]))
"""


class TestPersistence:
    def test_a_fresh_process_predicts_the_same(self, path, tmp_path):
        latents = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        data = models.pairs(4)
        posterior = posterior_of(path, data, latents=latents, likelihood=brm.likelihoods.Davidson(), layers=(1,))
        posterior.log_density = {"log_q": torch.randn(5, dtype=torch.float64), "log_prior": torch.zeros(5).double()}
        posterior.save_pretrained(tmp_path / "run")
        command = [sys.executable, "-c", READ, str(tmp_path / "run"), json.dumps(PROMPTS), json.dumps(CANDIDATES)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        draws, stored, shown = json.loads(done.stdout.splitlines()[-1])
        expected = posterior.predict(PROMPTS, CANDIDATES).draws
        torch.testing.assert_close(torch.tensor(draws, dtype=torch.float64), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.tensor(stored, dtype=torch.float64), latents, rtol=0, atol=0)
        assert "SVI" in shown
        again = Posterior.from_pretrained(tmp_path / "run")
        assert again.program.prior.precision == 4.0
        assert math.isnan(again.report.gradient_norm)
        assert torch.equal(again.log_density["log_q"], posterior.log_density["log_q"])
        assert torch.equal(again.network_draws.draws, posterior.network_draws.draws)
        assert again.network_draws._forward.num_shared_layers == 1
        theirs, ours = (p.network_draws.network.initial_theta() for p in (again, posterior))
        assert torch.equal(theirs, ours)

    def test_plain_peft_loads_every_draw(self, path, tmp_path):
        posterior = posterior_of(path, models.pairs(4))
        network = posterior.network_draws.network
        before = network.theta()
        folders = posterior.save_adapter_draws(tmp_path, 3)
        assert [f.name for f in folders] == ["draw-000", "draw-001", "draw-002"]
        assert torch.equal(network.theta(), before)
        batch = network.collate(network.tokenize(PROMPTS, ["w1 w2", "w3", "w4 w39"]))
        expected = MemberForward(network, posterior.network_draws.draws[[0, 2, 4]])(batch)
        for folder, rewards in zip(folders, expected.T, strict=True):
            base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
            plain = peft.PeftModel.from_pretrained(base, folder).eval()
            with torch.no_grad():
                torch.testing.assert_close(plain(**batch).logits[:, 0], rewards, rtol=0, atol=1e-6)
        with pytest.raises(ArgumentError, match="num_samples"):
            posterior.save_adapter_draws(tmp_path, 0)


class TestLayers:
    def test_only_the_layers_named_get_adapters(self, path):
        network = LoRA(path, rank=2, layers=(1,)).load(0)
        adapted = [site for site in network.sites if "lora" in site]
        assert adapted
        assert all(".layer.1." in site for site in adapted)
        config = network.settings.to_config()
        assert LoRA.from_config(json.loads(json.dumps(config))) == network.settings
        del config["layers"]
        assert LoRA.from_config(config).layers is None

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"layers": ()}, "layers"),
            ({"layers": (-1,)}, "at least 0"),
            ({"layers": (1,), "target_modules": "all-linear"}, "target_modules"),
        ],
    )
    def test_bad_layers(self, settings, named):
        with pytest.raises(ArgumentError, match=named):
            LoRA("any/model", **settings)

    def test_a_layer_that_is_not_there(self, path):
        with pytest.raises(ArgumentError, match=r"`layers` names 2.*0 to 1"):
            LoRA(path, layers=(1, 2)).load(0)

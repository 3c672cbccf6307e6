import copy
import json
from pathlib import Path

import numpy as np
import peft
import pyro.poutine as poutine
import pytest
import torch
import transformers

import bayesrm as brm
from bayesrm.errors import ArgumentError, DataError, EngineError
from bayesrm.rewards import LoRA, lora_network
from bayesrm.rewards.jacobians import per_sample_jacobian

from . import lora_models as models

DECODERS = ("gpt2", "llama")


@pytest.fixture(scope="module", params=sorted(models.FAMILIES))
def family(request, tmp_path_factory):
    return request.param, models.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def moved(network, scale=0.3, seed=0):
    """The network with weights away from their initialisation, where rewards and all derivatives are alive."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(network.num_parameters, generator=generator)
    network.set_theta(network.theta() + scale * noise)
    return network


class TestNetwork:
    def test_rewards_are_zero_at_the_prior_mean_and_adapters_and_head_are_the_parameters(self, family):
        _, path = family
        network = LoRA(path, rank=3).load(0)
        batch = network.collate(network.tokenize(*models.texts(4)))
        assert torch.equal(network(**batch), torch.zeros(4))
        trainable = {id(p) for p in network.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in network.sites.values()}
        assert {s.rsplit(".", 1)[-1] for s in network.sites} <= {"lora_A", "lora_B", "weight", "bias"}
        assert network.theta().shape == network.initial_theta().shape == (network.num_parameters,)
        assert torch.equal(network.theta(), network.initial_theta())

    def test_a_sequence_has_the_same_reward_alone_and_in_any_company(self, family):
        _, path = family
        network = moved(LoRA(path, rank=3, dtype="float64").load(0))
        sequences = network.tokenize(*models.texts(6))
        assert len({len(s) for s in sequences}) > 2
        together = network(**network.collate(sequences))
        alone = torch.cat([network(**network.collate([s])) for s in sequences])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
        assert together.std() > 0.05

    def test_training_in_parts_of_like_length_changes_neither_rewards_nor_gradients(self, family, monkeypatch):
        name, path = family
        side = "left" if name in DECODERS else "right"
        network = moved(LoRA(path, rank=3, dtype="float64", padding_side=side).load(0))
        batch = network.collate(network.tokenize(*models.texts(6)))
        weights = torch.arange(1.0, 7.0, dtype=torch.float64)

        def gradients():
            found = torch.autograd.grad((network(**batch) * weights).sum(), list(network.sites.values()))
            return torch.cat([g.reshape(-1) for g in found])

        expected, expected_gradients = network(**batch), gradients()
        widths = []
        network.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        monkeypatch.setitem(lora_network._LEAST_TOKENS, "cpu", 1)
        monkeypatch.setattr(lora_network, "_WORTHWHILE", 1.0)
        network.train()
        torch.testing.assert_close(network(**batch), expected, rtol=0, atol=1e-12)
        assert len(set(widths)) > 1
        torch.testing.assert_close(gradients(), expected_gradients, rtol=1e-10, atol=1e-10)

    def test_left_and_right_padding_agree_for_decoders_and_left_is_refused_for_others(self, family):
        name, path = family
        if name not in DECODERS:
            with pytest.raises(ArgumentError, match="padding_side"):
                LoRA(path, padding_side="left").load(0)
            return
        right, left = (moved(LoRA(path, rank=3, padding_side=s, dtype="float64").load(0)) for s in ("right", "left"))
        sequences = right.tokenize(*models.texts(6))
        torch.testing.assert_close(
            right(**right.collate(sequences)), left(**left.collate(sequences)), rtol=0, atol=1e-12
        )

    def test_the_same_seed_gives_the_same_network_and_leaves_the_global_generator_alone(self, family):
        _, path = family
        before = torch.get_rng_state()
        one, same, other = (LoRA(path).load(seed).theta() for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_copies_have_weights_and_a_lock_of_their_own(self, tmp_path):
        network = moved(LoRA(models.bert(tmp_path), rank=2).load(0))
        other = copy.deepcopy(network)
        batch = network.collate(network.tokenize(*models.texts(3)))
        expected = network(**batch)
        torch.testing.assert_close(other(**batch), expected, rtol=0, atol=0)
        assert other.lock is not network.lock
        other.set_theta(other.initial_theta())
        assert torch.equal(other(**batch), torch.zeros(3))
        torch.testing.assert_close(network(**batch), expected, rtol=0, atol=0)
        assert "lock" not in network.state_dict()

    def test_plain_peft_loads_the_adapter_with_its_head(self, family, tmp_path):
        _, path = family
        network = moved(LoRA(path, rank=3).load(0))
        network.save_adapter(tmp_path)
        batch = network.collate(network.tokenize(*models.texts(5)))
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        base.config.pad_token_id = network.model.config.pad_token_id
        plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).logits[:, 0], network(**batch), rtol=0, atol=1e-6)

    def test_an_adapter_trained_elsewhere_is_the_start_and_its_prior_mean_rewards_nothing(self, family, tmp_path):
        _, path = family
        first = moved(LoRA(path, rank=3).load(0))
        first.save_adapter(tmp_path)
        again = LoRA(path, adapter=str(tmp_path)).load(5)
        assert torch.equal(again.theta(), first.theta())
        again.set_theta(again.initial_theta())
        assert torch.equal(again(**again.collate(again.tokenize(*models.texts(3)))), torch.zeros(3))
        for site, value in again.initial.items():
            if site.endswith("lora_A"):
                assert torch.equal(value, first.sites[site].detach())

    def test_an_adapter_without_a_head_is_refused(self, tmp_path):
        path = models.bert(tmp_path / "base")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
        with pytest.raises(ArgumentError, match="saved without 'classifier'"):
            LoRA(path, adapter=str(tmp_path / "adapter")).load(0)

    def test_a_head_that_the_checkpoint_brings_is_kept(self, tmp_path):
        path = models.llama(tmp_path / "base")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
        model.save_pretrained(tmp_path / "rm")
        transformers.AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "rm")
        network = LoRA(str(tmp_path / "rm")).load(0)
        assert torch.equal(network.initial["score.weight"], model.score.weight.detach())
        moved(network).save_adapter(tmp_path / "adapter")
        trained = LoRA(str(tmp_path / "rm"), adapter=str(tmp_path / "adapter")).load(0)
        assert torch.equal(trained.theta(), network.theta())
        assert torch.equal(trained.initial["score.weight"], model.score.weight.detach())


class TestSequences:
    def test_decoders_end_every_sequence_with_the_token_where_the_reward_is_read(self, tmp_path):
        network = LoRA(models.gpt2(tmp_path)).load(0)
        sequences = network.tokenize(["w1 w2", ""], ["w3", "w4 w5"])
        assert [s[-1] for s in sequences] == [4, 4]
        assert [(s == 4).sum() for s in sequences] == [1, 1]
        assert network.model.config.pad_token_id != 4

    def test_long_texts_lose_the_start_of_the_prompt_or_are_refused_by_name(self, tmp_path):
        path = models.bert(tmp_path)
        long = " ".join(["w1"] * 30)
        [sequence] = LoRA(path, max_length=12).load(0).tokenize([long], ["w7 w8"])
        assert len(sequence) == 12
        with pytest.raises(DataError, match="item 3"):
            LoRA(path, max_length=12, on_long="raise").load(0).tokenize([long], ["w7"], start=3)

    def test_a_second_end_of_sequence_in_a_text_for_an_encoder_decoder_names_the_item(self, tmp_path):
        network = LoRA(models.t5(tmp_path)).load(0)
        with pytest.raises(DataError, match="item 1: the text holds 1 end-of-sequence"):
            network.tokenize(["w1", "w1"], ["w2", "w2 <eos> w3"])

    def test_items_of_comparisons_are_tokenized_once_each(self, tmp_path):
        network = LoRA(models.bert(tmp_path)).load(0)
        data = models.pairs(7)
        sequences = network.tokenize_items(data)
        assert len(sequences) == data.num_items == 14
        prompt, response = data.text(3)
        assert np.array_equal(sequences[3], network.tokenize([prompt], [response])[0])


class TestJacobian:
    @pytest.mark.parametrize("padding", ["ragged", "even"])
    def test_equals_torch_func(self, family, padding):
        name, path = family
        network = moved(LoRA(path, rank=3, dtype="float64", attention="eager" if name == "t5" else None).load(0))
        sequences = network.tokenize(*models.texts(5))
        if padding == "even":
            sequences = [s for s in sequences if len(s) == len(sequences[0])]
        batch = network.collate(sequences)
        rewards, jacobian = per_sample_jacobian(network, batch)
        torch.testing.assert_close(rewards, network(**batch).detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(jacobian, reference_jacobian(network, batch), rtol=0, atol=1e-10)
        assert all(p.requires_grad and p.grad is None for p in network.sites.values())

    def test_float32_is_within_1e_5_of_torch_func(self, family):
        _, path = family
        network = moved(LoRA(path, rank=3).load(0))
        batch = network.collate(network.tokenize(*models.texts(5)))
        exact = reference_jacobian(network, batch)
        assert (per_sample_jacobian(network, batch)[1] - exact).abs().max() <= 1e-5 * exact.abs().max()

    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
    def test_gradient_checkpointing_changes_nothing(self, name, tmp_path):
        path = models.FAMILIES[name](tmp_path)
        plain, saving = (moved(LoRA(path, rank=3, gradient_checkpointing=on).load(0)) for on in (False, True))
        batch = plain.collate(plain.tokenize(*models.texts(5)))
        for one, other in zip(per_sample_jacobian(plain, batch), per_sample_jacobian(saving, batch), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_checkpointing_recomputes_activations(self, tmp_path):
        network = moved(LoRA(models.bert(tmp_path), gradient_checkpointing=True).load(0))
        calls = []
        layer = next(m for n, m in network.named_modules() if n.endswith("layer.0.attention.self.query.base_layer"))
        layer.register_forward_hook(lambda *_: calls.append(1))
        per_sample_jacobian(network, network.collate(network.tokenize(*models.texts(2))))
        assert len(calls) == 2

    def test_bfloat16_weights_give_float32_derivatives_of_the_rounded_network(self, tmp_path):
        path = models.llama(tmp_path)
        network = moved(LoRA(path, rank=3, dtype="bfloat16").load(0))
        batch = network.collate(network.tokenize(*models.texts(4)))
        rewards, jacobian = per_sample_jacobian(network, batch)
        assert rewards.dtype == jacobian.dtype == torch.float32
        assert network.model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        # The same rounded weights, computed in float32: what is left is the rounding of activations.
        exact = moved(LoRA(path, rank=3).load(0))
        for p in exact.model.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16().float()
        reference = per_sample_jacobian(exact, batch)[1]
        # bfloat16 rounds to 2^-8 relative; some twenty roundings lie on the way through two layers and back.
        assert (jacobian - reference).norm() <= 20 * 2**-8 * reference.norm()

    def test_the_sites_asked_for_are_the_columns_returned(self, tmp_path):
        network = moved(LoRA(models.roberta(tmp_path), rank=3).load(0))
        batch = network.collate(network.tokenize(*models.texts(3)))
        whole = per_sample_jacobian(network, batch)[1]
        sizes = [p.numel() for p in network.sites.values()]
        parts = dict(zip(network.sites, whole.split(sizes, dim=1), strict=True))
        chosen = network.last_layer_sites
        assert chosen == ("classifier.out_proj.weight", "classifier.out_proj.bias")
        some = per_sample_jacobian(network, batch, sites=chosen)[1]
        torch.testing.assert_close(some, torch.cat([parts[s] for s in chosen], dim=1), rtol=0, atol=1e-7)

    def test_modules_without_known_derivatives_are_refused_by_name(self, tmp_path):
        network = LoRA(models.bert(tmp_path), target_modules=("word_embeddings",)).load(0)
        with pytest.raises(EngineError, match="word_embeddings"):
            per_sample_jacobian(network, network.collate(network.tokenize(*models.texts(2))))


def reference_jacobian(network, batch):
    values = {site: p.detach() for site, p in network.sites.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = torch.func.jacrev(lambda p: network.apply_parameters(p, batch))(values)
    return torch.cat([found[site].reshape(len(found[site]), -1) for site in network.sites], dim=1)


class TestProgram:
    def test_the_program_on_a_network_scores_parameters_and_feedback(self, tmp_path):
        network = moved(LoRA(models.bert(tmp_path), dtype="float64").load(0))
        data = models.pairs(6)
        prior = brm.priors.Gaussian({"*lora_*": 2.0, "*": 0.5})
        model = brm.RewardModel(network, brm.likelihoods.BradleyTerry(), prior)
        batch = network.collate(network.tokenize_items(data))
        live = {f"reward.{site}": p.detach() for site, p in network.sites.items()}
        trace = poutine.trace(poutine.condition(model, data=live)).get_trace(batch, data.groups())
        r = network(**batch).detach()
        [group] = data.groups()
        expected = torch.nn.functional.logsigmoid(r[group.items[:, 0]] - r[group.items[:, 1]]).sum()
        for site, p in network.sites.items():
            scale = model.prior.of(site) ** -0.5
            expected += torch.distributions.Normal(network.initial[site], scale).log_prob(p.detach()).sum()
        torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-12, atol=0)

    def test_settings_alone_cannot_be_run(self, tmp_path):
        model = brm.RewardModel(LoRA(models.bert(tmp_path)), brm.likelihoods.BradleyTerry())
        with pytest.raises(ArgumentError, match="settings alone"):
            model(torch.zeros(2, 3), [])
        with pytest.raises(ArgumentError, match=r"posterior\.program"):
            model.simulate(models.pairs(3), seed=0)


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("rank", 0), ("alpha", -1.0), ("dropout", 1.0), ("max_length", 0), ("padding_side", "middle"),
         ("dtype", "int8"), ("on_long", "drop"), ("device", "abacus"), ("target_modules", ()), ("model", "")],
    )  # fmt: skip
    def test_bad_values_name_the_argument(self, name, value):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            LoRA(**({"model": "any/model"} | {name: value}))

    def test_unknown_targets_list_the_modules_there_are(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"target_modules.*query"):
            LoRA(models.bert(tmp_path), target_modules=("nonsense",)).load(0)

    def test_a_folder_without_a_model_and_an_adapter_of_another_kind_are_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ArgumentError, match="`model`"):
            LoRA(str(tmp_path / "empty")).load(0)
        path = models.bert(tmp_path / "bert")
        with pytest.raises(ArgumentError, match="`adapter`"):
            LoRA(path, adapter=str(tmp_path / "empty")).load(0)

    def test_a_checkpoint_that_lacks_weights_is_refused(self, tmp_path):
        path = Path(models.llama(tmp_path))
        config = json.loads((path / "config.json").read_text())
        config["num_hidden_layers"] = 3
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArgumentError, match="lacks weights"):
            LoRA(str(path)).load(0)

    def test_config_round_trip(self):
        lora = LoRA("any/model", rank=4, target_modules=("q", "v"))
        assert LoRA.from_config(json.loads(json.dumps(lora.to_config()))) == lora

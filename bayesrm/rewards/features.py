"""Fixed features of texts: pooled hidden states of a pretrained language model."""

import contextlib
import dataclasses
import enum
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Float32, Integer
from tqdm import tqdm

from ..data.comparisons import Comparisons
from ..data.rendering import Content, render, shorten
from ..errors import ArgumentError, DataError, PersistenceError
from .feature_cache import FeatureCache, default_cache_dir, embedding_key, model_digest, model_files

#: Stands between a prompt and a response that are plain strings and are read as one sequence.
SEPARATOR = "\n\n"

#: Items whose texts and tokens are in memory at one time.
_CHUNK = 4096
#: Longest time for which finished embeddings wait to be written, in seconds: what a killed run may lose.
_WRITE_SECONDS = 2.0
#: Families that count positions from `pad_token_id + 1`, and so read fewer tokens than they have positions.
_OFFSET_POSITIONS = ("roberta", "camembert", "mpnet", "longformer", "xmod", "ibert", "data2vec-text")
_DTYPES = ("float32", "float64", "float16", "bfloat16")


class TextInput(enum.StrEnum):
    """What of an item a block of features describes."""

    JOINT = "joint"
    """Prompt and response in one sequence: by the chat template for messages, joined by `SEPARATOR` for strings."""
    RESPONSE = "response"
    """The response alone."""
    PROMPT = "prompt"
    """The prompt alone; zeros where it is empty."""
    PRODUCT = "product"
    """Elementwise product of the unit-length embeddings of prompt and response, times the root of their dimension."""
    LENGTH = "length"
    """One column, log((words + 1) / 100), of the whitespace-separated words of the response."""


class Pooling(enum.StrEnum):
    """How the hidden states of a sequence become one vector; padding never enters."""

    MEAN = "mean"
    """Mean over all tokens, special ones included."""
    CLS = "cls"
    """The first token: for encoders trained with a classification token."""
    LAST = "last"
    """The last token: for decoders, where it alone has seen the whole text."""
    MAX = "max"
    """Largest value of each coordinate over all tokens."""


@dataclasses.dataclass(frozen=True)
class ExtractionReport:
    """What an extraction did.

    Attributes:
        num_texts: Distinct token sequences that the items needed. A prompt shared by neighbouring items counts once.
        num_cached: How many of those were on disk already; the others went through the model.
        num_shortened_prompt: Items whose prompt lost tokens at its start because the text was too long.
        num_shortened_response: Items whose response, too long by itself, lost tokens at its end.
        seconds: Wall-clock time.
    """

    num_texts: int = 0
    num_cached: int = 0
    num_shortened_prompt: int = 0
    num_shortened_response: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class _Chunk:
    """Token sequences of some items: each distinct one once, and where the items use it (-1: empty prompt)."""

    start: int
    words: list[int]
    sequences: list[np.ndarray] = dataclasses.field(default_factory=list)
    first_item: list[int] = dataclasses.field(default_factory=list)
    uses: dict[TextInput, list[int]] = dataclasses.field(default_factory=dict)
    shortened: dict[str, set[int]] = dataclasses.field(default_factory=lambda: {"prompt": set(), "response": set()})


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """Turns prompts and responses into fixed feature vectors with a pretrained language model.

    Any encoder, decoder or encoder-decoder (its encoder) that `transformers.AutoModel` loads will do. The object holds
    settings only; tokenizer and model load when first needed, the model not at all when every text is in the cache. It
    keeps the model that it loaded: after a change of the files, make a new extractor.

    A sequence gets the special tokens of the tokenizer unless a chat template wrote them already. Prompt and response
    are tokenized separately, so that the place where they meet is known when the text must be shortened. Sequences are
    padded on the right whatever the tokenizer prefers, which is exact for causal and for masked attention. Features do
    not depend on what else is in a batch (to about 1e-5 in float32). Embeddings are cached by token sequence, before
    normalization: extractors that differ only in `inputs`, `normalize`, `batch_size` or `max_length` share what they
    have in common.

    Args:
        model: Folder of a model, or its id on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        inputs: Blocks of features (`TextInput`), concatenated in this order.
        pooling: How tokens become one vector (`Pooling`).
        max_length: Most tokens of a sequence, special ones included; lowered to what the model can read.
        normalize: Scale every embedding block to length `sqrt(dimension)`, so that its entries are of order one.
            Without it, a `PRODUCT` block has a length of order one, and the others the length that the model gives.
        layer: Index into the hidden states: 0 is the input embedding, -1 the last layer.
        batch_size: Sequences that go through the model together.
        device: Where the model runs (`"cuda:1"`); by default a GPU if there is one.
        dtype: Number format of the model: `"float32"`, `"float64"`, `"float16"` or `"bfloat16"`. Features are float32.
        cache_dir: Folder of the cache; `None` for `$BAYESRM_CACHE` or `~/.cache/bayesrm/features`, `False` for none.
        on_long: `"shorten"` cuts the start of the prompt, then the end of the response, and the report counts it;
            `"raise"` refuses, before any text is embedded.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ArgumentError: A setting has a value that cannot be used. Whether the model exists shows when first needed.

    Example:
        >>> from bayesrm.rewards.features import FeatureExtractor
        >>> lengths = FeatureExtractor("any/model", inputs=("length",))  # needs no model
        >>> lengths.extract(["How are you?"], ["word " * 99]).tolist()
        [[0.0]]
        >>> lengths.num_features
        1
    """

    model: str | os.PathLike[str]
    _: dataclasses.KW_ONLY
    revision: str | None = None
    inputs: Sequence[str] = ("joint",)
    pooling: str = "mean"
    max_length: int = 512
    normalize: bool = False
    layer: int = -1
    batch_size: int = 32
    device: str | None = None
    dtype: str = "float32"
    cache_dir: str | os.PathLike[str] | Literal[False] | None = None
    on_long: str = "shorten"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        model = self.model
        if not isinstance(model, str | os.PathLike) or not os.fspath(model):
            raise ArgumentError(f"`model` must be a folder or a hub id, got {model!r}")
        inputs = (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs)
        inputs = tuple(_member(TextInput, "inputs", value) for value in inputs)
        if not inputs or len(set(inputs)) < len(inputs):
            raise ArgumentError(
                f"`inputs` must name at least one kind and each at most once, got {list(map(str, inputs))}"
            )
        for name, smallest in (("max_length", 1), ("batch_size", 1), ("layer", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (smallest is not None and value < smallest):
                kind = "an integer" if smallest is None else f"an integer of at least {smallest}"
                raise ArgumentError(f"`{name}` must be {kind}, got {value!r}")
        _one_of("dtype", self.dtype, _DTYPES)
        _one_of("on_long", self.on_long, ("shorten", "raise"))
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ArgumentError(
                    f'`device` must be None or a torch device such as "cuda:0", got {self.device!r}'
                ) from error
        cache_dir = self.cache_dir
        if not (cache_dir is None or cache_dir is False or (cache_dir and isinstance(cache_dir, str | os.PathLike))):
            raise ArgumentError(
                f"`cache_dir` must be a folder, None (the default one) or False (no cache), got {cache_dir!r}"
            )
        settled = {
            "model": os.fspath(model),
            "inputs": inputs,
            "pooling": _member(Pooling, "pooling", self.pooling),
            "device": None if self.device is None else str(self.device),
            "cache_dir": os.fspath(cache_dir) if cache_dir else cache_dir,
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_features(self) -> int:
        """Number of columns of the features.

        Raises:
            ArgumentError: The model's settings cannot be read.
        """
        return sum(1 if kind == TextInput.LENGTH else self._width for kind in self.inputs)

    @property
    def report(self) -> ExtractionReport:
        """What the last finished extraction did; all zeros before the first."""
        report: ExtractionReport = self.__dict__.get("_report", ExtractionReport())
        return report

    @property
    def cache_path(self) -> Path | None:
        """File of the cache, `None` without one; deleting it clears the cache.

        Raises:
            ArgumentError: The model's settings cannot be read.
        """
        if self.cache_dir is False:
            return None
        folder = default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser()
        name, identity, _ = self._source
        return folder / f"{name}-{xxhash.xxh3_128_hexdigest(identity.encode())[:16]}.sqlite"

    def to_config(self) -> dict[str, Any]:
        """Returns the settings as JSON values, for `from_config`."""
        return self.__getstate__() | {"inputs": [str(kind) for kind in self.inputs], "pooling": str(self.pooling)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FeatureExtractor":
        """Makes the extractor that `to_config` described.

        Raises:
            ArgumentError: A setting is unknown, missing or cannot be used.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(config) - set(names)):
            raise ArgumentError(f"`config` has unknown settings {unknown}; known are {names}")
        if "model" not in config:
            raise ArgumentError("`config` must name a `model`")
        return cls(**config)

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> Float32[np.ndarray, "items features"]:
        """Computes the features of prompts and responses, in their order.

        Args:
            prompts: One for each item: a string (may be empty) or messages.
            responses: One for each item: a string or messages, not empty.
            progress: Show a progress bar.

        Returns:
            Features, shape `(items, num_features)`, float32.

        Raises:
            ArgumentError: The lengths differ, or the model cannot be used.
            DataError: A text cannot be used: not text, an empty response, or too long with `on_long="raise"`. The
                message names the item by its position.
            PersistenceError: The cache cannot be used, or the model's files changed in the meantime.

        Example:
            >>> extractor = FeatureExtractor("any/model", inputs=("length",))
            >>> extractor.extract(["Name a colour.", ""], [[{"role": "assistant", "content": "Red"}], "Blue"]).shape
            (2, 1)
        """
        for name, texts in (("prompts", prompts), ("responses", responses)):
            if isinstance(texts, str):
                raise ArgumentError(
                    f"`{name}` must be a sequence with one text for each item, got one string; put it in a list"
                )
        if len(prompts) != len(responses):
            raise ArgumentError(
                f"`prompts` and `responses` must have the same length, got {len(prompts)} and {len(responses)}"
            )
        for item, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            _check(item, prompt, response)
        return self._run(len(prompts), lambda items: [(prompts[i], responses[i]) for i in items], progress)

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> Float32[np.ndarray, "items features"]:
        """Computes the features of the unique items of comparisons; see `extract`.

        Texts are read in chunks, never all at once.

        Args:
            data: The comparisons.
            progress: Show a progress bar.

        Returns:
            Features, shape `(data.num_items, num_features)`, float32: what `data.with_features` takes.

        Raises:
            ArgumentError: The model cannot be used.
            DataError: A text cannot be used; the message names the item.
            PersistenceError: The cache cannot be used, or the model's files changed in the meantime.
        """

        def read(items: range) -> list[tuple[Content, Content]]:
            pairs = [data.text(item) for item in items]
            for item, (prompt, response) in zip(items, pairs, strict=True):
                _check(item, prompt, response)
            return pairs

        return self._run(data.num_items, read, progress)

    def _run(
        self, num_items: int, read: Callable[[range], list[tuple[Content, Content]]], progress: bool
    ) -> Float32[np.ndarray, "items features"]:
        started = time.perf_counter()
        chunks = [range(start, min(start + _CHUNK, num_items)) for start in range(0, num_items, _CHUNK)]
        features = np.zeros((num_items, self.num_features), dtype=np.float32)
        if self.on_long == "raise":
            for items in chunks:
                self._plan(items, read(items))
        num_texts = num_cached = num_prompt = num_response = 0
        with self._cache() as cache, tqdm(total=num_items, unit="item", disable=not progress) as bar:
            for items in chunks:
                chunk = self._plan(items, read(items))
                embeddings, cached = self._embeddings(chunk, cache, bar)
                self._assemble(chunk, embeddings, features[items.start : items.stop])
                num_texts += len(chunk.sequences)
                num_cached += cached
                num_prompt += len(chunk.shortened["prompt"])
                num_response += len(chunk.shortened["response"])
                bar.update(items.stop - bar.n)
        seconds = time.perf_counter() - started
        # The report belongs to the last call, not to the settings that a frozen dataclass compares.
        self.__dict__["_report"] = ExtractionReport(num_texts, num_cached, num_prompt, num_response, seconds)
        return features

    def _plan(self, items: range, pairs: list[tuple[Content, Content]]) -> _Chunk:
        """Finds the distinct token sequences of some items."""
        chunk = _Chunk(items.start, [len(_plain(response).split()) for _, response in pairs])
        kinds = self._sequence_kinds
        if not kinds:
            return chunk
        rendered = [self._render(item, *pair) for item, pair in zip(items, pairs, strict=True)]
        joints = [
            prompt + SEPARATOR if prompt and isinstance(pair[0], str) and isinstance(pair[1], str) else prompt
            for (prompt, _), pair in zip(rendered, pairs, strict=True)
        ]
        texts = {response for _, response in rendered}
        texts.update(joints if TextInput.JOINT in kinds else ())
        texts.update((prompt for prompt, _ in rendered) if TextInput.PROMPT in kinds else ())
        tokens = self._tokenize(sorted(texts))
        known: dict[bytes, int] = {}
        for kind in kinds:
            chunk.uses[kind] = []
            for item, (prompt, response), joint in zip(items, rendered, joints, strict=True):
                if not len(tokens[response]):
                    raise DataError(
                        f"item {item}: no tokens are left of the response {response[:60]!r}; leave the item out"
                    )
                prompt_ids = tokens[{TextInput.JOINT: joint, TextInput.PROMPT: prompt}.get(kind, "")]
                response_ids = tokens["" if kind == TextInput.PROMPT else response]
                if not len(prompt_ids) + len(response_ids):
                    chunk.uses[kind].append(-1)
                    continue
                ids = self._sequence(prompt_ids, response_ids, kind, item, chunk)
                index = known.setdefault(ids.tobytes(), len(chunk.sequences))
                if index == len(chunk.sequences):
                    chunk.sequences.append(ids)
                    chunk.first_item.append(item)
                chunk.uses[kind].append(index)
        return chunk

    def _render(self, item: int, prompt: Content, response: Content) -> tuple[str, str]:
        try:
            return render(prompt, response, self._tokenizer)
        except DataError as error:
            raise DataError(f"item {item}: {error}") from error

    @property
    def _sequence_kinds(self) -> list[TextInput]:
        """The kinds of sequence that go through the model."""
        both = [TextInput.PROMPT, TextInput.RESPONSE]
        needed = [k for kind in self.inputs for k in (both if kind == TextInput.PRODUCT else [TextInput(kind)])]
        return [kind for kind in (TextInput.JOINT, *both) if kind in needed]

    def _sequence(
        self, prompt_ids: np.ndarray, response_ids: np.ndarray, kind: TextInput, item: int, chunk: _Chunk
    ) -> Integer[np.ndarray, "tokens"]:
        """Puts one sequence together: shortened where needed, each special token there once."""
        first, last = self._special_tokens
        prompt, response = prompt_ids.tolist(), response_ids.tolist()
        # A chat template writes the special tokens itself; they must neither be doubled nor be cut off.
        opening, closing = (prompt or response), (response or prompt)
        if first and opening[: len(first)] == first:
            del opening[: len(first)]
        if last and closing[-len(last) :] == last:
            del closing[-len(last) :]
        room, count = self._room, len(prompt) + len(response)
        if count > room and self.on_long == "raise":
            total, limit = count + len(first) + len(last), room + len(first) + len(last)
            raise DataError(
                f"item {item}: the {kind} text has {total} tokens, at most {limit} fit "
                f"(`max_length={self.max_length}`); "
                'raise `max_length` if the model can read more, shorten the text, or pass `on_long="shorten"`'
            )
        ids, shortened = shorten(prompt, response, room)
        if count > room:
            chunk.shortened[shortened.value].add(item)
        return np.array([*first, *ids, *last], dtype=np.int64)

    def _tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        found = {"": np.empty(0, np.int64)}
        if texts := [text for text in texts if text]:
            encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            found |= {text: np.array(ids, np.int64) for text, ids in zip(texts, encoded["input_ids"], strict=True)}
        return found

    def _embeddings(
        self, chunk: _Chunk, cache: FeatureCache | None, bar: "tqdm[Any]"
    ) -> tuple[Float32[np.ndarray, "rows width"], int]:
        """Reads or computes the embedding of every sequence, with a row of zeros at the end; counts those read."""
        settings = {"pooling": str(self.pooling), "layer": self.layer, "dtype": self.dtype}
        keys = [embedding_key(ids, settings) for ids in chunk.sequences]
        found = {} if cache is None else cache.get(keys)
        embeddings = np.zeros((len(keys) + 1, self._width if self._sequence_kinds else 0), dtype=np.float32)
        for index, key in enumerate(keys):
            if key in found:
                embeddings[index] = found[key]
        # Longest first: little padding, and too big a batch fails at once, not after an hour.
        missing = [index for index, key in enumerate(keys) if key not in found]
        missing.sort(key=lambda index: -len(chunk.sequences[index]))
        pending: dict[bytes, np.ndarray] = {}
        written, items_before = time.monotonic(), bar.n
        try:
            for start in range(0, len(missing), self.batch_size):
                batch = missing[start : start + self.batch_size]
                embeddings[batch] = self._embed([chunk.sequences[index] for index in batch])
                for index in batch:
                    if not np.isfinite(embeddings[index]).all():
                        raise DataError(
                            f"item {chunk.first_item[index]}: the model {self.model!r} gives features that are not "
                            f'finite in `dtype="{self.dtype}"`; pass another `dtype`, or check the weights'
                        )
                pending |= {keys[index]: embeddings[index] for index in batch}
                if cache is not None and time.monotonic() - written >= _WRITE_SECONDS:
                    cache.put(pending)
                    pending, written = {}, time.monotonic()
                done = (len(keys) - len(missing) + start + len(batch)) / len(keys)
                bar.update(items_before + int(done * len(chunk.words)) - bar.n)
        finally:
            if cache is not None and pending:
                cache.put(pending)
        return embeddings, len(keys) - len(missing)

    def _embed(self, sequences: list[np.ndarray]) -> Float32[np.ndarray, "sequences width"]:
        """Puts one padded batch through the model."""
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        network = self._network
        device = next(network.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        with torch.inference_mode():
            if self.layer == -1:
                hidden = network(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                hidden = network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
                    self.layer
                ]
            pooled = pool(hidden if self.dtype == "float64" else hidden.float(), mask.bool(), self.pooling)
        if pooled.shape[1] != self._width:
            raise ArgumentError(
                f"`model` {self.model!r}: hidden states have width {pooled.shape[1]}, its settings say {self._width}; "
                "choose another model or `layer`"
            )
        return pooled.float().cpu().numpy()

    def _assemble(self, chunk: _Chunk, embeddings: np.ndarray, out: np.ndarray) -> None:
        """Writes the blocks of features of a chunk side by side into `out`."""
        blocks = {kind: embeddings[np.array(indices)] for kind, indices in chunk.uses.items()}
        column = 0
        for name in self.inputs:
            kind = TextInput(name)
            if kind == TextInput.LENGTH:
                block = np.log((np.array(chunk.words)[:, None] + 1) / 100)
            elif kind == TextInput.PRODUCT:
                scale = math.sqrt(self._width)
                block = _unit(blocks[TextInput.PROMPT]) * _unit(blocks[TextInput.RESPONSE]) * scale
            else:
                block = blocks[kind]
            if self.normalize and kind != TextInput.LENGTH:
                block = _unit(block) * math.sqrt(self._width)
            out[:, column : column + block.shape[1]] = block
            column += block.shape[1]

    @contextlib.contextmanager
    def _cache(self) -> Iterator[FeatureCache | None]:
        path = self.cache_path if self._sequence_kinds else None
        if path is None:
            yield None
        else:
            with FeatureCache(path, width=self._width) as cache:
                yield cache

    @cached_property
    def _folder(self) -> Path | None:
        """The folder of a local model, `None` for one on the hub."""
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if (folder / "adapter_config.json").exists():
                raise ArgumentError(
                    f"`model` {self.model!r} holds an adapter, not a whole model; merge it into its base model first "
                    "(`merge_and_unload` of peft) and save that"
                )
            return folder
        name = str(self.model)
        if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ArgumentError(
                f"`model` {self.model!r} is neither a folder that exists nor a hub id such as 'org/name'"
            )
        return None

    @property
    def _hub_arguments(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _load(self, loader: Any, what: str, **arguments: Any) -> Any:
        """Calls `from_pretrained` with errors that say what to do."""
        where = str(self._folder or self.model)
        try:
            return loader.from_pretrained(where, **self._hub_arguments, **arguments)
        except Exception as error:
            hint = (
                "the folder must hold a model and a tokenizer as `save_pretrained` writes them"
                if self._folder
                else "pass a local folder, or check the name and the connection (HF_HUB_OFFLINE=1 allows only what was "
                "downloaded before)"
            )
            reason = str(error).strip().split("\n")[0]
            raise ArgumentError(f"`model` {self.model!r}: cannot load its {what}; {hint}. Reason: {reason}") from error

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        config = self._load(AutoConfig, "settings (config.json)")
        whole = config if hasattr(config, "hidden_size") else config.get_text_config()
        count = whole.num_hidden_layers + 1
        if not -count <= self.layer < count:
            raise ArgumentError(
                f"`layer` must lie between {-count} and {count - 1} for {self.model!r} ({count - 1} layers and the "
                f"input embedding), got {self.layer}"
            )
        return whole if whole is config else _with_commit(whole, config)

    @cached_property
    def _width(self) -> int:
        return int(self._config.hidden_size)

    @cached_property
    def _source(self) -> tuple[str, str, dict[str, tuple[int, int]]]:
        """Readable name of the model, what identifies its weights, and the state of its files."""
        if self._folder is not None:
            # Listed first: a change while the contents are read then shows at loading.
            files = model_files(self._folder)
            return self._folder.resolve().name, model_digest(self._folder), files
        commit = getattr(self._config, "_commit_hash", None) or self.revision
        return str(self.model).replace("/", "--"), f"{self.model}@{commit}", {}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer, "tokenizer")

    @cached_property
    def _network(self) -> Any:
        from transformers import AutoModel

        files = self._source[2] if self.cache_dir is not False else None
        # New layers that a checkpoint lacks are drawn at random while loading.
        with torch.random.fork_rng(devices=[]), _quiet_loading():
            network, info = self._load(AutoModel, "weights", output_loading_info=True)
        if files is not None and self._folder is not None and model_files(self._folder) != files:
            raise PersistenceError(
                f"`model` {self.model!r}: its files changed while in use; make a new FeatureExtractor"
            )
        two_parts = bool(getattr(network.config, "is_encoder_decoder", False))
        missing = [
            k for k in info["missing_keys"] if "pooler" not in k and not (two_parts and k.startswith("decoder."))
        ]
        if missing:
            raise ArgumentError(
                f"`model` {self.model!r}: the checkpoint lacks weights, such as {min(missing)!r} ({len(missing)} "
                "in all), which would be random. Save the model again, or correct the architecture in its config.json"
            )
        network = network.get_encoder() if two_parts else network
        network.config.use_cache = False
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return network.to(device=device, dtype=getattr(torch, self.dtype)).eval()

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after a sequence, found by looking at one."""
        tokenizer = self._tokenizer
        ordinary = (token for token in sorted(tokenizer.get_vocab()) if token not in tokenizer.all_special_tokens)
        for probe in ("a", *ordinary):
            body = tokenizer(probe, add_special_tokens=False)["input_ids"]
            if body:
                whole = tokenizer(probe)["input_ids"]
                for start in range(len(whole) - len(body) + 1):
                    if whole[start : start + len(body)] == body:
                        return list(whole[:start]), list(whole[start + len(body) :])
                break
        raise ArgumentError(
            f"`model` {self.model!r}: its tokenizer changes the tokens of a text when it adds special ones; choose "
            "another model"
        )

    @cached_property
    def _room(self) -> int:
        """Tokens that fit beside the special ones."""
        config, special = self._config, sum(map(len, self._special_tokens))
        limit = min(self.max_length, self._tokenizer.model_max_length)
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            offset = any(family in config.model_type for family in _OFFSET_POSITIONS)
            limit = min(limit, positions - (config.pad_token_id + 1 if offset else 0))
        if limit <= special:
            raise ArgumentError(
                f"`max_length` must be at least {special + 1} for {self.model!r}, whose tokenizer adds {special} "
                f"special tokens, got {self.max_length}"
            )
        return int(limit - special)


def pool(
    hidden: Float[torch.Tensor, "batch tokens width"], mask: Bool[torch.Tensor, "batch tokens"], pooling: str
) -> Float[torch.Tensor, "batch width"]:
    """Pools hidden states over tokens.

    Args:
        hidden: Hidden states, shape `(batch, tokens, width)`, padded on the right.
        mask: True for tokens and False for padding, shape `(batch, tokens)`; at least one token a row.
        pooling: A `Pooling`.

    Returns:
        Shape `(batch, width)`.

    Example:
        >>> import torch
        >>> from bayesrm.rewards.features import pool
        >>> hidden, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
        >>> [pool(hidden, mask, kind).item() for kind in ("mean", "cls", "last", "max")]
        [2.0, 1.0, 3.0, 3.0]
    """
    kept = mask[:, :, None]
    kind = _member(Pooling, "pooling", pooling)
    if kind == Pooling.MEAN:
        # Set to zero, not multiplied: what a model computes for padding may be anything, NaN included.
        return hidden.masked_fill(~kept, 0.0).sum(dim=1) / kept.sum(dim=1)
    if kind == Pooling.CLS:
        return hidden[:, 0]
    if kind == Pooling.LAST:
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    return hidden.masked_fill(~kept, -torch.inf).amax(dim=1)


def _plain(text: Content) -> str:
    """The words of a text without roles or templates."""
    if isinstance(text, str):
        return text
    parts = []
    for message in text:
        content = message.get("content") or ""
        parts += [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    return " ".join(parts)


def _check(item: int, prompt: object, response: object) -> None:
    for name, text in (("prompt", prompt), ("response", response)):
        messages = isinstance(text, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in text
        )
        if not (isinstance(text, str) or messages):
            raise DataError(
                f"item {item}: the {name} must be a string or a list of messages with `role` and `content`, "
                f"got {type(text).__name__}"
            )
        if name == "response" and not _plain(text).strip():  # type: ignore[arg-type]
            raise DataError(f"item {item}: the response is empty; leave the item out")


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scales rows to length one; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return scaled


def _one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, map(str, accepted)))}, got {value!r}")


def _member(kind: Any, name: str, value: object) -> Any:
    _one_of(name, value, list(kind))
    return kind(value)


def _with_commit(part: Any, whole: Any) -> Any:
    part._commit_hash = getattr(whole, "_commit_hash", None)
    return part


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keeps the progress bars of `transformers` off while weights load, and leaves the setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

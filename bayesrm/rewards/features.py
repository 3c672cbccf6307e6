"""Fixed features of texts: pooled hidden states of a pretrained language model."""

import contextlib
import dataclasses
import enum
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from jaxtyping import Float32
from tqdm import tqdm

from ..data.comparisons import Comparisons
from ..data.rendering import Content
from ..errors import ArgumentError
from ._blocks import assemble, sequence_kinds
from ._checks import as_member, check_cache_dir, check_choice, check_columns, check_device, check_integer, check_item
from ._embedding import embed_chunk
from ._encoder import Encoder
from ._network_settings import DTYPES
from ._pooling import pool as pool
from ._sequences import SEPARATOR as SEPARATOR
from ._sequences import SequencePlanner
from .feature_cache import FeatureCache, default_cache_dir

#: Items whose texts and tokens are in memory at one time.
_CHUNK = 4096


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
        inputs = tuple(as_member(TextInput, "inputs", value) for value in inputs)
        if not inputs or len(set(inputs)) < len(inputs):
            raise ArgumentError(
                f"`inputs` must name at least one kind and each at most once, got {list(map(str, inputs))}"
            )
        check_integer("max_length", self.max_length, 1)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("layer", self.layer)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("on_long", self.on_long, ("shorten", "raise"))
        check_device(self.device)
        cache_dir = self.cache_dir
        check_cache_dir(cache_dir)
        settled = {
            "model": os.fspath(model),
            "inputs": inputs,
            "pooling": as_member(Pooling, "pooling", self.pooling),
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
        return sum(1 if kind == TextInput.LENGTH else self._encoder.width for kind in self.inputs)

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
        name, identity, _ = self._encoder.source
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
        check_columns(prompts, responses)
        for item, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            check_item(item, prompt, response)
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
                check_item(item, prompt, response)
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
                self._planner.plan(items, read(items))
        num_texts = num_cached = num_prompt = num_response = 0
        with self._cache() as cache, tqdm(total=num_items, unit="item", disable=not progress) as bar:
            for items in chunks:
                chunk = self._planner.plan(items, read(items))
                embeddings, cached = embed_chunk(self._encoder, chunk, cache, bar, batch_size=self.batch_size)
                rows = features[items.start : items.stop]
                assemble(self.inputs, chunk, embeddings, rows, normalize=self.normalize)
                num_texts += len(chunk.sequences)
                num_cached += cached
                num_prompt += len(chunk.shortened["prompt"])
                num_response += len(chunk.shortened["response"])
                bar.update(items.stop - bar.n)
        seconds = time.perf_counter() - started
        # The report belongs to the last call, not to the settings that a frozen dataclass compares.
        self.__dict__["_report"] = ExtractionReport(num_texts, num_cached, num_prompt, num_response, seconds)
        return features

    @contextlib.contextmanager
    def _cache(self) -> Iterator[FeatureCache | None]:
        path = self.cache_path if self._planner.kinds else None
        if path is None:
            yield None
        else:
            with FeatureCache(path, width=self._encoder.width) as cache:
                yield cache

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(
            str(self.model),
            revision=self.revision,
            pooling=self.pooling,
            layer=self.layer,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            watch_files=self.cache_dir is not False,
        )

    @cached_property
    def _planner(self) -> SequencePlanner:
        kinds = sequence_kinds(self.inputs)
        return SequencePlanner(self._encoder, kinds=kinds, max_length=self.max_length, on_long=self.on_long)

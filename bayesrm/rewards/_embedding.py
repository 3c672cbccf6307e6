"""Embeddings of token sequences: read from the cache, or computed in batches and written as the run goes on."""

import time
from typing import Any

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from ..errors import DataError
from ._encoder import Encoder
from ._sequences import Chunk
from .feature_cache import FeatureCache, embedding_key

#: Longest time for which finished embeddings wait to be written, in seconds: what a killed run may lose.
_WRITE_SECONDS = 2.0


def embed_chunk(
    encoder: Encoder, chunk: Chunk, cache: FeatureCache | None, bar: "tqdm[Any]", *, batch_size: int
) -> tuple[Float32[np.ndarray, "rows width"], int]:
    """Reads or computes the embedding of every sequence, with a row of zeros at the end; counts those read."""
    settings = {"pooling": str(encoder.pooling), "layer": encoder.layer, "dtype": encoder.dtype}
    keys = [embedding_key(ids, settings) for ids in chunk.sequences]
    found = {} if cache is None else cache.get(keys)
    # Without sequences to embed, not even the model's settings may be needed.
    embeddings = np.zeros((len(keys) + 1, encoder.width if chunk.uses else 0), dtype=np.float32)
    for index, key in enumerate(keys):
        if key in found:
            embeddings[index] = found[key]
    # Longest first: little padding, and too big a batch fails at once, not after an hour.
    missing = [index for index, key in enumerate(keys) if key not in found]
    missing.sort(key=lambda index: -len(chunk.sequences[index]))
    pending: dict[bytes, np.ndarray] = {}
    written, items_before = time.monotonic(), bar.n
    try:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            embeddings[batch] = encoder.embed([chunk.sequences[index] for index in batch])
            for index in batch:
                if not np.isfinite(embeddings[index]).all():
                    raise DataError(
                        f"item {chunk.first_item[index]}: the model {encoder.model!r} gives features that are not "
                        f'finite in `dtype="{encoder.dtype}"`; pass another `dtype`, or check the weights'
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

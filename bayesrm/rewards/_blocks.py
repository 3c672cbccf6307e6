"""Blocks of features, one for each `TextInput`, from the embeddings of token sequences."""

import math
from collections.abc import Sequence

import numpy as np

from ._sequences import Chunk, SequenceKind


def sequence_kinds(inputs: Sequence[str]) -> list[SequenceKind]:
    """The kinds of sequence that go through the model for the sake of `inputs`."""
    kinds: list[SequenceKind] = []
    if "joint" in inputs:
        kinds.append("joint")
    if "prompt" in inputs or "product" in inputs:
        kinds.append("prompt")
    if "response" in inputs or "product" in inputs:
        kinds.append("response")
    return kinds


def assemble(inputs: Sequence[str], chunk: Chunk, embeddings: np.ndarray, out: np.ndarray, *, normalize: bool) -> None:
    """Writes the blocks of features of a chunk side by side into `out`."""
    embedded: dict[str, np.ndarray] = {kind: embeddings[np.array(indices)] for kind, indices in chunk.uses.items()}
    scale = math.sqrt(embeddings.shape[1])
    column = 0
    for kind in inputs:
        if kind == "length":
            block = np.log((np.array(chunk.words)[:, None] + 1) / 100)
        elif kind == "product":
            block = _unit(embedded["prompt"]) * _unit(embedded["response"]) * scale
        else:
            block = embedded[kind]
        if normalize and kind != "length":
            block = _unit(block) * scale
        out[:, column : column + block.shape[1]] = block
        column += block.shape[1]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scales rows to length one; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return scaled

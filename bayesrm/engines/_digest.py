"""A digest of feedback, by which a posterior knows the data of its fit again."""

import numpy as np
import torch
import xxhash

from ..data import Comparisons


def feedback_digest(data: Comparisons) -> str:
    """Hex digest of who answered what about which items, texts and features included."""
    state = xxhash.xxh3_128()

    def add(array: object) -> object:
        values = array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
        state.update(str((values.dtype, values.shape)).encode())
        state.update(np.ascontiguousarray(values).tobytes())
        return array

    for group in data.groups():
        state.update(group.label.encode())
        group.map_arrays(add)
    add(data.prompt_of_item)
    for name in data.annotators:
        state.update(name.encode() + b"\0")
    for texts in (data._prompts, data._items):
        for i in range(len(texts)):
            text = texts[i].value.encode(errors="surrogatepass")
            state.update(f"{len(text)}:".encode() + text)
    for optional in (data.features, data.words):
        if optional is not None:
            add(optional)
    return state.hexdigest()

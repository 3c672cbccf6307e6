"""A digest of trajectories, by which a posterior knows the data of its fit again."""

import numpy as np
import xxhash

from ..data import Trajectories


def trajectory_digest(data: Trajectories) -> str:
    """Hex digest of the steps, of what is a demonstration, and of the preferences; names do not count."""
    state = xxhash.xxh3_128()
    for values in (data.states, data.actions, data.lengths, data.ended, data.demonstrated, data.preferences):
        state.update(str((values.dtype, values.shape)).encode())
        state.update(np.ascontiguousarray(values).tobytes())
    return state.hexdigest()

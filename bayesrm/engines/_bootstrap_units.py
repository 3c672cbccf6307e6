"""What the Bayesian bootstrap gives weights to."""

import numpy as np
from numpy.typing import NDArray

from ..data import Comparisons

#: Weights of fewer prompts than this move a posterior in too few directions.
_FEW_PROMPTS = 20


def bootstrap_units(data: Comparisons) -> NDArray[np.int64]:
    """The unit, from 0 on, that each row shares its weight with: its prompt, or where prompts are few the row itself.

    One weight for the single prompt of a tournament would make all its rows count more or less, and nothing else.
    """
    if data.num_prompts < _FEW_PROMPTS:
        return np.arange(len(data))
    return np.asarray(data.prompt_of_row, dtype=np.int64)

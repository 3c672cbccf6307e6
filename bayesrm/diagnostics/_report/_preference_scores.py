"""What stands for rewards where preferences between two responses are modelled and no reward of one is."""

import numpy as np
import torch

from ..._typing import Tensor
from ...beliefs import RewardBelief
from ...data import Comparisons
from ...engines import Posterior
from ...engines.posterior import _by_prompt
from ...rewards import PairwiseHead


def item_scores(posterior: Posterior, data: Comparisons) -> RewardBelief:
    """Belief about the mean score of each item against the items of its prompt, itself included, grouped by prompt.

    Without an intransitive part that is its reward less the mean of the prompt. The score is linear in the features of
    either response, so that the mean over the others is the score against their mean.
    """
    order, sizes = _by_prompt(data)
    features = _features(posterior, data)[order]
    others = torch.cat([part.mean(0, keepdim=True).expand(len(part), -1) for part in features.split(sizes)])
    return posterior._belief(_head(posterior).encode_pairs(features, others), sizes, None)


def row_scores(posterior: Posterior, data: Comparisons) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the score of each row's first response against its second, both `(rows,)`."""
    features = _features(posterior, data)
    pairs = torch.zeros(len(data), 2, dtype=torch.int64)
    for group in data.groups():
        pairs[group.rows] = group.items
    encoded = _head(posterior).encode_pairs(features[pairs[:, 0]], features[pairs[:, 1]])
    belief = posterior._belief(encoded, [1] * len(data), None)
    return belief.mean[:, 0], belief.std[:, 0]


def _head(posterior: Posterior) -> PairwiseHead:
    head = posterior.program.head
    assert isinstance(head, PairwiseHead)
    return head


def _features(posterior: Posterior, data: Comparisons) -> Tensor:
    if data.features is None:
        return posterior.program.encode(data).double()
    return torch.as_tensor(np.asarray(data.features)).double()

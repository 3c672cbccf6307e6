"""What the sections are written from: beliefs and predictions on one data set, computed once."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from ...data import Comparisons
from ...data.groups import FeedbackGroup
from ...engines import FeedbackPrediction, NetworkDraws, Posterior
from ...rewards import PairwiseHead, ProjectedHead
from ._preference_scores import item_scores, row_scores

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A posterior's beliefs about the items and rows of a data set.

    Attributes:
        data: The data, features attached where the reward reads any.
        groups: Its rows by kind and shape.
        prediction: Posterior predictive of its feedback.
        weight: Weight of each row, shape `(rows,)`; rows of weight 0 count nowhere.
        prompt: Prompt of each row, shape `(rows,)`.
        mean: Expected reward of each item, shape `(items,)`; of a pairwise preference its mean score against the items
            of its prompt.
        root: Covariance factor of the rewards of items of one prompt, shape `(items, R)`.
        deviation: Expected reward less the mean of the prompt's items, shape `(items,)`; the reward itself where the
            prompt has one item.
        spread: Posterior standard deviation of `deviation`, shape `(items,)`.
        confidence: Probability of each row's likeliest outcome, NaN where outcomes are not enumerated, shape `(rows,)`.
        correct: Whether it occurred (shares in ties), NaN likewise, shape `(rows,)`.
        observed_prob: Probability of the answer that was given, shape `(rows,)`.
        label: Label of each row's group, such as `choice.2`.
        scores: Mean and standard deviation of the score of each row's first response against its second, where a
            pairwise preference has no rewards that would tell; both of shape `(rows,)`.
    """

    data: Comparisons
    groups: list[FeedbackGroup]
    prediction: FeedbackPrediction
    weight: Floats
    prompt: Integers
    mean: Floats
    root: Floats
    deviation: Floats
    spread: Floats
    confidence: Floats
    correct: Floats
    observed_prob: Floats
    label: list[str]
    scores: tuple[Floats, Floats] | None = None

    @property
    def quantity(self) -> str:
        """What is believed of a single response, in words."""
        return "reward" if self.scores is None else "mean preference score"

    @property
    def gap(self) -> str:
        """What decides between two responses, in words."""
        return "reward difference" if self.scores is None else "preference score"

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Rows with a weight, shape `(rows,)`."""
        return self.weight > 0

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Rows with a weight whose outcomes are enumerated, shape `(rows,)`."""
        return self.counted & ~np.isnan(self.confidence)

    @property
    def num_prompts(self) -> int:
        """Prompts of the rows that count."""
        return len(np.unique(self.prompt[self.counted]))

    def prompt_spread(self) -> Floats:
        """Mean of `spread` over the items of each prompt, shape `(prompts,)`."""
        owner = np.asarray(self.data.prompt_of_item)
        count = np.bincount(owner)
        total = np.bincount(owner, self.spread)
        return total[count > 0] / count[count > 0]

    def doubt(self) -> Floats:
        """How little is known of who would be preferred: std of sigmoid(difference) under the posterior, `(rows,)`.

        For a single response the difference is taken from its own expected reward.
        """
        mean, std, pair = self.contrasts()
        mean = np.where(pair[:, 1] < 0, 0.0, mean)
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        preference = 1.0 / (1.0 + np.exp(-np.clip(mean[:, None] + std[:, None] * nodes, -700, 700)))
        weights = weights / weights.sum()
        variance = np.square(preference - (preference @ weights)[:, None]) @ weights
        return np.where(std > 0, np.sqrt(variance), 0.0)

    def contrasts(self) -> tuple[Floats, Floats, Integers]:
        """Difference that decides each row: mean `(rows,)`, standard deviation `(rows,)` and items `(rows, 2)`.

        It is between the first and the second of a pair, between the two best of several, and for a single response
        its reward against nothing (second item -1).
        """
        size = len(self.data)
        mean, std = np.zeros(size), np.zeros(size)
        pair = np.full((size, 2), -1, dtype=np.int64)
        for g in self.groups:
            rows, items = g.rows.numpy(), g.items.numpy()
            if items.shape[1] > 2:
                best = np.sort(np.argsort(-self.mean[items], axis=1, kind="stable")[:, :2], axis=1)
                items = np.take_along_axis(items, best, axis=1)
            pair[rows, : items.shape[1]] = items
            gap, root = self.mean[items[:, 0]], self.root[items[:, 0]]
            if items.shape[1] == 2:
                gap, root = gap - self.mean[items[:, 1]], root - self.root[items[:, 1]]
            mean[rows], std[rows] = gap, np.sqrt(np.square(root).sum(1))
        return (mean, std, pair) if self.scores is None else (*self.scores, pair)


def gather(posterior: Posterior, data: Comparisons, *, seed: int, progress: bool = False) -> Evidence:
    """Computes what the posterior believes about `data`.

    Raises:
        DataError: The data have texts that nothing turns into features, or features that are not finite.
        LikelihoodError: The feedback is not of a kind the posterior describes, or an annotator is unknown to it.
    """
    if not isinstance(posterior.program.head, ProjectedHead | NetworkDraws):
        # Encoded once for rewards and predictions; those heads make features of their own from what the data have.
        data = data.with_features(posterior.program.encode(data, progress=progress).numpy())
    prediction = posterior.predict_feedback(data, seed=seed)
    confidence = np.full(len(data), np.nan)
    label = [""] * len(data)
    for g in prediction.groups:
        for row in g.rows.tolist():
            label[row] = g.label
        if g.probs is not None:
            confidence[g.rows.numpy()] = g.probs.amax(1).numpy()
    return Evidence(
        data,
        data.groups(),
        prediction,
        prediction.weight.numpy(),
        np.asarray(data.prompt_of_row),
        *items(posterior, data),
        confidence,
        prediction.correct.numpy(),
        prediction.log_prob.exp().numpy(),
        label,
        _scores(posterior, data),
    )


def items(posterior: Posterior, data: Comparisons) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean, covariance root, deviation and spread of the rewards of items, as `Evidence` has them."""
    pairwise = isinstance(posterior.program.head, PairwiseHead)
    belief = item_scores(posterior, data) if pairwise else posterior.predict_items(data)
    order = np.argsort(np.asarray(data.prompt_of_item), kind="stable")
    valid = belief.valid
    differences = belief.differences()
    single = (valid.sum(1) == 1)[:, None]

    def by_item(values: torch.Tensor) -> Floats:
        result: Floats = np.empty((len(order), *values.shape[2:]))
        result[order] = values[valid].double().numpy()
        return result

    return (
        by_item(belief.mean),
        by_item(belief.root),
        by_item(torch.where(single, belief.mean, differences.mean)),
        by_item(torch.where(single, belief.std, differences.std)),
    )


def _scores(posterior: Posterior, data: Comparisons) -> tuple[Floats, Floats] | None:
    if not isinstance(posterior.program.head, PairwiseHead):
        return None
    mean, std = row_scores(posterior, data)
    return mean.double().numpy(), std.double().numpy()

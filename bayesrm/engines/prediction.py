"""Posterior predictive of feedback."""

import dataclasses

import torch

from .._typing import Tensor


@dataclasses.dataclass(frozen=True)
class GroupPrediction:
    """Prediction for rows of one kind and shape.

    Attributes:
        label: Kind and shape, for instance `"choice.2"`.
        rows: Position of each row in the data, shape `(n,)`.
        outcomes: All outcomes, shape `(M,)` or, for rankings, `(M, depth)`; `None` when they are too many to enumerate.
        probs: Predictive probability of each, shape `(n, M)`; `None` with `outcomes`.
        observed: Index of the observed outcome, shape `(n,)`; `None` with `outcomes`.
    """

    label: str
    rows: Tensor
    outcomes: Tensor | None
    probs: Tensor | None
    observed: Tensor | None


@dataclasses.dataclass(frozen=True)
class FeedbackPrediction:
    """Posterior predictive of the feedback of a data set.

    Attributes:
        log_prob: Log predictive probability of each row's observed answer, shape `(N,)`.
        groups: Probabilities of all outcomes, by kind and shape of the rows.
        weight: Weight of each row, shape `(N,)`.
    """

    log_prob: Tensor
    groups: tuple[GroupPrediction, ...]
    weight: Tensor

    @property
    def nll(self) -> float:
        """Mean negative log predictive probability, in nats a row (rows weighted)."""
        counted = self.weight > 0
        return float(-(self.weight * self.log_prob)[counted].sum() / self.weight.sum())

    @property
    def correct(self) -> Tensor:
        """Whether the likeliest outcome was observed, 0 or 1 (1/2 in a two-way tie), shape `(N,)`; NaN if unknown."""
        result = torch.full_like(self.log_prob, float("nan"))
        for g in self.groups:
            if g.probs is not None and g.observed is not None:
                best = g.probs >= g.probs.amax(1, keepdim=True) - 1e-12
                share = best.gather(1, g.observed[:, None])[:, 0].to(result.dtype) / best.sum(1)
                result[g.rows] = share
        return result

    @property
    def accuracy(self) -> float:
        """Share of rows whose likeliest outcome was observed, over the rows whose outcomes can be enumerated."""
        correct = self.correct
        known = ~torch.isnan(correct)
        weight = self.weight[known]
        return float((weight * correct[known]).sum() / weight.sum())

"""Probabilities that answers are wrong, averaged over posterior draws."""

import math
from collections.abc import Sequence

import torch

from .._typing import Tensor
from ..engines._density import FeedbackDensity
from ..engines.draws import JointDraws
from ..engines.psis import MIN_DRAWS, pareto_smooth
from ._wrong_answers import Answers, terms_of_draws
from .loo import _relative_efficiency


def reliable_ratio(draws: JointDraws) -> Tensor | None:
    """The log importance ratio of the draws, shape `(S,)`; `None` where they have none, or a heavy-tailed one."""
    if draws.log_ratio is None or len(draws.rewards) < MIN_DRAWS:
        return None
    return draws.log_ratio if pareto_smooth(draws.log_ratio).reliable else None


def log_weights_of(ratio: Tensor | None, size: int) -> Tensor:
    """Log weights of the draws, which sum to 1, shape `(size,)`."""
    if ratio is None:
        return torch.full((size,), -math.log(size), dtype=torch.float64)
    return pareto_smooth(ratio).log_weights


def weighted_interval(values: Tensor, log_weights: Tensor, level: float) -> tuple[float, float]:
    """Central interval of weighted draws, shape `(S,)` both."""
    order = values.argsort()
    below = log_weights[order].exp().cumsum(0)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64) * below[-1]
    low, high = values[order[torch.searchsorted(below, ends)]].tolist()
    return low, high


class Probabilities:
    """Averages over draws of what `Answers.terms` gives, for each group of rows.

    Args:
        density: The density of the rows.
        answers: The groups.
        draws: The draws.
        ratio: Their log importance ratio, where it counts.
        fitted: Whether the posterior has seen the rows; those of weight 0 it has not.
        seed: Seed of which answers are wrong in each draw.
    """

    def __init__(
        self,
        density: FeedbackDensity,
        answers: Sequence[Answers],
        draws: JointDraws,
        ratio: Tensor | None,
        *,
        fitted: bool,
        seed: int,
    ) -> None:
        self._answers, self._draws, self._ratio, self._fitted = answers, draws, ratio, fitted
        self._log_weights = log_weights_of(ratio, len(draws.rewards))
        empty = [torch.full((len(a.group.rows),), -torch.inf, dtype=torch.float64) for a in answers]
        self._share, self._wrong, self._observed = list(empty), list(empty), list(empty)
        self._tables: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in answers]
        self._num_wrong = torch.zeros(len(draws.rewards), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for part, groups in terms_of_draws(density, answers, draws):
            for i, terms in enumerate(groups):
                if answers[i].assumed and fitted:
                    self._tables[i].append(terms)
                else:
                    self._add(i, part, terms, generator)

    def _add(self, i: int, part: slice, terms: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> None:
        right, wrong, _ = terms
        observed = torch.logaddexp(right, wrong)
        share = wrong - observed
        for sums, values in ((self._share, share), (self._wrong, wrong), (self._observed, observed)):
            sums[i] = torch.logaddexp(sums[i], torch.logsumexp(self._log_weights[part, None] + values, dim=0))
        uniform = torch.rand(share.shape, generator=generator, dtype=torch.float64)
        self._num_wrong[part] += ((uniform < share.exp()) & (self._answers[i].group.weight > 0)).sum(1)

    def of_group(self, i: int) -> Tensor:
        """Log P(wrong) of each row of a group whose likelihood has noise, or that the posterior has not seen."""
        unseen = self._wrong[i] - self._observed[i]
        if not self._fitted:
            return unseen
        return torch.where(self._answers[i].group.weight > 0, self._share[i], unseen)

    def left_out(self, i: int) -> tuple[Tensor, Tensor]:
        """Log P(wrong) of each row of group `i` given all other rows, and k-hat of the weights that leave it out."""
        right, wrong, meant = (torch.cat(tables) for tables in zip(*self._tables[i], strict=True))
        weights = self._answers[i].group.weight.tolist()
        log_prob = torch.empty(len(weights), dtype=torch.float64)
        k_hat = torch.full((len(weights),), torch.nan, dtype=torch.float64)
        for j, weight in enumerate(weights):
            log_weights = self._log_weights
            if weight > 0:
                log_lik = weight * meant[:, j]
                efficiency = _relative_efficiency(log_lik, self._draws)
                ratio = -log_lik if self._ratio is None else self._ratio - log_lik
                smooth = pareto_smooth(ratio, relative_efficiency=efficiency)
                log_weights, k_hat[j] = smooth.log_weights, smooth.k_hat
            log_wrong = torch.logsumexp(log_weights + wrong[:, j], dim=0)
            log_right = torch.logsumexp(log_weights + right[:, j], dim=0)
            log_prob[j] = log_wrong - torch.logaddexp(log_wrong, log_right)
        return log_prob, k_hat

    def interval(self, level: float) -> tuple[float, float]:
        """Central interval of the number of wrong answers among the rows that count."""
        return weighted_interval(self._num_wrong, self._log_weights, level)

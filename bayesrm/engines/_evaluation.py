"""Joint draws under a likelihood: log probabilities of the answers, and answers from the posterior predictive."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from .._typing import Tensor
from ..backend import seeded
from ..likelihoods.base import outcomes_of
from ._density import FeedbackDensity
from .draws import JointDraws

#: Draws are evaluated for about this many rewards at once.
_TOGETHER = 2**20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Some consecutive draws, the log probability of every answer, and answers drawn from the posterior predictive.

    Attributes:
        draws: Which draws.
        log_probs: For each group of rows the unweighted log probability of the answers, shape `(draws, rows)`.
        outcomes: For each group of rows drawn answers, shape `(draws, rows)` or `(draws, rows, depth)`; `None` unless
            they were asked for.
    """

    draws: slice
    log_probs: list[Tensor]
    outcomes: list[Tensor] | None


def evaluations(density: FeedbackDensity, draws: JointDraws, *, seed: int | None = None) -> Iterator[Evaluation]:
    """Evaluates draws in turn, many at once where that can be done.

    Args:
        density: The density of the rows, on the data of the draws.
        draws: The draws.
        seed: Seed of drawn answers; none are drawn without it.
    """
    size = max(1, sum(g.items.numel() for g in density.groups))
    together = min(max(1, _TOGETHER // size), len(draws.rewards))
    supports = _supports(density, draws) if seed is not None else [None] * len(density.groups)
    # A likelihood is written for one value of its latents; what cannot be enumerated has to be drawn under that value.
    one_by_one = density.num_latents and ((seed is not None and None in supports) or not _vectorises(density, draws))
    for start in range(0, len(draws.rewards), 1 if one_by_one else together):
        part = slice(start, start + (1 if one_by_one else together))
        rewards, latents = draws.rewards[part], draws.latents[part]
        with torch.no_grad():
            if density.num_latents and not one_by_one:
                log_probs, tables = _each_draw(density, rewards, latents, supports)
                outcomes = None if seed is None else _from_tables(tables, supports, seed + start)
            else:
                log_probs, outcomes = _as_rows(density, rewards, latents, None if seed is None else seed + start)
        yield Evaluation(slice(start, start + len(rewards)), log_probs, outcomes)


def _as_rows(
    density: FeedbackDensity, rewards: Tensor, latents: Tensor, seed: int | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Draws that share their latents as rows of one large table."""
    tiled = density.tiled(len(rewards)) if len(rewards) > 1 else density
    distributions, _ = tiled.distributions([rewards[:, g.items].flatten(0, 1) for g in density.groups], latents[0])
    shapes = [(len(rewards), g.comparison.num_rows) for g in density.groups]
    log_probs = [d.log_prob(g.outcome).reshape(n) for d, g, n in zip(distributions, tiled.groups, shapes, strict=True)]
    if seed is None:
        return log_probs, None
    with seeded(seed):
        outcomes = [d.sample().long() for d in distributions]
    return log_probs, [y.reshape(*n, *y.shape[1:]) for y, n in zip(outcomes, shapes, strict=True)]


def _each_draw(
    density: FeedbackDensity, rewards: Tensor, latents: Tensor, supports: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Draws with latents of their own: log probabilities of the answers, and of all outcomes `(draws, M, rows)`."""

    def one(r: Tensor, u: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        distributions, _ = density.distributions(density.gather(r), u)
        observed, tables = [], []
        for d, g, support in zip(distributions, density.groups, supports, strict=True):
            observed.append(d.log_prob(g.outcome))
            if support is not None:
                tables.append(torch.stack([d.log_prob(v.expand(g.comparison.num_rows, *v.shape)) for v in support]))
        return observed, tables

    values: tuple[list[Tensor], list[Tensor]] = torch.func.vmap(one)(rewards, latents)
    return values


def _from_tables(tables: Sequence[Tensor], supports: Sequence[Tensor | None], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outcomes = []
    for table, support in zip(tables, supports, strict=True):
        assert support is not None
        below = table.exp().cumsum(1)
        uniform = torch.rand(below.shape[0], 1, below.shape[2], generator=generator, dtype=torch.float64)
        # Against the last sum rather than 1, which it may miss by a rounding.
        outcomes.append(support[(uniform * below[:, -1:] > below[:, :-1]).sum(1)].long())
    return outcomes


def _supports(density: FeedbackDensity, draws: JointDraws) -> list[Tensor | None]:
    """All outcomes of each group, `None` where they are too many."""
    with torch.no_grad():
        distributions, _ = density.distributions(density.gather(draws.rewards[0]), draws.latents[0])
    return [outcomes_of(d) for d in distributions]


def _vectorises(density: FeedbackDensity, draws: JointDraws) -> bool:
    """Whether a likelihood that is written for one value of its latents runs on several at once."""
    try:
        with torch.no_grad():
            _each_draw(density, draws.rewards[:2], draws.latents[:2], [None] * len(density.groups))
    except RuntimeError:
        # A branch on values, which vmap cannot follow; an error of the likelihood's own comes again.
        return False
    return True

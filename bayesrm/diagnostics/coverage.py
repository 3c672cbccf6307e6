"""Coverage of reward differences where the truth is known, as it is in a simulation."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..errors import ArgumentError
from .bootstrap import Estimate, check_resampling, redrawn


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How often central intervals of a belief hold the true difference of two candidates' rewards.

    Attributes:
        levels: Nominal coverage, shape `(levels,)`.
        covered: Share of the pairs whose true difference lies inside, for each level, with an interval over prompts.
        width: Mean width of the intervals (sharpness), in units of reward, shape `(levels,)`; narrower is better among
            beliefs that cover.
        pit: Belief's distribution function at the true difference "candidate believed better minus the other", shape
            `(pairs,)`: uniform on (0, 1) if the belief is right, many near 0 and 1 if it is too sure, many near 0 alone
            if it overstates differences.
        prompts: Prompt of each pair, shape `(pairs,)`.
    """

    levels: NDArray[np.float64]
    covered: tuple[Estimate, ...]
    width: NDArray[np.float64]
    pit: NDArray[np.float64]
    prompts: NDArray[np.int64]

    def __str__(self) -> str:
        return "\n".join(
            f"{level:.0%} intervals cover {share}, mean width {width:.3g}"
            for level, share, width in zip(self.levels, self.covered, self.width, strict=True)
        )


def coverage(
    belief: RewardBelief | Tensor,
    truth: Tensor,
    *,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    num_resamples: int = 1000,
    interval_level: float = 0.95,
    clusters: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> Coverage:
    """Coverage of central intervals for the difference of each pair of candidates of a prompt.

    If truth and feedback come from the program itself, intervals of the right posterior cover at their level on average
    over truths, whatever the data (Cook, Gelman & Rubin 2006). With S draws the truth has one of S + 1 ranks with equal
    chance, and randomising inside a rank makes coverage exact for any S. Differences are oriented by the
    belief, so the order in which candidates are listed does not matter. Pairs whose difference the belief knows
    exactly and rightly, such as a candidate listed twice, are left out.

    Args:
        belief: Gaussian or made of draws, or draws themselves, shape `(S, B, K)`.
        truth: True rewards of the same candidates, shape `(B, K)`, in the belief's units; entries of masked candidates
            are ignored.
        levels: Nominal coverage of the intervals.
        num_resamples: Bootstrap resamples, of prompts.
        interval_level: Coverage of the interval of each share.
        clusters: Cluster of each prompt, shape `(B,)`, by default the prompts themselves. Prompts with one true
            reward function share its weights: over several simulated truths, give the number of the truth.
        seed: Seed of the bootstrap and of randomised ranks.

    Raises:
        ArgumentError: Shapes disagree, a level is not between 0 and 1, or fewer than two prompts have two candidates.

    Example:
        >>> belief = RewardBelief(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
        >>> found = coverage(belief, torch.tensor([[0.0, 0.1], [0.5, 0.0], [0.0, 9.0]]), levels=[0.9])
        >>> round(found.covered[0].value, 3)
        0.667
    """
    check_resampling(num_resamples, interval_level)
    truth = torch.as_tensor(truth)
    if not isinstance(belief, RewardBelief):
        belief = torch.as_tensor(belief)
        if belief.dim() != 3:
            raise ArgumentError(f"`belief` has shape {tuple(belief.shape)}; draws have shape (S, prompts, candidates)")
        belief = RewardBelief.from_draws(belief)
    if truth.shape != belief.mean.shape:
        raise ArgumentError(
            f"`truth` has shape {tuple(truth.shape)}, the belief is about {tuple(belief.mean.shape)} rewards"
        )
    if not len(levels) or not all(0 < level < 1 for level in levels):
        raise ArgumentError(f"`levels` is {levels}; each lies between 0 and 1")
    nominal = np.asarray(levels, dtype=np.float64)
    truth = torch.where(belief.valid, truth.to(belief.mean.dtype), torch.zeros_like(belief.mean))
    if not bool(torch.isfinite(truth).all()):
        raise ArgumentError("`truth` has entries of real candidates that are not finite")
    clusters = None if clusters is None else np.asarray(clusters)
    if clusters is not None and len(clusters) != len(truth):
        raise ArgumentError(f"`clusters` has {len(clusters)} entries for {len(truth)} prompts; give one for each")
    rng = np.random.default_rng(seed)
    parts = [_pair(belief, truth, i, j, nominal, rng) for i in range(truth.shape[1]) for j in range(i)]
    owners = np.concatenate([p if clusters is None else clusters[p] for _, p, _ in parts] or [np.zeros(0, dtype=int)])
    _, owner = np.unique(owners, return_inverse=True)
    count = np.bincount(owner).astype(np.float64)
    if len(count) < 2:
        raise ArgumentError("fewer than two prompts (or clusters) have two candidates whose difference is uncertain")
    pit, prompts, width = (np.concatenate(column) for column in zip(*parts, strict=True))
    tail = (1 - interval_level) / 2
    covered = []
    for level in nominal:
        inside = np.bincount(owner, np.abs(pit - 0.5) <= level / 2).astype(np.float64)
        value, draws = redrawn(lambda copies, a, b: (copies @ a) / (copies @ b), (inside, count), num_resamples, seed)
        low, high = np.quantile(draws, [tail, 1 - tail])
        covered.append(Estimate(value, float(low), float(high), interval_level))
    return Coverage(nominal, tuple(covered), width.mean(0), pit, prompts)


def _pair(
    belief: RewardBelief, truth: Tensor, i: int, j: int, levels: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """PIT `(pairs,)`, prompt `(pairs,)` and widths `(pairs, levels)` of candidates i and j of the prompts with both."""
    prompts = (belief.valid[:, i] & belief.valid[:, j]).nonzero()[:, 0]
    mean = (belief.mean[prompts, i] - belief.mean[prompts, j]).double().numpy()
    sign = np.where(mean < 0, -1.0, 1.0)
    true = sign * (truth[prompts, i] - truth[prompts, j]).double().numpy()
    mean = sign * mean
    # The factor's difference, not a difference of variances: nothing cancels where candidates are alike.
    std = (belief.root[prompts, i] - belief.root[prompts, j]).double().norm(dim=-1).numpy()
    scale = torch.maximum(belief.std[prompts, i], belief.std[prompts, j]).double().numpy()
    std = np.where(std <= 1e-10 * scale, 0.0, std)
    sure = std == 0
    uncertain = ~(sure & (np.abs(true - mean) <= 1e-10 * (1 + np.abs(true))))
    if belief.draws is None:
        z = (true - mean) / np.where(sure, 1.0, std)
        pit = np.where(sure, (true > mean).astype(np.float64), scipy.special.ndtr(z))
        half = scipy.special.ndtri((1 + levels) / 2)
        width = 2 * std[:, None] * half
    else:
        draws = sign * (belief.draws[:, prompts, i] - belief.draws[:, prompts, j]).double().numpy()
        below, equal = (draws < true).sum(0), (draws == true).sum(0)
        pit = (below + (equal + 1) * rng.random(len(true))) / (len(draws) + 1)
        ends = np.quantile(draws, np.stack([(1 - levels) / 2, (1 + levels) / 2]), axis=0)
        width = (ends[1] - ends[0]).T
    return pit[uncertain], prompts.numpy()[uncertain], width[uncertain]

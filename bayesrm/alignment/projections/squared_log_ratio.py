"""Regression of log-ratios of pairs on those of the target (IPO 2310.12036, INPO 2407.00617, WIND 2410.20727)."""

import dataclasses
import enum
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._pairs import Pairs, check_pairs, pair_weights, tilts
from ._projection import inside


class Margin(enum.StrEnum):
    """What a pair's log-ratio is regressed on."""

    DENSITY = "density"
    """The log-ratio of the target's densities."""
    PREFERENCE = "preference"
    """`target.pair_margins(candidates)`: what the preference between the two alone says, as INPO does."""


@dataclasses.dataclass(frozen=True)
class SquaredLogRatio:
    """`sum_ij w_ij (log q(y_i)/q(y_j) - m_ij)^2` over pairs of candidates; the minimum is the target.

    Attributes:
        margin: One of `Margin`. With `"preference"` single margins are off, and their average over opponents drawn from
            the previous policy is right.
        pairs: `"all"` or `"best_worst"`.

    Raises:
        ArgumentError: A setting is not one of the known values; or, when called, the target has no pair margins.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -3.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> SquaredLogRatio()(log_p0, brm.fit(brm.GoodnessPosterior(), drawn))
        tensor([1.])
    """

    margin: str = Margin.DENSITY.value
    pairs: str = Pairs.ALL.value

    def __post_init__(self) -> None:
        check_pairs(self.pairs)
        known = [str(member.value) for member in Margin]
        if self.margin not in known:
            raise ArgumentError(f"`margin` is {self.margin!r}; it is one of {known}")

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """A pair, at least."""
        return 2, None

    @property
    def draws(self) -> tuple[str, ...] | None:
        """The policy's own, where margins are right on average over its draws alone."""
        return ("policy",) if self.margin == Margin.PREFERENCE.value else None

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        log_q = inside(log_probs, posterior)
        weights = pair_weights(posterior, self.pairs)
        gap = log_q[:, :, None] - log_q[:, None, :] - self._margins(posterior)
        return (weights * gap.square()).sum((1, 2))

    def _margins(self, posterior: ResponsePosterior) -> Tensor:
        if self.margin == Margin.DENSITY.value:
            log_density = tilts(posterior) + inside(posterior.candidates.reference, posterior)
            return log_density[:, :, None] - log_density[:, None, :]
        target: Any = posterior.target
        if not callable(getattr(target, "pair_margins", None)):
            raise ArgumentError(
                f"`margin` is 'preference', and the target {type(target).__name__} has no pair margins; use "
                "MirrorDescent, or margin='density'"
            )
        margins: Tensor = target.pair_margins(posterior.candidates)
        mask = posterior.candidates.mask
        return margins.masked_fill(~(mask[:, :, None] & mask[:, None, :]), 0.0)

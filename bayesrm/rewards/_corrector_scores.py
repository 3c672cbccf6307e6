"""Scores of a response's tokens from what a corrector would have written in their place."""

import dataclasses
import enum

import torch
from jaxtyping import Bool, Float

from .._typing import Tensor
from ..errors import ArgumentError
from ._checks import as_member, check_choice, is_real


class Scoring(enum.StrEnum):
    """How tokens are scored."""

    DIVERGENCE = "divergence"
    """By agreement with the corrector (2409.00162): a positive score before the first token at which its greedy output
    leaves the response; from there the response is fed to it token by token, and tokens that it would not have written
    get a negative one."""
    LOG_RATIO = "log_ratio"
    """By how much less probable the token is than the corrector's most probable one, `log p(y_t) - max_a log p(a)` with
    the response's tokens before it: 0 where the corrector would write the same, below 0 elsewhere. Our addition: it
    needs no magnitudes and tells slight doubts from errors."""


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """From a corrector's predictions to the scores of tokens.

    Attributes:
        scoring: A `Scoring`.
        agreement: Score of tokens before the first divergence.
        departure: Score of the token at the first divergence, and of those behind it that the corrector would not have
            written.
        match_after: Score of tokens behind the first divergence that it would have written.
        reduce: `"sum"`: the reward of a response is the sum of its scores; `"mean"`: their mean, for which scores are
            divided by the number of tokens.

    Raises:
        ArgumentError: A setting is unknown or not finite.

    Example:
        >>> ScoreRule().scores(torch.tensor([True, False, True, False]), torch.zeros(4)).tolist()
        [1.0, -1.0, 0.0, -1.0]
    """

    scoring: str = "divergence"
    agreement: float = 1.0
    departure: float = -1.0
    match_after: float = 0.0
    reduce: str = "sum"

    def __post_init__(self) -> None:
        as_member(Scoring, "scoring", self.scoring)
        check_choice("reduce", self.reduce, ("sum", "mean"))
        for name in ("agreement", "departure", "match_after"):
            if not is_real(value := getattr(self, name)):
                raise ArgumentError(f"`{name}` is {value!r}; it is a finite number")
        if not self.agreement > self.departure:
            raise ArgumentError(
                f"`agreement` is {self.agreement} and `departure` {self.departure}: tokens that the corrector would "
                "change would earn at least as much; `agreement` is the larger one"
            )

    def scores(self, matches: Bool[Tensor, "tokens"], log_ratios: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Scores of the tokens of one response, float64.

        The corrector's greedy output agrees with the response exactly as long as its most probable token, given the
        response's tokens so far, is the response's next one: one pass over the response tells both phases.

        Args:
            matches: Whether each token is the corrector's most probable one, given the tokens before it.
            log_ratios: Log-probability of each token less that of the most probable one.
        """
        if self.scoring == Scoring.LOG_RATIO:
            scores = log_ratios.double()
        else:
            agreeing = matches.long().cumprod(0).bool()
            scores = torch.full(matches.shape, self.departure, dtype=torch.float64, device=matches.device)
            scores[matches] = self.match_after
            scores[agreeing] = self.agreement
        return scores / len(scores) if self.reduce == "mean" else scores

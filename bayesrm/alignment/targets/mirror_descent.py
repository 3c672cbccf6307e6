"""A step of mirror descent on a regularised preference game."""

import dataclasses
import enum
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ArgumentError
from ...programs import ScoredCandidates


class Opponent(enum.StrEnum):
    """Against whom responses are preferred."""

    PREVIOUS = "previous"
    """The previous policy pi_t: self-play (INPO, WIND)."""
    MIXTURE = "mixture"
    """The geometric mixture of the previous policy and the reference in which the step starts (Nash-MD)."""
    REFERENCE = "reference"
    """The reference policy."""


class Payoff(enum.StrEnum):
    """What winning is worth."""

    PROBABILITY = "probability"
    """P(y preferred to the opponent's response)."""
    LOG_PROBABILITY = "log_probability"
    """Its logarithm, as in the game whose iteration is iterative BOND (Yang et al., WIND, 2410.20727)."""
    REWARD = "reward"
    """The mean believed reward itself; for values of turns in multi-turn games (Shani et al., MTPO, 2405.14655)."""


@dataclasses.dataclass(frozen=True)
class MirrorDescent:
    """`log pi_{t+1} = (1 - step tau) log pi_t + step tau log p0 + step P(y preferred to the opponent) + const`.

    With `step` the learning rate of mirror descent, and tau the KL regularisation of the game, iterating it leads to
    the game's Nash policy: with one step in self-play, and with steps that fall as `2 / (tau (t + 2))` against the
    mixture (Munos et al., Nash-MD, 2312.00886), where one step for all rounds ends near it. INPO (Zhang et al.,
    2407.00617) is the same step with its `1 / eta` as `step`, WIND (2410.20727) with `eta / (1 + eta tau)`, both
    against the previous policy. The previous policy is `candidates.anchor`.

    Attributes:
        step: In nats for a certain win.
        regularisation: tau, in certain wins for a nat; `step * regularisation` is at most 1.
        opponent: One of `Opponent`; its win probabilities are averaged over the candidates, weighted towards it.
        payoff: One of `Payoff`.

    Raises:
        ArgumentError: A setting is out of range.

    Example:
        >>> import bayesrm as brm
        >>> uniform = torch.tensor([[0.5, 0.5]]).log()
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> candidates = brm.programs.ScoredCandidates(belief, reference=uniform, anchor=uniform)
        >>> MirrorDescent(step=1.0, regularisation=0.1).log_density(candidates).softmax(1)
        tensor([[0.5575, 0.4425]])
    """

    step: float
    regularisation: float = 0.0
    opponent: str = Opponent.PREVIOUS.value
    payoff: str = Payoff.PROBABILITY.value

    def __post_init__(self) -> None:
        if not 0.0 < self.step < math.inf:
            raise ArgumentError(f"`step` is {self.step}; it is a positive number")
        if not self.regularisation >= 0.0 or not self.step * self.regularisation <= 1.0:
            raise ArgumentError(
                f"`regularisation` is {self.regularisation}; it lies between 0 and 1 / step = {1.0 / self.step:.4g}"
            )
        for name, known in (("opponent", Opponent), ("payoff", Payoff)):
            values = [str(member.value) for member in known]
            if getattr(self, name) not in values:
                raise ArgumentError(f"`{name}` is {getattr(self, name)!r}; it is one of {values}")

    def start(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log-density from which the step starts: the geometric mixture of the previous policy and the reference."""
        share = self.step * self.regularisation
        return (1.0 - share) * candidates.previous + share * candidates.reference

    def win_probability(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """P(y preferred to the opponent's response) of each candidate, averaged over the candidates.

        Of n draws a single value is shrunk to 1/2 by (n - 1) / n, since a draw ties with itself. Projections use
        differences within the set, which are right: what a draw loses by the tie, its rivals lose by meeting it.
        """
        opponents = {
            Opponent.PREVIOUS.value: lambda: candidates.previous,
            Opponent.MIXTURE.value: lambda: self.start(candidates),
            Opponent.REFERENCE.value: lambda: candidates.reference,
        }
        weights = candidates.log_weights_of(opponents[self.opponent]()).exp()
        # Beliefs of linear heads are in float64, log-probabilities of a language model are not.
        preferences = candidates.preference_matrix
        wins = torch.einsum("bij,bj->bi", preferences, weights.to(preferences))
        return torch.where(candidates.mask, wins, 0.5)

    def log_density(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates"]:
        """Log pi_{t+1}(y | x) up to a constant."""
        if self.payoff == Payoff.REWARD.value:
            worth = candidates.belief.mean
        else:
            worth = self.win_probability(candidates)
            worth = worth.log() if self.payoff == Payoff.LOG_PROBABILITY.value else worth
        return (self.start(candidates) + self.step * worth).masked_fill(~candidates.mask, -math.inf)

    def pair_margins(self, candidates: ScoredCandidates) -> Float[Tensor, "prompts candidates candidates"]:
        """What `log pi_{t+1}(y_i) - log pi_{t+1}(y_j)` is regressed on for a pair that was compared, `(B, n, n)`.

        `step (P(y_i preferred to y_j) - 1/2)` on top of the start's own difference, INPO's `1 / (2 eta)` for a certain
        win: its average over the opponent's responses is the step itself, so that the regression has it as minimum.
        """
        start = self.start(candidates)
        return start[:, :, None] - start[:, None, :] + self.step * (candidates.preference_matrix - 0.5)

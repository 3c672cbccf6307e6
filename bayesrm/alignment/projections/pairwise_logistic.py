"""The DPO form on pairs (Rafailov et al., 2305.18290), and SAIL's score-function term (2406.15567)."""

import dataclasses
import enum
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...engines.response_posterior import ResponsePosterior
from ...errors import ArgumentError
from ._pairs import Pairs, check_pairs, pair_weights, tilts
from ._projection import inside


class Labels(enum.StrEnum):
    """Who is preferred in a pair."""

    PREFERENCE = "preference"
    """Each with the probability of `candidates.preference_matrix`."""
    TILT = "tilt"
    """Each with the probability `sigmoid` of the difference of the target's tilts."""
    HARD = "hard"
    """The one with the larger tilt, certainly."""


@dataclasses.dataclass(frozen=True)
class PairwiseLogistic:
    """`- sum_ij w_ij P_ij log sigmoid(beta h_ij)` with `h_ij` the pair's log-ratio of q to p0.

    DPO on pairs that a belief labels. With `labels="preference"` the expected loss over a judge's answers; then, and
    for a Bradley-Terry judge, its minimum is `p0 exp(r / beta)`.

    SAIL: where the pairs are drawn from the policy, their distribution has a gradient too, the log-likelihood of a
    pair's answer times `grad(log q(y_i) + log q(y_j))`. `score_function` is the factor on that term, 1 in the paper's
    gradient, with the mean of the batch's other prompts as baseline (a prompt alone has none, and noisier gradients).

    Attributes:
        beta: In units of reward for a nat.
        labels: One of `Labels`.
        pairs: `"all"` or `"best_worst"`.
        score_function: Factor on the gradient through the distribution of the pairs.

    Raises:
        ArgumentError: A setting is out of range.

    Example:
        >>> import torch, bayesrm as brm
        >>> belief = brm.RewardBelief(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 1))
        >>> log_p0 = torch.tensor([[-3.0, -3.0]])
        >>> drawn = brm.programs.ScoredCandidates(belief, reference=log_p0, proposal=log_p0)
        >>> PairwiseLogistic()(log_p0, brm.fit(brm.GoodnessPosterior(), drawn))
        tensor([0.6931])
    """

    beta: float = 1.0
    labels: str = Labels.PREFERENCE.value
    pairs: str = Pairs.ALL.value
    score_function: float = 0.0

    def __post_init__(self) -> None:
        check_pairs(self.pairs)
        known = [str(member.value) for member in Labels]
        if self.labels not in known:
            raise ArgumentError(f"`labels` is {self.labels!r}; it is one of {known}")
        if not 0.0 < self.beta < math.inf:
            raise ArgumentError(f"`beta` is {self.beta}; it is a positive number")
        if not 0.0 <= self.score_function < math.inf:
            raise ArgumentError(f"`score_function` is {self.score_function}; it is a number of at least 0")

    @property
    def candidates_taken(self) -> tuple[int, int | None]:
        """A pair, at least."""
        return 2, None

    @property
    def draws(self) -> tuple[str, ...] | None:
        """The policy's own, where the score-function term needs them: it has no weights for others."""
        return ("policy",) if self.score_function else None

    def __call__(
        self, log_probs: Float[Tensor, "prompts candidates"], posterior: ResponsePosterior
    ) -> Float[Tensor, "prompts"]:
        """Loss of each prompt."""
        log_q = inside(log_probs, posterior)
        tilt = log_q - inside(posterior.candidates.reference, posterior)
        h = self.beta * (tilt[:, :, None] - tilt[:, None, :])
        # Each unordered pair is met twice, once for either answer.
        weights = pair_weights(posterior, self.pairs)
        weights = 0.5 * (weights + weights.transpose(1, 2))
        preferred = self._labels(posterior)
        log_sigmoid = torch.nn.functional.logsigmoid
        log_likelihood = preferred * log_sigmoid(h) + (1.0 - preferred) * log_sigmoid(-h)
        loss = -(weights * log_likelihood).sum((1, 2))
        if self.score_function:
            fixed = log_likelihood.detach()
            score = log_q[:, :, None] + log_q[:, None, :]
            mean = (weights * fixed).sum((1, 2))
            others = (mean.sum() - mean) / max(1, len(mean) - 1)
            centred = fixed - others[:, None, None]
            loss = loss - self.score_function * (weights * centred * score).sum((1, 2))
        return loss

    def _labels(self, posterior: ResponsePosterior) -> Tensor:
        if self.labels == Labels.PREFERENCE.value:
            return posterior.candidates.preference_matrix
        tilt = tilts(posterior)
        difference = tilt[:, :, None] - tilt[:, None, :]
        if self.labels == Labels.TILT.value:
            return torch.sigmoid(difference)
        return 0.5 * (1.0 + difference.sign())

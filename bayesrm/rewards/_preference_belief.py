"""What is believed about who is preferred to whom, cycles included."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64

from .._typing import Tensor
from ..beliefs import RewardBelief, _expected_sigmoid
from ..errors import ArgumentError


def pairs_of(num_candidates: int) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
    """The pairs (i, j), i < j, in the order in which beliefs hold them: those of fewer candidates come first."""
    j, i = torch.tril_indices(num_candidates, num_candidates, -1)
    return i, j


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceBelief:
    """Belief about the scores s_ij of the pairs of candidates of B prompts, P(i preferred to j) = sigmoid(s_ij).

    s_ji = -s_ij, and nothing else ties the scores together: i may beat j, j beat k and k beat i. The matrices are what
    preference games take; `RewardBelief.preference_matrix` is the same of a belief about rewards.

    Attributes:
        scores: Joint belief about the scores, shape `(B, 1 + K (K - 1) / 2)`: first a score that is 0, then those of
            the pairs (0, 1), (0, 2), (1, 2), (0, 3), ...; `posterior.predict_preferences` makes it.
        mask: True for real candidates, shape `(B, K)`.

    Raises:
        ArgumentError: The number of scores is not that of the pairs of K candidates.

    Example:
        >>> scores = RewardBelief(torch.tensor([[0.0, 2.0, -2.0, 2.0]]), torch.zeros(1, 4, 1))
        >>> PreferenceBelief(scores, torch.ones(1, 3, dtype=torch.bool)).preference_matrix()[0]
        tensor([[0.5000, 0.8808, 0.1192],
                [0.1192, 0.5000, 0.8808],
                [0.8808, 0.1192, 0.5000]])
    """

    scores: RewardBelief
    mask: Bool[Tensor, "prompts candidates"]

    def __post_init__(self) -> None:
        prompts, k = self.mask.shape
        wanted = (prompts, 1 + k * (k - 1) // 2)
        if tuple(self.scores.mean.shape) != wanted:
            raise ArgumentError(
                f"`scores` has shape {tuple(self.scores.mean.shape)}; for {k} candidates it must be {wanted}"
            )

    @classmethod
    def from_rewards(cls, belief: RewardBelief) -> "PreferenceBelief":
        """The belief about the scores r_i - r_j, which have no cycles.

        Example:
            >>> rewards = RewardBelief(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 1))
            >>> PreferenceBelief.from_rewards(rewards).preference_matrix()[0, 0, 1]
            tensor(0.7311)
        """
        i, j = pairs_of(belief.mean.shape[1])
        pad = torch.nn.functional.pad
        mask = pad(belief.valid[:, i] & belief.valid[:, j], (1, 0), value=True)
        if belief.draws is not None:
            return cls(
                RewardBelief.from_draws(pad(belief.draws[:, :, i] - belief.draws[:, :, j], (1, 0)), mask), belief.valid
            )
        root = pad(belief.root[:, i] - belief.root[:, j], (0, 0, 1, 0))
        return cls(RewardBelief(pad(belief.mean[:, i] - belief.mean[:, j], (1, 0)), root, mask), belief.valid)

    @classmethod
    def from_scores(cls, scores: RewardBelief, sizes: Sequence[int]) -> "PreferenceBelief":
        """The belief about prompts with `sizes` candidates each, whose pairs `scores` holds."""
        mask = torch.arange(max(sizes)) < torch.tensor(list(sizes))[:, None]
        return cls(scores, mask)

    @property
    def num_prompts(self) -> int:
        """Number of prompts B."""
        return int(self.mask.shape[0])

    def preference_matrix(self) -> Float[Tensor, "prompts candidates candidates"]:
        """E[sigmoid(s_ij)]: entries (i, j) and (j, i) sum to 1, the diagonal is 1/2; 0 for masked candidates."""
        if self.scores.draws is not None:
            return self._matrices(torch.sigmoid(self.scores.draws).mean(0))
        mean, std = self.scores.mean, self.scores.std
        return self._matrices(_expected_sigmoid(mean, std))

    def prob_better(self) -> Float[Tensor, "prompts candidates candidates"]:
        """P(s_ij > 0), the probability that i is the better of the two; one half on the diagonal, 0 for masked ones."""
        if self.scores.draws is not None:
            return self._matrices(0.5 * (1.0 + self.scores.draws.sign()).mean(0))
        mean, std = self.scores.mean, self.scores.std
        known = 0.5 * (1.0 + mean.sign())
        return self._matrices(torch.where(std > 0, torch.special.ndtr(mean / std.clamp_min(1e-300)), known))

    def sample(self, num_samples: int, *, seed: int) -> Float[Tensor, "draws prompts candidates candidates"]:
        """Joint draws of the preference probabilities, shape `(num_samples, B, K, K)`."""
        return self._matrices(torch.sigmoid(self.scores.sample(num_samples, seed=seed)))

    def _matrices(self, upper: Tensor) -> Tensor:
        """Square matrices from the probabilities of the pairs i < j, shape `(..., B, pairs + 1)`."""
        k = self.mask.shape[1]
        i, j = pairs_of(k)
        matrix = upper.new_full((*upper.shape[:-1], k, k), 0.5)
        matrix[..., i, j] = upper[..., 1:]
        matrix[..., j, i] = 1.0 - upper[..., 1:]
        return torch.where(self.mask[:, :, None] & self.mask[:, None, :], matrix, 0.0)

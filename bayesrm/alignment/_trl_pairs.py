"""Preference pairs with what is believed about them."""

import collections
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import datasets
from jaxtyping import Int
from torch import Tensor

from ..beliefs import RewardBelief
from ..data.rendering import Content
from ..errors import ArgumentError
from ._trl_candidates import as_trl, conversational
from ._trl_groups import content_key

_COLUMNS = ("prompt", "chosen", "rejected", "probability", "margin_mean", "margin_std")


class LeftOut(enum.StrEnum):
    """Why a prompt has no pair, or one pair fewer."""

    ONE_RESPONSE = "one response"
    """All its candidates are equal."""
    SAME_RESPONSE = "same response"
    """The response that would be rejected is the chosen one."""
    UNCERTAIN = "uncertain"
    """It is not probable enough that the chosen response is better."""


@dataclasses.dataclass(frozen=True)
class PreferencePairs:
    """Preference pairs, and what was left out.

    Attributes:
        dataset: The pairs, in TRL's preference format with explicit prompts: `prompt`, `chosen`, `rejected`; and with
            `probability`, P(chosen is better) by the belief, and `margin_mean` and `margin_std`, mean and standard
            deviation of the chosen response's reward less the rejected one's.
        left_out: Index of the prompt and reason, for each pair left out.

    Example:
        >>> print(PreferencePairs(datasets.Dataset.from_list([]), ((4, LeftOut.UNCERTAIN), (7, LeftOut.UNCERTAIN))))
        0 pairs; left out 2 (2 uncertain)
    """

    dataset: datasets.Dataset
    left_out: tuple[tuple[int, LeftOut], ...] = ()

    def __str__(self) -> str:
        counts = collections.Counter(reason.value for _, reason in self.left_out)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"{len(self.dataset)} pairs; left out {len(self.left_out)}" + (f" ({reasons})" if reasons else "")


class Collected:
    """Pairs as they come, and reasons of those left out."""

    def __init__(
        self, prompts: Sequence[Content], candidates: Sequence[Sequence[Content]], min_probability: float
    ) -> None:
        if not 0.0 <= min_probability <= 1.0:
            raise ArgumentError(f"`min_probability` is {min_probability}; a probability lies in [0, 1]")
        self._prompts = prompts
        self._candidates = candidates
        self._min_probability = min_probability
        self._as_messages = conversational(prompts, candidates)
        self._rows: list[dict[str, Any]] = []
        self._left_out: list[tuple[int, LeftOut]] = []

    def add(self, start: int, belief: RewardBelief, pairs: Int[Tensor, "pairs 3"]) -> None:
        """Adds pairs: the prompt's place in the belief, the chosen and the rejected candidate."""
        b, both = pairs[:, 0], pairs[:, 1:]
        rows = b[:, None]
        about = RewardBelief(
            belief.mean[rows, both],
            belief.root[rows, both],
            draws=None if belief.draws is None else belief.draws[:, rows, both],
        )
        probability = about.prob_better()[:, 0, 1].tolist()
        margin = about.differences(baseline=1)
        numbers = zip(pairs.tolist(), probability, margin.mean[:, 0].tolist(), margin.std[:, 0].tolist(), strict=True)
        for (place, chosen, rejected), p, mean, std in numbers:
            prompt, texts = self._prompts[start + place], self._candidates[start + place]
            if len({content_key(text) for text in texts}) == 1:
                self._left_out.append((start + place, LeftOut.ONE_RESPONSE))
            elif content_key(texts[chosen]) == content_key(texts[rejected]):
                self._left_out.append((start + place, LeftOut.SAME_RESPONSE))
            elif p < self._min_probability:
                self._left_out.append((start + place, LeftOut.UNCERTAIN))
            else:
                row = as_trl(self._as_messages, prompt=prompt, chosen=texts[chosen], rejected=texts[rejected])
                self._rows.append({**row, "probability": p, "margin_mean": mean, "margin_std": std})

    def pairs(self) -> PreferencePairs:
        """All of them."""
        columns = {name: [row[name] for row in self._rows] for name in _COLUMNS}
        return PreferencePairs(datasets.Dataset.from_dict(columns), tuple(self._left_out))

"""One chosen and one rejected response a prompt."""

import enum
from collections.abc import Sequence

import torch

from ..data.rendering import Content
from ..errors import ArgumentError
from ..selection import RiskAverse, Rule
from ._scoring import Predicts
from ._trl_candidates import are_different, first_best, read_candidates
from ._trl_groups import derived_seed, utilities
from ._trl_pairs import Collected, PreferencePairs


class Rejected(enum.StrEnum):
    """Which response of a prompt is the rejected one."""

    WORST = "worst"
    """The one with the lowest score."""
    RANDOM = "random"
    """Any other than the chosen one, with equal chances."""


def preference_dataset(
    posterior: Predicts,
    prompts: Sequence[Content],
    candidates: Sequence[Sequence[Content]],
    *,
    chosen_rule: Rule | None = None,
    rejected: str | Rule = "worst",
    min_probability: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> PreferencePairs:
    """A chosen and a rejected response of each prompt, for `DPOTrainer` and others; for texts see `best_of_n_dataset`.

    Args:
        posterior: Predicts the rewards.
        prompts: Texts or messages.
        candidates: For each prompt its responses.
        chosen_rule: The response with the highest score is chosen; `RiskAverse()` by default. One that draws does so
            for each prompt by its text.
        rejected: `"worst"`, the response with the lowest score; `"random"`, any other; or another rule, whose lowest
            score is rejected: what is worst even for an optimist, for instance.
        min_probability: Pairs whose probability that the chosen response is better lies below are left out.
        seed: Seed of `"random"`.
        progress: Whether to show progress.

    Raises:
        ArgumentError: The arguments do not fit together, or a rule returns something else than scores.
        DataError: A candidate has no words.

    Example:
        >>> import torch, bayesrm as brm
        >>> class Length:
        ...     def predict(self, prompts, candidates):
        ...         mean = torch.tensor([[float(len(text)) for text in texts] for texts in candidates])
        ...         return brm.RewardBelief(mean, torch.diag_embed(torch.ones_like(mean)))
        >>> pairs = preference_dataset(Length(), ["A colour?"], [["Red", "Blue", "Yellow"]])
        >>> [(row["chosen"], row["rejected"], round(row["probability"], 3)) for row in pairs.dataset]
        [('Yellow', 'Red', 0.983)]
    """
    if isinstance(rejected, str) and rejected not in list(Rejected):
        raise ArgumentError(f"`rejected` is {rejected!r}; it is one of {[str(r) for r in Rejected]}, or a rule")
    chosen_rule = RiskAverse() if chosen_rule is None else chosen_rule
    collected = Collected(prompts, candidates, min_probability)
    for start, keys, belief in read_candidates(posterior, prompts, candidates, progress):
        scores = utilities(chosen_rule, belief, keys)
        chosen = first_best(belief, scores)
        if not isinstance(rejected, str):
            scores = utilities(rejected, belief, keys)
        other = first_best(belief, -scores)
        if rejected == Rejected.RANDOM:
            for b, key in enumerate(keys):
                other[b] = _any_other(candidates[start + b], int(chosen[b]), derived_seed(seed, 0, key))
        rows = torch.arange(len(keys), device=chosen.device)
        collected.add(start, belief, torch.stack([rows, chosen, other], dim=1))
    return collected.pairs()


def _any_other(texts: Sequence[Content], chosen: int, seed: int) -> int:
    """A candidate that differs from the chosen one, with equal chances; the chosen one itself if none does."""
    chances = are_different(texts)[chosen].double()
    if not bool(chances.any()):
        return chosen
    return int(chances.multinomial(1, generator=torch.Generator().manual_seed(seed)))

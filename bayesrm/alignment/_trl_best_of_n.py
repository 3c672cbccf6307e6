"""Best-of-n picks as a data set for supervised fine-tuning."""

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from ..data.rendering import Content
from ..selection import RiskAverse, Rule
from ._scoring import Predicts
from ._trl_candidates import as_trl, conversational, first_best, read_candidates
from ._trl_groups import utilities


def best_of_n_dataset(
    posterior: Predicts,
    prompts: Sequence[Content],
    candidates: Sequence[Sequence[Content]],
    rule: Rule | None = None,
    *,
    progress: bool = False,
) -> datasets.Dataset:
    """The pick of each prompt, in TRL's prompt-completion format, for `SFTTrainer`.

    Texts stay as they are: TRL puts a completion right behind its prompt. Where a prompt or a candidate is a list of
    messages, all become messages.

    Args:
        posterior: Predicts the rewards.
        prompts: Texts or messages.
        candidates: For each prompt its responses.
        rule: Scores them, `RiskAverse()` by default; one that draws does so for each prompt by its text.
        progress: Whether to show progress.

    Returns:
        Columns `prompt` and `completion`; `candidate`, the place of the pick; `reward_mean`, and `reward_std`, the
        standard deviation of its deviation from the candidates' mean.

    Raises:
        ArgumentError: The arguments do not fit together, or the rule returns something else than scores.
        DataError: A candidate has no words.

    Example:
        >>> import torch, bayesrm as brm
        >>> class Length:
        ...     def predict(self, prompts, candidates):
        ...         mean = torch.tensor([[float(len(text)) for text in texts] for texts in candidates])
        ...         return brm.RewardBelief(mean, torch.zeros(*mean.shape, 1))
        >>> best_of_n_dataset(Length(), ["Name a colour."], [["Red", "Blue"]])["completion"][0]
        'Blue'
    """
    rule = RiskAverse() if rule is None else rule
    as_messages = conversational(prompts, candidates)
    rows: list[dict[str, Any]] = []
    for start, keys, belief in read_candidates(posterior, prompts, candidates, progress):
        scores = utilities(rule, belief, keys)
        picks = first_best(belief, scores)
        at = torch.arange(len(picks), device=picks.device), picks
        means, stds = belief.mean[at].tolist(), belief.differences().std[at].tolist()
        for b, (pick, mean, std) in enumerate(zip(picks.tolist(), means, stds, strict=True)):
            prompt, completion = prompts[start + b], candidates[start + b][pick]
            texts = as_trl(as_messages, prompt=prompt, completion=completion)
            rows.append({**texts, "candidate": pick, "reward_mean": mean, "reward_std": std})
    return datasets.Dataset.from_list(rows)

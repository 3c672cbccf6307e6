"""Preference pairs drawn by posterior weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.rendering import Content
from ..errors import ArgumentError
from ..selection import RiskAverse, Rule
from ._scoring import Predicts
from ._trl_candidates import are_different, read_candidates
from ._trl_groups import derived_seed, utilities
from ._trl_pairs import Collected, PreferencePairs


def weighted_preference_dataset(
    posterior: Predicts,
    prompts: Sequence[Content],
    candidates: Sequence[Sequence[Content]],
    *,
    temperature: float | None = None,
    log_weights: Float[Tensor, "prompts candidates"] | None = None,
    utility: Rule | None = None,
    pairs_per_prompt: int = 4,
    min_probability: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> PreferencePairs:
    """Several pairs of each prompt: a response drawn by its posterior weight against one of the others.

    The chosen response comes from what the candidates become when their distribution is tilted by
    `exp(utility / temperature)` (soft best-of-n, Verdun et al., 2505.03156), the rejected one from those that differ
    from it, with equal chances. A pair may be drawn repeatedly, and is then repeated in the data: that is its weight.
    Some pairs have a chosen response that is probably worse; `min_probability=0.5` leaves those out, and then the
    chosen responses no longer follow the weights. Draws depend on the seed and the prompt, not on its place.

    Args:
        posterior: Predicts the rewards.
        prompts: Texts or messages.
        candidates: For each prompt its responses, drawn from the policy that is to be tilted.
        temperature: In units of reward; small values choose the best alone.
        log_weights: In place of `temperature` and `utility`, log weights of the candidates up to a constant for each
            prompt, such as importance weights of a posterior over responses; what stands beyond a prompt's candidates
            is not looked at.
        utility: Scores the candidates, `RiskAverse()` by default.
        pairs_per_prompt: Pairs to draw.
        min_probability: Pairs whose probability that the chosen response is better lies below are left out.
        seed: Seed of the draws.
        progress: Whether to show progress.

    Raises:
        ArgumentError: The arguments do not fit together, or the utility returns something else than scores.
        DataError: A candidate has no words.

    Example:
        >>> import torch, bayesrm as brm
        >>> class Length:
        ...     def predict(self, prompts, candidates):
        ...         mean = torch.tensor([[float(len(text)) for text in texts] for texts in candidates])
        ...         return brm.RewardBelief(mean, torch.zeros(*mean.shape, 1))
        >>> pairs = weighted_preference_dataset(Length(), ["A colour?"], [["Red", "Yellow"]], temperature=0.1)
        >>> print(pairs, set(pairs.dataset["chosen"]))
        4 pairs; left out 0 {'Yellow'}
    """
    if (temperature is None) == (log_weights is None):
        raise ArgumentError("give either `temperature` or `log_weights`")
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"`temperature` is {temperature}; it is positive")
    if log_weights is not None and utility is not None:
        raise ArgumentError("`utility` has no effect beside `log_weights`; give one of the two")
    if pairs_per_prompt < 1:
        raise ArgumentError(f"`pairs_per_prompt` is {pairs_per_prompt}; at least 1 is needed")
    sizes = [len(texts) for texts in candidates]
    if log_weights is not None and log_weights.shape != (len(prompts), max(sizes, default=0)):
        raise ArgumentError(
            f"`log_weights` has shape {tuple(log_weights.shape)}; expected {(len(prompts), max(sizes, default=0))}"
        )
    utility = RiskAverse() if utility is None else utility
    collected = Collected(prompts, candidates, min_probability)
    for start, keys, belief in read_candidates(posterior, prompts, candidates, progress):
        logits = utilities(utility, belief, keys) / temperature if temperature is not None else None
        drawn = []
        for b, key in enumerate(keys):
            size = sizes[start + b]
            row = logits[b] if logits is not None else log_weights[start + b]  # type: ignore[index]
            weights = row[:size].detach().cpu().double().softmax(0)
            if not bool(torch.isfinite(weights).all()):
                raise ArgumentError(f"the weights of prompt {start + b} cannot be normalised: {row[:size].tolist()}")
            generator = torch.Generator().manual_seed(derived_seed(seed, 0, key))
            different = are_different(candidates[start + b]).double()
            chosen = weights.multinomial(pairs_per_prompt, replacement=True, generator=generator)
            some = bool(different.any())
            other = different[chosen].multinomial(1, generator=generator)[:, 0] if some else chosen
            drawn.append(torch.stack([torch.full_like(chosen, b), chosen, other], dim=1))
        collected.add(start, belief, torch.cat(drawn).to(belief.mean.device))
    return collected.pairs()

"""A language model that rewrites responses into better ones; where it would write otherwise, tokens lose reward.

Sequence-to-sequence reward modelling: Zhou et al., 2409.00162; it learns from comparisons or human corrections.
"""

from typing import Any

import bayesrm as brm


def build(
    *,
    model: str = "gpt2",
    rank: int = 8,
    targets: tuple[str, ...] | None = None,
    max_prompt_tokens: int = 512,
    max_response_tokens: int = 256,
    precision: float = 1.0,
    **scores: Any,
) -> brm.programs.LanguageFeedback:
    """Declares the program.

    Args:
        model: Folder of a language model (a decoder, or an encoder with one), or its id on the Hugging Face hub.
        rank: Rank of the adapters; 0 trains the whole model.
        targets: Names of the modules that get adapters; None for the usual ones of the architecture.
        max_prompt_tokens: Most tokens of the prompt.
        max_response_tokens: Most tokens of a response, read and written.
        precision: Prior precision of every weight, around the initialisation.
        scores: Weights of the two mappings, and how tokens are scored, see `bayesrm.programs.LanguageFeedback`.
    """
    corrector = brm.rewards.Corrector(model, rank=rank, target_modules=targets, max_prompt_tokens=max_prompt_tokens,
                                      max_response_tokens=max_response_tokens)  # fmt: skip
    return brm.programs.LanguageFeedback(corrector=corrector, prior=brm.priors.Gaussian(precision), **scores)

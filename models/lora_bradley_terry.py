"""The usual reward model of RLHF as a probabilistic program: a language model with adapters, pairs without ties.

Reward models with a posterior over their adapters: Yang et al., "Bayesian reward models for LLM alignment", 2402.13210;
rank, scale and dropout are those of their "Bayesian low-rank adaptation", 2308.13111. Every other program takes
adapters too, by its flag lora_rank.
"""

import bayesrm as brm


def build(
    *,
    encoder: str = "gpt2",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.1,
    targets: tuple[str, ...] | None = None,
    max_length: int = 512,
    precision: float = 1.0,
    temperature: float = 1.0,
) -> brm.RewardModel:
    """Declares the program.

    Args:
        encoder: Folder of a language model, encoder or decoder, or its id on the Hugging Face hub.
        rank: Rank of the adapters.
        alpha: Adapters are multiplied by alpha / rank.
        dropout: Dropout on the input of the adapters while training.
        targets: Names of the modules that get adapters; None for the usual ones of the architecture.
        max_length: Most tokens of prompt and response together.
        precision: Prior precision of every weight, around the initialisation.
        temperature: Scale of the noise of a choice, in units of reward.
    """
    reward = brm.rewards.LoRA(
        encoder, rank=rank, alpha=alpha, dropout=dropout, max_length=max_length, target_modules=targets
    )
    likelihood = brm.likelihoods.BradleyTerry(temperature=temperature)
    return brm.RewardModel(reward, likelihood, brm.priors.Gaussian(precision=precision))

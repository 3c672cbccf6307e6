"""Rewards of tokens from a language model: AVA-p on preferences, AVA-d on demonstrations.

Cai et al., "Approximated variational Bayesian inverse reinforcement learning for large language model alignment",
2411.09341. The engine is `inference/ava.py`.
"""

import bayesrm as brm


def build(
    *,
    model: str = "gpt2",
    rank: int = 8,
    targets: tuple[str, ...] | None = None,
    values: str = "head",
    max_prompt_tokens: int = 384,
    max_new_tokens: int = 256,
    precision: float = 1.0,
    discount: float = 1.0,
    rationality: float = 1.0,
    temperature: float = 1.0,
) -> brm.InverseRL:
    """Declares the program.

    Args:
        model: Folder of a causal language model, or its id on the Hugging Face hub.
        rank: Rank of the adapters; 0 trains the whole model.
        targets: Names of the modules that get adapters; None for the usual ones of the architecture.
        values: Where the value of a state comes from, head or logits.
        max_prompt_tokens: Most tokens of a prompt.
        max_new_tokens: Most tokens of a response.
        precision: Prior precision of the reward of a token.
        discount: What the reward of the next token is worth now.
        rationality: Inverse temperature of whoever writes.
        temperature: Scale of the noise of a choice, in units of reward.
    """
    reward = brm.rewards.TokenReward(model, rank=rank, target_modules=targets, values=values,
                                     max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)  # fmt: skip
    likelihood, prior = brm.likelihoods.BradleyTerry(temperature=temperature), brm.priors.Gaussian(precision)
    return brm.InverseRL(reward, likelihood, prior, discount=discount, rationality=rationality)

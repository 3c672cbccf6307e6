"""Markov chains by the no-U-turn sampler: exact up to Monte Carlo error, to judge every approximation by.

Hoffman & Gelman (2014), 1111.4246, as NumPyro runs it; for heads on features and for the tangent of
adapters. Needs the extra `jax`, or `--engine.backend pyro`, which is slow.
"""

import bayesrm as brm


def build(
    *,
    num_chains: int = 4,
    num_warmup: int = 500,
    num_samples: int = 500,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    mass_matrix: str = "auto",
    chain_method: str = "sequential",
    backend: str = "numpyro",
    memory_gib: float = 8.0,
) -> brm.NUTS:
    """Makes the engine.

    Args:
        num_chains: Chains, each from a start of its own.
        num_warmup: Steps of each chain that adapt the sampler.
        num_samples: Draws kept from each chain.
        target_accept: Mean acceptance probability; raise it where chains diverge.
        max_tree_depth: A trajectory has at most 2^max_tree_depth steps.
        mass_matrix: auto, laplace (fixed), diagonal or dense (adapted).
        chain_method: sequential or vectorized.
        backend: numpyro or pyro.
        memory_gib: Refuse to start work that needs more memory than this.
    """
    return brm.NUTS(
        num_chains=num_chains, num_warmup=num_warmup, num_samples=num_samples, target_accept=target_accept,
        max_tree_depth=max_tree_depth, mass_matrix=mass_matrix, chain_method=chain_method, backend=backend,
        memory_gib=memory_gib,
    )  # fmt: skip

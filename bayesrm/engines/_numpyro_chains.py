"""Chains of NumPyro's no-U-turn sampler, compiled once for all data of one shape."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..backend import convert
from ._jax_density import arrays_of, density_of, double_precision
from ._problem import Problem

if TYPE_CHECKING:
    from .nuts import NUTS

#: What is kept of every step.
_STATISTICS = ("diverging", "num_steps", "accept_prob", "energy", "potential_energy")


def run_chains(
    settings: "NUTS", problem: Problem, starts: Tensor, covariance: Tensor | None, *, seed: int, progress: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of x, shape `(chains * draws, R + Q)`, chain after chain, with what was recorded for each.

    Args:
        settings: The engine.
        problem: The program in whitened coordinates.
        starts: A start for each chain, shape `(chains, R + Q)`.
        covariance: Inverse mass matrix to keep, shape `(R + Q, R + Q)`; adapted when `None`.
        seed: Seed.
        progress: Whether to show progress.
    """
    with double_precision():
        import jax

        density, compiled = density_of(problem)
        like = jax.numpy.zeros(0)
        tree = arrays_of(problem).tree()
        metric = None if covariance is None else convert(covariance, like)
        together = settings.chain_method == "vectorized"
        chunk = _chunk(settings, progress)
        key = (
            *(settings.num_warmup, settings.target_accept, settings.max_tree_depth, settings.mass_matrix),
            *(metric is None, chunk, settings.num_chains if together else None),
        )
        if key not in compiled:
            compiled[key] = _compile(settings, density, metric is not None, chunk, together)
        start, advance = compiled[key]
        keys = jax.random.split(jax.random.PRNGKey(seed), settings.num_chains)
        where = convert(starts, like)
        runs = [(keys, where)] if together else list(zip(keys, where, strict=True))
        total = settings.num_warmup + settings.num_samples
        draws: list[np.ndarray] = []
        records: list[np.ndarray] = []
        with tqdm(total=total * settings.num_chains, unit="step", disable=not progress) as bar:
            for random, initial in runs:
                state = start(random, initial, metric, tree)
                parts = []
                for _ in range(total // chunk):
                    state, part = advance(state, tree)
                    parts.append(jax.block_until_ready(part))
                    bar.update(chunk * (settings.num_chains if together else 1))
                kept = [np.concatenate(p)[settings.num_warmup :] for p in zip(*parts, strict=True)]
                # Steps come first and chains second when they ran together; every chain is to be in one piece.
                kept = [np.swapaxes(k, 0, 1).reshape(-1, *k.shape[2:]) if together else k for k in kept]
                draws.append(kept[0])
                records.append(kept[1])
        x, record = (torch.from_numpy(np.concatenate(parts)) for parts in (draws, records))
        found = dict(zip(_STATISTICS, record.T.contiguous(), strict=True))
        return x, found | {"diverging": found["diverging"].bool(), "num_steps": found["num_steps"].long()}


def _chunk(settings: "NUTS", progress: bool) -> int:
    """Steps in one compiled call: everything, or about a twentieth to show progress."""
    total = settings.num_warmup + settings.num_samples
    if not progress:
        return total
    return max(size for size in range(1, max(1, total // 20) + 1) if total % size == 0)


def _compile(
    settings: "NUTS", density: Callable[[Any, tuple[Any, ...]], Any], given: bool, chunk: int, together: bool
) -> tuple[Any, Any]:
    """Compiled functions that start chains and advance them by `chunk` steps."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer.hmc import hmc

    def potential(tree: tuple[Any, ...]) -> Any:
        return lambda x: -density(x, tree)

    initialise, step = hmc(potential_fn_gen=potential, algo="NUTS")

    def start(key: Any, x: Any, metric: Any, tree: tuple[Any, ...]) -> Any:
        return initialise(
            x,
            num_warmup=settings.num_warmup,
            inverse_mass_matrix=metric,
            adapt_mass_matrix=not given,
            dense_mass=given or settings.mass_matrix == "dense",
            target_accept_prob=settings.target_accept,
            max_tree_depth=settings.max_tree_depth,
            model_args=(tree,),
            rng_key=key,
        )

    def advance(state: Any, tree: tuple[Any, ...]) -> Any:
        moved = jax.vmap(step, in_axes=(0, None)) if together else step

        def one(state: Any, _: None) -> Any:
            state = moved(state, (tree,))
            # One array a step: writing many small ones would cost as much as a step of a small model.
            recorded = jnp.stack([jnp.asarray(getattr(state, name), state.z.dtype) for name in _STATISTICS], axis=-1)
            return state, (state.z, recorded)

        return jax.lax.scan(one, state, None, length=chunk)

    begin = jax.vmap(start, in_axes=(0, 0, None, None)) if together else start
    return jax.jit(begin), jax.jit(advance)

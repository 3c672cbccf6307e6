"""Draws of adapter weights from a posterior, as adapters that peft and servers load."""

from collections.abc import Iterator
from pathlib import Path

import torch

from .._typing import Tensor
from ..errors import PersistenceError
from ..rewards.tangent import Tangent


def weight_draws(tangent: Tangent, z: Tensor, *, seed: int, rest: bool) -> Iterator[Tensor]:
    """Weights of the tangent's uncertain sites, shape `(P,)`, for each draw of its coordinates `(draws, R)`.

    Args:
        tangent: The tangent.
        z: Draws of the coordinates.
        seed: Seed of what lies outside them.
        rest: Whether to draw that too; otherwise it stays at its mean.
    """
    generator = torch.Generator().manual_seed(seed)
    for one in z:
        weights = tangent.to_weights(one)
        if rest and tangent.uncertain_rest:
            noise = torch.randn(len(tangent.scale), generator=generator, dtype=torch.float64).to(tangent.scale)[None]
            outside: Tensor | None = noise
            if tangent.rest is not None:
                outside = tangent.rest.root(noise[None])[0].to(noise)
            elif tangent.subspace is not None and tangent.subspace.size:
                outside = tangent.subspace.outside(noise, tangent.subspace.coordinates(noise))
            if outside is not None:
                weights = weights + tangent.scale * outside[0]
        yield weights


def save_draws(tangent: Tangent, draws: Iterator[Tensor], folder: Path) -> list[Path]:
    """Writes each draw to `folder/draw-<number>` in the format of peft; the network is as before afterwards."""
    # Other threads must not see the network at a draw.
    with tangent.network.lock:
        return _save_draws(tangent, draws, folder)


def _save_draws(tangent: Tangent, draws: Iterator[Tensor], folder: Path) -> list[Path]:
    network = tangent.network
    kept = network.theta()
    places, start = {}, 0
    for site, parameter in network.sites.items():
        places[site] = slice(start, start + parameter.numel())
        start += parameter.numel()
    paths = []
    try:
        for number, weights in enumerate(draws):
            theta = kept.clone()
            parts = weights.split([network.sites[site].numel() for site in tangent.sites])
            for site, part in zip(tangent.sites, parts, strict=True):
                theta[places[site]] = part.to(theta)
            network.set_theta(theta)
            path = folder / f"draw-{number:03d}"
            try:
                network.save_adapter(path)
            except OSError as error:
                raise PersistenceError(f"cannot write an adapter to {path}: {error}") from error
            paths.append(path)
    finally:
        network.set_theta(kept)
    return paths

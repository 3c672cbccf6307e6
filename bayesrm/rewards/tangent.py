"""The tangent of a language-model reward at its trained weights: linear, so that every engine for heads serves it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._typing import Array, Tensor
from ..beliefs import covariance_root
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from ..errors import ArgumentError
from ._subspaces import Covariance, Subspace
from .heads import SelfFeaturedHead
from .jacobians import per_sample_jacobian
from .lora_network import LoRANetwork

#: Derivatives of about this many numbers are in memory at one time.
_CHUNK = 2**26


@dataclasses.dataclass(frozen=True)
class TangentFeatures:
    """What a tangent model knows of items.

    Attributes:
        values: First column the reward at z = 0, then the coordinates, float64, shape `(items, 1 + R)`.
        outside: Factor of the covariance that rewards of items of one prompt have whatever z is, float64, shape
            `(items, largest number of items of a prompt)`; `None` if there is none. Rows of different prompts have
            nothing to do with each other.
    """

    values: Tensor
    outside: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tangent(SelfFeaturedHead):
    """r(x) = r(x; theta_0) + J(x) (theta - theta_0), theta = center + scale * (directions' z + rest), z ~ N(0, I).

    A head in z: `RewardModel(tangent, likelihood, priors.Gaussian(1.0))` is a linear model, which every engine for
    heads fits. Whitened by the prior, the posterior of theta differs from the prior only in the row space of the
    training comparisons' derivatives, so that nothing is lost where z spans it; the rest keeps the prior and adds its
    covariance to predictions. Linearised Laplace: Immer et al., 2008.08400; on LoRA weights: Yang et al., 2308.13111.

    Fitting a `LoRA` reward by `Laplace` makes one: `posterior.program.reward`. The program around it can be fitted
    again by any other engine, `bayesrm.fit(posterior.program, data, inference=...)`.

    Attributes:
        network: The network, with the weights theta_0 at which it is linearised.
        sites: Parameter sites that are uncertain, in the order of the network; the others are fixed.
        center: Mean of their weights at z = 0, shape `(P,)`.
        scale: Prior standard deviation of their weights, shape `(P,)`.
        subspace: Directions of z; `None` for none.
        rest: Covariance of what z does not hold; by default the prior's.
        uncertain_rest: Whether that covariance enters predictions.
        batch_size: Sequences that go through the network together in predictions.
    """

    network: LoRANetwork
    sites: tuple[str, ...]
    center: Tensor
    scale: Tensor
    subspace: Subspace | None
    rest: Covariance | None = None
    uncertain_rest: bool = True
    batch_size: int = 16

    @property
    def num_features(self) -> int:
        """1 + R."""
        return 1 + (0 if self.subspace is None else self.subspace.size)

    @property
    def title(self) -> str:
        """`"LoRA"`."""
        return "LoRA"

    def parameter_shapes(self, num_features: int) -> dict[str, tuple[int, ...]]:
        """`{"z": (R,)}`."""
        return {"z": (num_features - 1,)}

    def apply(self, parameters: Mapping[str, Array], features: Array) -> Any:
        """Rewards, shape `(...,)`, of features of shape `(..., 1 + R)`."""
        return features[..., 0] + features[..., 1:] @ parameters["z"]

    def to_weights(self, z: Tensor) -> Tensor:
        """Weights of the uncertain sites at coordinates z, the rest at its mean, shape `(P,)`."""
        if self.subspace is None or not self.subspace.size:
            return self.center
        return self.center + self.scale * self.subspace.directions(z.to(self.scale.device)).to(self.scale.dtype)

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> np.ndarray:
        """Values of items, shape `(items, 1 + R)`; see `encode` for what lies outside the coordinates."""
        values: np.ndarray = self.encode(
            self.network.tokenize(prompts, responses), None, progress=progress
        ).values.numpy()
        return values

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> np.ndarray:
        """Values of the items of comparisons, shape `(items, 1 + R)`."""
        values: np.ndarray = self.encode(self.network.tokenize_items(data), None, progress=progress).values.numpy()
        return values

    def encode_items(self, data: Comparisons, *, progress: bool = False) -> TangentFeatures:
        """Features of the items of comparisons, in their order."""
        prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
        order = torch.argsort(prompt, stable=True)
        sizes = torch.unique(prompt, return_counts=True)[1].tolist()
        sequences = self.network.tokenize_items(data)
        found = self.encode([sequences[i] for i in order.tolist()], sizes, progress=progress)
        back = torch.argsort(order)
        return TangentFeatures(found.values[back], None if found.outside is None else found.outside[back])

    def encode_features(self, features: Tensor, sizes: Sequence[int] | None) -> TangentFeatures:
        """Refuses arrays.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError("`candidates` are arrays of features; this reward reads texts, give lists of responses")

    def encode_texts(
        self, prompts: Sequence[Content], responses: Sequence[Content], sizes: Sequence[int], *, start: int = 0
    ) -> TangentFeatures:
        """Features of prompts and responses, `sizes` of them to a prompt in turn; errors count items from `start`."""
        return self.encode(self.network.tokenize(prompts, responses, start=start), sizes)

    def without_rest(self) -> "Tangent":
        """The same tangent with no covariance outside its coordinates."""
        return dataclasses.replace(self, uncertain_rest=False)

    def encode(
        self, sequences: Sequence[np.ndarray], sizes: Sequence[int] | None, *, progress: bool = False
    ) -> TangentFeatures:
        """Features of token sequences.

        Args:
            sequences: Token sequences, items of one prompt next to each other.
            sizes: Number of items of each prompt in turn; `None` leaves out what lies outside the coordinates.
            progress: Whether to show progress.
        """
        wants = self.uncertain_rest and sizes is not None
        values = torch.zeros(len(sequences), self.num_features, dtype=torch.float64)
        roots: list[Tensor] = []
        shift = (self.center - self._theta_0()).to(self.scale.device)
        start = 0
        with tqdm(total=len(sequences), unit="item", disable=not progress) as bar:
            for run in whole_prompts(
                [1] * len(sequences) if sizes is None else sizes, _CHUNK // max(1, len(self.scale))
            ):
                stop = start + sum(run)
                rewards, jacobian = self._derivatives(sequences[start:stop])
                values[start:stop, 0] = (rewards.double() + (jacobian @ shift).double()).cpu()
                whitened = jacobian.mul_(self.scale)
                coordinates = None
                if self.subspace is not None and self.subspace.size:
                    coordinates = self.subspace.coordinates(whitened)
                    values[start:stop, 1:] = coordinates.double().cpu()
                if wants:
                    roots += self._roots(whitened, coordinates, run)
                start = stop
                bar.update(sum(run))
        if not any(root.numel() for root in roots):
            return TangentFeatures(values, None)
        outside = torch.zeros(len(sequences), max(len(root) for root in roots), dtype=torch.float64)
        start = 0
        for root in roots:
            outside[start : start + len(root), : len(root)] = root
            start += len(root)
        return TangentFeatures(values, outside)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save beside the network's adapter and the settings."""
        tensors = {"center": self.center, "scale": self.scale, "initial": self.network.initial_theta()}
        tensors |= {} if self.subspace is None else self.subspace.state()
        return tensors | ({} if self.rest is None else {f"rest.{k}": v for k, v in self.rest.state().items()})

    def _theta_0(self) -> Tensor:
        return torch.cat([self.center[:0], *(self.network.sites[site].detach().reshape(-1) for site in self.sites)])

    def _derivatives(self, sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Rewards `(n,)` and derivatives `(n, P)`, batches of like length at a time."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        rewards = self.scale.new_zeros(len(sequences))
        jacobian = self.scale.new_empty(len(sequences), len(self.scale))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.network.collate([sequences[i] for i in part])
            if not self.sites:
                with torch.inference_mode():
                    rewards[part] = self.network(**batch)
                continue
            rewards[part], jacobian[part] = per_sample_jacobian(self.network, batch, sites=self.sites)
        return rewards, jacobian

    def _roots(self, whitened: Tensor, coordinates: Tensor | None, run: Sequence[int]) -> list[Tensor]:
        """For each prompt a factor of the covariance of its rewards that does not come from z, shape `(K, K)`."""
        if self.rest is not None:
            return [covariance_root(self.rest.covariance(part)).cpu() for part in whitened.split(list(run))]
        outside = (
            whitened if coordinates is None or self.subspace is None else self.subspace.outside(whitened, coordinates)
        )
        if outside is None:
            return []
        roots = []
        for part in outside.split(list(run)):
            part = part.double()
            roots.append(covariance_root(part @ part.T).cpu())
        return roots


def whole_prompts(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Splits prompts into runs of at most about `limit` items."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > limit:
            yield run
            run = []
        run.append(size)
    if run:
        yield run

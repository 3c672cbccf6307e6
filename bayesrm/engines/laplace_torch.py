"""Curvature of preferences for users of laplace-torch, with one backward pass a batch and differences inside pairs.

    model = pair_model(network)                                   # a loaded `rewards.LoRA`
    batches = DataLoader(pairs, batch_size=16, collate_fn=model.collate)
    posterior = laplace.Laplace(
        model, "reward_modeling", subset_of_weights="all", hessian_structure="kron", backend=PreferenceCurvature,
        prior_mean=model.prior_mean,
    )
    posterior.fit(batches)
    mean, variance = posterior(network.collate(network.tokenize(prompts, responses)))

laplace-torch fits rewards as a classification of the two responses of a pair and predicts them as a regression. The
Kronecker factors of its own backends take every response for a datum of its own; here the bias of the head, and
whatever else the responses of a pair share, gets no curvature, as in the exact posterior. `full` and `diag` are the
same. Importing this module imports laplace-torch, which takes some seconds; the rest of this package does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from laplace.curvature import CurvatureInterface
from laplace.utils.matrix import Kron

from .._typing import Tensor
from ..errors import ArgumentError
from ..rewards.jacobians import per_sample_jacobian
from ..rewards.lora_network import LoRANetwork
from ._kron import KronFactors, unit_trace
from ._pseudo_gradients import pseudo_gradients

#: Keys under which laplace-torch looks for token ids and answers unless it is told others.
_TOKENS, _ANSWERS = "input_ids", "labels"


class PairModel(torch.nn.Module):
    """A LoRA reward model as laplace-torch wants it: rewards of pairs while fitting, of single sequences afterwards.

    Attributes:
        network: The reward model; its weights are shared, not copied.
    """

    def __init__(self, network: LoRANetwork) -> None:
        super().__init__()
        self.network = network

    @property
    def prior_mean(self) -> Tensor:
        """The initialisation, where the prior is centred, shape `(P,)`.

        laplace-torch uses it for the marginal likelihood alone; its own default, zero, would mostly measure the
        initialisation of the adapters.
        """
        sites = {id(p): site for site, p in self.network.sites.items()}
        return torch.cat([self.network.initial[sites[id(p)]].reshape(-1) for p in self.parameters() if id(p) in sites])

    def collate(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """A batch for fitting from token sequences (chosen, rejected), as `LoRANetwork.tokenize` makes them.

        Returns:
            What `LoRANetwork.collate` returns, each of shape `(B, 2, length)`, and `labels` `(B,)`, all 0: the first of
            each pair was chosen.
        """
        batch = self.network.collate([sequence for pair in pairs for sequence in pair])
        paired = {name: value.reshape(len(pairs), 2, *value.shape[1:]) for name, value in batch.items()}
        return paired | {_ANSWERS: torch.zeros(len(pairs), dtype=torch.long, device=self.network.device)}

    def sequences(self, x: Any) -> tuple[dict[str, Tensor], int]:
        """The batch `x` with every pair split in two, without answers, and the number of rewards a row: 2 or 1.

        Raises:
            ArgumentError: `x` is no mapping with token ids of shape `(B, 2, length)` or `(B, length)`.
        """
        if not isinstance(x, Mapping) or _TOKENS not in x:
            raise ArgumentError(
                f"`x` is a {type(x).__name__}; give a mapping with '{_TOKENS}' and 'attention_mask', as `collate` makes"
            )
        shape = tuple(x[_TOKENS].shape)
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != 2):
            raise ArgumentError(f"`x['{_TOKENS}']` has shape {shape}; give (B, 2, length) for pairs or (B, length)")
        width = 2 if len(shape) == 3 else 1
        kept = {name: value.to(self.network.device) for name, value in x.items() if name != _ANSWERS}
        return {name: value.flatten(0, 1) if width == 2 else value for name, value in kept.items()}, width

    def forward(self, x: Any) -> Tensor:
        """Rewards, shape `(B, 2)` for pairs and `(B, 1)` for single sequences."""
        batch, width = self.sequences(x)
        rewards: Tensor = self.network(**batch)
        return rewards.reshape(-1, width)


def pair_model(network: LoRANetwork) -> PairModel:
    """A LoRA reward model as laplace-torch wants it.

    Keep the base model in float32: laplace-torch stores its posterior in the number format of the first weight it sees.
    """
    return PairModel(network)


class PairKron(Kron):  # type: ignore[misc]
    """Kronecker factors that stay in the form (left, right of trace one) when batches are added up.

    Each factor's sum over batches is right up to a scale, which the trace of the left one tells. When it goes on with a
    fit, laplace-torch multiplies right factors by shares of the data; that is not needed here, and has no effect.
    """

    def __add__(self, other: Kron) -> "PairKron":
        """Factors of the union of two sets of data."""
        sums = []
        for mine, others in zip(self.kfacs, other.kfacs, strict=True):
            total = [mine[0] + others[0]]
            if len(mine) == 2:
                parts = [part[0].trace() * unit_trace(part[1]) for part in (mine, others)]
                total.append(unit_trace(parts[0] + parts[1]))
            sums.append(total)
        return PairKron(sums)

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> "PairKron":
        """The same curvature, `scalar` times as large."""
        return PairKron([[scalar * factors[0], *factors[1:]] for factors in self.kfacs])

    __rmul__ = __mul__


class PreferenceCurvature(CurvatureInterface):  # type: ignore[misc]
    """Curvature of preferences among the rewards of a row, as a backend of laplace-torch.

    With `pair_model(network)` Jacobians take one forward and one backward pass (`rewards.jacobians`); any other model
    that returns rewards `(B, 2)` of pairs while fitting works with those of torch.func. The likelihood is Bradley-Terry
    at temperature one, and for K > 2 rewards a row the choice of the best. The number of data does not matter: batches
    are summed.

    Raises:
        ArgumentError: The likelihood is not `reward_modeling` or `classification`, or the Laplace approximation is over
            the last layer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = _TOKENS,
        dict_key_y: str = _ANSWERS,
    ) -> None:
        if likelihood != "classification":
            raise ArgumentError(f"`likelihood` is '{likelihood}'; preferences are fitted with 'reward_modeling'")
        if last_layer:
            raise ArgumentError("`subset_of_weights` is 'last_layer'; use 'all', with only the last layer trainable")
        super().__init__(model, likelihood, False, subnetwork_indices, dict_key_x, dict_key_y)

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Derivatives of the rewards in the trainable parameters, shape `(B, K, P)`, and the rewards, shape `(B, K)`.

        `enable_backprop` keeps the graph to the input, by torch.func.
        """
        if enable_backprop or not isinstance(self.model, PairModel):
            found: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop)
            return found
        network = self.model.network
        batch, width = self.model.sequences(x)
        names = {id(p): site for site, p in network.sites.items()}
        rewards, rows = per_sample_jacobian(network, batch, sites=[names[id(p)] for p in self.params])
        jacobian = rows.reshape(-1, width, rows.shape[1])
        if self.subnetwork_indices is not None:
            jacobian = jacobian[:, :, self.subnetwork_indices]
        return jacobian, rewards.reshape(-1, width)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of a batch and its curvature, shape `(P, P)`."""
        loss, gradients = self._gradients(x, y)
        return loss, (gradients.T @ gradients).to(loss.dtype)

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, PairKron]:
        """Negative log likelihood of a batch and the Kronecker factors of its curvature, for each parameter tensor."""
        loss, gradients = self._gradients(x, y)
        factors = KronFactors.zeros({str(i): tuple(p.shape) for i, p in enumerate(self.params)}, gradients.device)
        factors.add_(gradients)
        return loss, PairKron([[f.to(loss.dtype) for f in pair] for pair in factors.normalised()])

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Negative log likelihood of a batch and the diagonal of its curvature, shape `(P,)`."""
        loss, gradients = self._gradients(x, y)
        return loss, gradients.square().sum(0).to(loss.dtype)

    def _gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log likelihood, and pseudo-gradients, shape `(n, P)`, whose outer products sum to its curvature."""
        jacobian, rewards = self.jacobians(x)
        p = rewards.double().softmax(1)
        # diag(p) - p p' from its off-diagonal: p - p^2 would be zero where one response is all but certain.
        off = (-p[:, :, None] * p[:, None, :]) * (1.0 - torch.eye(p.shape[1], dtype=p.dtype, device=p.device))
        return self.lossfunc(rewards, y).detach(), pseudo_gradients(jacobian, off - torch.diag_embed(off.sum(2)))

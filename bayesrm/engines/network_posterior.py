"""Posteriors made of draws of a language model's adapter weights: the network itself runs under each of them."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..data.rendering import Content
from ..errors import ArgumentError, ConvergenceWarning, PersistenceError
from ..programs import RewardModel
from ..rewards import LoRANetwork
from ..rewards.heads import MixtureHead
from ._schema import FeedbackSchema
from ._shared_prefix import MemberForward, swapped_weights
from .posterior import Posterior
from .report import FitReport
from .training import Training, TrainingReport


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDraws(MixtureHead):
    """A language model under S draws of its weights: the features of an item are its S rewards.

    One backbone is in memory; each batch of sequences runs under all draws before the next, and layers in front of the
    first one whose weights vary run once for all draws.

    Attributes:
        network: The network; its own weights do not count.
        draws: Weights in the order of `network.theta()`, shape `(S, P)`.
        batch_size: Sequences that go through the network together.
    """

    network: LoRANetwork
    draws: Tensor
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.draws.dim() != 2 or self.draws.shape[1] != self.network.num_parameters:
            raise ArgumentError(
                f"`draws` has shape {tuple(self.draws.shape)}; the network has {self.network.num_parameters} weights, "
                "give one row of them for each draw"
            )

    @property
    def num_features(self) -> int:
        """S."""
        return len(self.draws)

    @cached_property
    def _forward(self) -> MemberForward:
        return MemberForward(self.network, self.draws)

    def extract(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, progress: bool = False
    ) -> np.ndarray:
        """Rewards of items under each draw, shape `(items, S)`, float64."""
        values: np.ndarray = self.encode(self.network.tokenize(prompts, responses), progress=progress).numpy()
        return values

    def extract_items(self, data: Comparisons, *, progress: bool = False) -> np.ndarray:
        """Rewards of the items of comparisons under each draw, shape `(items, S)`, float64."""
        values: np.ndarray = self.encode(self.network.tokenize_items(data), progress=progress).numpy()
        return values

    def encode(self, sequences: Sequence[np.ndarray], *, progress: bool = False) -> Tensor:
        """Rewards of token sequences under each draw, shape `(n, S)`, float64."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        rewards = torch.zeros(len(sequences), len(self.draws), dtype=torch.float64)
        with tqdm(total=len(sequences), unit="item", disable=not progress) as bar:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                batch = self.network.collate([sequences[i] for i in part])
                rewards[part] = self._forward(batch).double().cpu()
                bar.update(len(part))
        return rewards


class NetworkPosterior(Posterior):
    """Equally weighted draws of adapter and head weights with the likelihood's latents, one network in memory.

    What `SVI` and `Ensemble` return for a `LoRA` reward: no linearisation, every prediction runs the network under each
    draw.

    Attributes:
        unconstrained_latents: Draws of the latents, shape `(S, Q)`, float64.
        log_density: Of draws from an approximation q: `log_q`, the log density of weights and latents under it, and
            `log_prior`, that of the weights under the prior, both of shape `(S,)`; of members of an ensemble nothing.
    """

    def __init__(
        self,
        program: RewardModel,
        schema: FeedbackSchema,
        report: FitReport,
        latents: Tensor,
        log_density: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(program.reward, NetworkDraws):
            raise ArgumentError(f"`program` has a {type(program.reward).__name__} reward; it must be NetworkDraws")
        if len(latents) != len(program.reward.draws) or len(latents) < 2:
            raise ArgumentError(
                f"{len(program.reward.draws)} draws of the weights and {len(latents)} of the latents; give as many "
                "of each, at least 2"
            )
        self.program = program
        self.schema = schema
        self.report = report
        self.unconstrained_latents = latents
        self._default_draws = len(latents)
        self.log_density = dict(log_density or {})

    @property
    def network_draws(self) -> NetworkDraws:
        """The network and the draws of its weights."""
        head = self.program.head
        assert isinstance(head, NetworkDraws)
        return head

    def __len__(self) -> int:
        return len(self.unconstrained_latents)

    def predict(
        self, prompts: Sequence[Any] | None = None, candidates: Sequence[Any] | None = None, *, progress: bool = False
    ) -> RewardBelief:
        """Joint belief about the rewards of the candidates of each prompt, made of draws; see `Posterior.predict`."""
        if any(isinstance(c, np.ndarray | torch.Tensor) for c in candidates or ()):
            raise ArgumentError("`candidates` are arrays of features; this reward reads texts, give lists of responses")
        return super().predict(prompts, candidates, progress=progress)

    def save_adapter_draws(self, folder: str | Path, num_samples: int | None = None) -> list[Path]:
        """Writes draws of the weights in peft's format, each to a folder of its own.

        Plain peft loads them (`model.load_adapter(path, adapter_name="draw-000")`), and so do servers that load
        adapters; heads are included.

        Args:
            folder: Where to write `draw-000`, `draw-001`, ...
            num_samples: Number of draws, spread evenly over those there are; all by default.

        Returns:
            The folders.

        Raises:
            ArgumentError: `num_samples` is not positive.
            PersistenceError: A folder cannot be written.
        """
        if num_samples is not None and num_samples < 1:
            raise ArgumentError(f"`num_samples` is {num_samples}; at least 1 draw is needed")
        network, paths = self.network_draws.network, []
        with swapped_weights(network) as put:
            for number, index in enumerate(self._chosen(len(self) if num_samples is None else num_samples)):
                put(self.network_draws.draws[index])
                path = Path(folder) / f"draw-{number:03d}"
                try:
                    network.save_adapter(path)
                except OSError as error:
                    raise PersistenceError(f"cannot write an adapter to {path}: {error}") from error
                paths.append(path)
        return paths

    def _chosen(self, num_samples: int) -> Tensor:
        """Indices of at most `num_samples` draws, spread evenly."""
        return torch.linspace(0, len(self) - 1, min(len(self), num_samples)).round().long()

    def _encoded(self, data: Comparisons) -> tuple[Tensor, Tensor | None]:
        # Features that the data may carry are another reward function's.
        return torch.from_numpy(self.network_draws.extract_items(data)), None

    def _num_features(self) -> int:
        return len(self)

    def _belief(self, features: Tensor, sizes: Sequence[int], outside: Tensor | None) -> RewardBelief:
        draws = features.new_zeros(len(self), len(sizes), max(sizes))
        mask = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
        for prompt, rewards in enumerate(features.T.split(list(sizes), dim=1)):
            draws[:, prompt, : rewards.shape[1]] = rewards
            mask[prompt, : rewards.shape[1]] = True
        return RewardBelief.from_draws(draws, mask)

    def _feedback_draws(
        self,
        features: Tensor,
        groups: Sequence[FeedbackGroup],
        num_samples: int,
        seed: int,
        outside: Tensor | None,
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        for index in self._chosen(num_samples).tolist():
            yield [features[:, index][g.items][None] for g in groups], self.unconstrained_latents[index]

    def _joint_draws(
        self, features: Tensor, sizes: Sequence[int], outside: Tensor | None, num_samples: int, seed: int
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        chosen = self._chosen(num_samples)
        stats = {name: values[chosen] for name, values in self.log_density.items()}
        return features.T[chosen], self.unconstrained_latents[chosen], stats

    def _latent_draws(self, num_samples: int, seed: int) -> Tensor:
        return self.unconstrained_latents[self._chosen(num_samples)]

    def _state(self) -> dict[str, Tensor]:
        head = self.network_draws
        tensors = {"draws": head.draws, "initial": head.network.initial_theta(), "latents": self.unconstrained_latents}
        return tensors | self.log_density

    @classmethod
    def _restore(
        cls, program: RewardModel, schema: FeedbackSchema, report: FitReport, tensors: dict[str, Tensor]
    ) -> "NetworkPosterior":
        names: tuple[str, ...] = ("log_q", "log_prior")
        log_density = {name: tensors[name] for name in names if name in tensors}
        return cls(program, schema, report, tensors["latents"], log_density)


def network_report(
    engine: str,
    program: RewardModel,
    data: Comparisons,
    training: Training,
    network: LoRANetwork,
    *,
    seed: int,
    seconds: float,
    runs: Sequence[TrainingReport],
    settled: bool = True,
    diagnostics: Mapping[str, Any] | None = None,
) -> FitReport:
    """The report of a fit on the weights themselves, by one or more training runs.

    Its gradient norm is NaN: no gradient of all the data is taken where a stochastic optimiser ends. It has converged
    unless a callback stopped a run, or it is not `settled`. Steps and seconds of `training` are sums over the runs, its
    final loss the worst.
    """
    last = [run.log[-1] for run in runs if run.log]
    summary = {
        name: sum(getattr(run, name) for run in runs) for name in ("steps", "planned_steps", "epochs", "seconds")
    }
    stopped_early = any(run.stopped_early for run in runs)
    if stopped_early:
        warnings.warn(
            f"training stopped after {summary['steps']} of {summary['planned_steps']} steps: {engine} had not come to "
            "its end; leave out the callback that stopped it, or train anew",
            ConvergenceWarning,
            # The line that called `bayesrm.fit`.
            stacklevel=6,
        )
    return FitReport(
        engine={"name": engine, "settings": {"training": training.to_config()}},
        seed=seed,
        seconds=seconds,
        num_rows=len(data),
        num_items=data.num_items,
        num_prompts=data.num_prompts,
        num_parameters=network.num_parameters,
        num_coordinates=network.num_parameters,
        converged=settled and not stopped_early,
        gradient_norm=float("nan"),
        iterations=summary["steps"],
        prior_precision=program.prior.precision,
        training=summary
        | {
            "stopped_early": stopped_early,
            "resumed_from": next((run.resumed_from for run in reversed(runs) if run.resumed_from), None),
            "final_loss": max((float(entry["loss"]) for entry in last), default=None),
        },
        diagnostics=dict(diagnostics or {}),
    )

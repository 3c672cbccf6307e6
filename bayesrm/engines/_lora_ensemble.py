"""Ensembles of LoRA reward models: adapters trained one after another on one backbone in memory.

Anchored members are drawn towards a draw of the prior (Osband et al., "Randomized prior functions", 1806.03335; Pearce
et al., "Uncertainty in neural networks: approximately Bayesian ensembling", 1810.05546); bootstrap members weigh the
prompts, or few prompts' rows, by the Bayesian bootstrap (Rubin, "The Bayesian bootstrap", 1981).
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._typing import Tensor
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError, EngineError
from ..programs import RewardModel
from ..rewards import LoRANetwork
from ._bootstrap_units import bootstrap_units
from ._curvature import FLAT, _prior_curvature
from ._density import FeedbackDensity
from ._lora_fit import train_network
from ._settings import check_positive
from ._trainer import JointLoss
from .network_posterior import NetworkDraws, NetworkPosterior, network_report
from .training import Training, train

_LOG = logging.getLogger("bayesrm")


def fit_members(
    program: RewardModel,
    data: Comparisons,
    training: Training,
    *,
    num_members: int,
    anchored: bool,
    bootstrap: bool,
    seed: int,
    progress: bool,
) -> NetworkPosterior:
    """An ensemble of a `LoRA` reward: each member a mode of the declared log joint, perturbed in its own way.

    All members start from the same weights. Members differ by the order of their data, by their prior's centre where
    `anchored`, and by the weights of the prompts where `bootstrap`. The prior of the likelihood's latents is
    moved by a normal draw with the covariance that its curvature at their start implies, which for a normal prior is an
    anchor too.

    Args:
        program: A program with a `LoRA` reward.
        data: The comparisons.
        training: Settings of the Trainer. With an `output_dir` each member has a folder in it: an interrupted run goes
            on inside the member where it stopped, and more members can be added later.
        num_members: Number of members, at least 2.
        anchored: Whether each member's prior is centred at a draw from the declared prior.
        bootstrap: Whether each member weighs the prompts by its own draw from the Bayesian bootstrap.
        seed: Seed; the members do not depend on how many there are.
        progress: Show progress.

    Returns:
        The posterior, one draw a member. Engine, time and data digest of its report are the caller's to fill in.

    Raises:
        ArgumentError: A setting cannot be used.
        DataError: No row has a positive weight.
        EngineError: Training diverged, or a member's latents ran off to infinity.
        PersistenceError: A member's folder holds another run, or cannot be written.
    """
    begin = time.perf_counter()
    check_positive("num_members", num_members)
    if num_members < 2:
        raise ArgumentError(f"`num_members` is {num_members}; at least 2 members are needed for a variance")
    if training.epochs == 0 and training.max_steps is None:
        raise ArgumentError("`training` has 0 epochs, which leaves all members where they start; set `epochs`")
    untrained = train_network(
        program, data, dataclasses.replace(training, epochs=0.0, max_steps=None), seed=seed, progress=False
    )
    network = untrained.network
    start, center = network.theta(), network.initial_theta()
    weights, latents, runs = [], [], []
    try:
        for number in range(num_members):
            member = Member.of(seed, number)
            network.set_theta(start)
            network.set_initial(member.anchor(network, program, center) if anchored else center)
            density = member.reweighted(program, data, untrained.density) if bootstrap else untrained.density
            own = dataclasses.replace(training, output_dir=_member_folder(training, number))
            _LOG.info("member %d of %d", number + 1, num_members)
            run = train(
                network, program, data, density, own, seed=member.order_seed, progress=progress,
                objective=member.moved(untrained.density) if anchored and density.num_latents else None,
            )  # fmt: skip
            if not bool(run.latents.isfinite().all()):
                raise EngineError(
                    f"member {number} has no mode: its latents ran off to {run.latents.tolist()}; give them priors "
                    f"with lighter tails, or lower `latent_learning_rate` ({training.latent_learning_rate})"
                )
            weights.append(network.theta().cpu())
            latents.append(run.latents)
            runs.append(run)
    finally:
        network.set_initial(center)
    network.set_theta(weights[0].to(start))
    report = network_report(
        "Ensemble", program, data, training, network, seed=seed, seconds=time.perf_counter() - begin, runs=runs
    )  # fmt: skip
    draws = NetworkDraws(network, torch.stack(weights), 2 * training.batch_size)
    drawn = RewardModel(draws, program.likelihood, program.prior)
    return NetworkPosterior(drawn, untrained.schema, report, torch.stack(latents))


@dataclasses.dataclass(frozen=True)
class Member:
    """The random numbers of one member.

    Attributes:
        anchor_seed: Seed of its prior's centre.
        latent_seed: Seed of how far its latents' prior is moved.
        weight_seed: Seed of its weights of the prompts.
        order_seed: Seed of the order of its data.
    """

    anchor_seed: int
    latent_seed: int
    weight_seed: int
    order_seed: int

    @classmethod
    def of(cls, seed: int, number: int) -> "Member":
        """Member `number` of the ensemble with a seed."""
        state = np.random.SeedSequence([seed, number]).generate_state(4)
        return cls(*(int(value) for value in state))

    def anchor(self, network: LoRANetwork, program: RewardModel, center: Tensor) -> Tensor:
        """A draw of the weights from the declared prior around `center`, shape `(P,)`."""
        generator = torch.Generator().manual_seed(self.anchor_seed)
        parts = []
        for part, (site, p) in zip(
            center.split([p.numel() for p in network.sites.values()]), network.sites.items(), strict=True
        ):
            noise = torch.randn(p.numel(), generator=generator).to(center)
            parts.append(part + noise * program.prior.of(site) ** -0.5)
        return torch.cat(parts)

    def moved(self, density: FeedbackDensity) -> "MovedPrior":
        """The objective with the latents' prior moved by a normal draw that has the covariance of its curvature."""
        latents = density.initial_latents.detach().requires_grad_(True)
        zeros = [latents.new_zeros(g.items.shape) for g in density.groups]
        _, log_prior = density.distributions(zeros, latents)
        values, vectors = torch.linalg.eigh(_prior_curvature(log_prior, latents).cpu())
        # Directions in which the prior is flat or curves the other way have no width to move it by.
        width = torch.where(values > FLAT, values.clamp_min(FLAT).rsqrt(), 0.0)
        generator = torch.Generator().manual_seed(self.latent_seed)
        noise = torch.randn(len(latents), generator=generator, dtype=torch.float64)
        return MovedPrior(tuple(((vectors * width) @ noise).tolist()))

    def reweighted(self, program: RewardModel, data: Comparisons, density: FeedbackDensity) -> FeedbackDensity:
        """The density with each row's weight times one drawn from Exp(1) for its unit, see `bootstrap_units`."""
        rng, units = np.random.default_rng(self.weight_seed), bootstrap_units(data)
        by_row = torch.from_numpy(rng.exponential(size=int(units.max()) + 1)[units])

        def weigh(group: FeedbackGroup) -> FeedbackGroup:
            return dataclasses.replace(group, weight=group.weight * by_row[group.rows].to(group.weight))

        return FeedbackDensity(program, [weigh(group) for group in density.groups])


@dataclasses.dataclass(frozen=True)
class MovedPrior:
    """The log joint with log p(u) of the unconstrained latents replaced by log p(u - shift).

    It has a mode wherever the log joint has one, whatever the tails of the prior.

    Attributes:
        shift: One number a latent.
    """

    shift: tuple[float, ...]

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of a run."""
        return {"objective": "moved prior", "objective.shift": list(self.shift)}

    def loss(
        self, network: LoRANetwork, program: RewardModel, density: FeedbackDensity, *, num_rows: int, num_batches: int
    ) -> "MovedPriorLoss":
        """The loss module."""
        return MovedPriorLoss(self.shift, network, program, density, num_rows=num_rows, num_batches=num_batches)

    def start(self, network: LoRANetwork, density: FeedbackDensity) -> Tensor:
        """The latents."""
        return density.initial_latents


class MovedPriorLoss(JointLoss):
    """`JointLoss` with the latents' prior moved."""

    def __init__(self, shift: tuple[float, ...], *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **sizes)
        self._shift = self._no_latents.new_tensor(shift)

    def forward(
        self, sequences: Mapping[str, Tensor], places: Tensor, feedback: FeedbackDensity, number: int = 0
    ) -> Tensor:
        """The loss, see `JointLoss.forward`; it is the same for batches of every number."""
        loss = super().forward(sequences, places, feedback)
        if self.latents is None:
            return loss
        log_priors = feedback.log_priors(torch.stack([self.latents, self.latents - self._shift]))
        return loss + (log_priors[0] - log_priors[1]) / self._num_rows


def _member_folder(training: Training, number: int) -> str | None:
    return None if training.output_dir is None else str(Path(training.output_dir) / f"member-{number:03d}")

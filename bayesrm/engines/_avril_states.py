"""AVRIL on trajectories of states and actions."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from .._typing import Tensor
from ..backend import seeded
from ..data import Trajectories
from ..errors import DataError, EngineError
from ..programs import InverseRL
from ..rewards import StateReward
from ..rewards._state_network import StateNetwork
from ._avril_objective import step_terms, temporal_difference
from ._density import FeedbackDensity
from ._settings import settings_of
from ._state_rewards import NetworkRewards
from ._trajectory_digest import trajectory_digest
from ._trajectory_draws import feedback_density
from .report import FitReport
from .trajectory_posterior import TrajectoryPosterior

if TYPE_CHECKING:
    from .avril import AVRIL

#: Gradient norm, in nats a step, below which the optimiser has arrived.
_ARRIVED = 1e-2


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """M steps that go through P distinct states.

    Attributes:
        inputs: What the networks take of each distinct state, shape `(P, D)`.
        states: State of each step, a row of `inputs`, shape `(M,)`.
        actions: Action of each step, shape `(M,)`.
        following: The step after each one, itself at the end of a trajectory, shape `(M,)`.
        ended: 1 where a step ended the episode, shape `(M,)`.
        known: 0 at the last step of a trajectory that was cut, shape `(M,)`.
        demonstrated: 1 at the steps of demonstrations, shape `(M,)`.
        owners: Trajectory of each step, shape `(M,)`.
        num_trajectories: N.
        kl_shares: How much of the divergence of its reward each step counts, shape `(M,)`.
    """

    inputs: Float[Tensor, "states features"]
    states: Int[Tensor, "steps"]
    actions: Int[Tensor, "steps"]
    following: Int[Tensor, "steps"]
    ended: Tensor
    known: Tensor
    demonstrated: Tensor
    owners: Int[Tensor, "steps"]
    num_trajectories: int
    kl_shares: Tensor

    @classmethod
    def of(cls, data: Trajectories, reward: StateReward, *, kl_once: bool = False) -> "StepTable":
        """The steps of trajectories.

        Args:
            data: The trajectories.
            reward: What the rewards are functions of.
            kl_once: Whether the divergence counts once for each distinct reward, shared by the steps that get it,
                instead of once for each step.
        """
        distinct, states = np.unique(data.states, axis=0, return_inverse=True)
        steps, last, owners = np.arange(len(data.actions)), data.last, data.owners
        _, cells = np.unique(
            states.reshape(-1) * reward.num_actions + (data.actions if reward.by_action else 0), return_inverse=True
        )
        shares = 1.0 / np.bincount(cells)[cells] if kl_once else np.ones(len(steps))
        return cls(
            reward.inputs(distinct), torch.as_tensor(states.reshape(-1)), torch.as_tensor(data.actions),
            torch.as_tensor(np.where(last, steps, steps + 1)), torch.as_tensor(last & data.ended[owners]),
            torch.as_tensor(~(last & ~data.ended[owners])), torch.as_tensor(data.demonstrated[owners]).double(),
            torch.as_tensor(owners), len(data), torch.as_tensor(shares),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """What AVRIL maximises, as sums over steps and preferences.

    Attributes:
        engine: The settings.
        program: The program.
        table: The steps.
        density: The density of the preferences given sums of rewards; `None` without preferences.
    """

    engine: "AVRIL"
    program: InverseRL
    table: StepTable
    density: FeedbackDensity | None

    @property
    def reward(self) -> StateReward:
        """What rewards are functions of."""
        assert isinstance(self.program.reward, StateReward)
        return self.program.reward

    def moments(self, network: StateNetwork, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(R), in units of reward."""
        return scaled_moments(network, inputs, self.program.reward_precision, self.engine.min_std)

    def step_sums(self, network: StateNetwork, rows: Any = None) -> dict[str, Tensor]:
        """Sums over steps of `imitation`, `kl` and `constraint`, unweighted.

        Args:
            network: The networks.
            rows: The steps that are summed over, all by default; sums over parts add up to the whole.
        """
        t = self.table
        if rows is None:
            rows, inputs, here, there = slice(None), t.inputs, t.states, t.states[t.following]
        else:
            both = torch.cat([t.states[rows], t.states[t.following[rows]]])
            needed, places = torch.unique(both, return_inverse=True)
            inputs, (here, there) = t.inputs[needed], places.split(len(rows))
        values = network.action_values(inputs)
        mean, log_std = self.moments(network, inputs)
        actions, num_actions = t.actions[rows], values.shape[1]
        taken = _entries(values, here * num_actions + actions)
        beta = self.program.rationality
        soft = torch.logsumexp(beta * values, 1) / beta
        if self.engine.next_value == "soft":
            next_values = _entries(soft, there)
        else:
            next_values = _entries(values, there * num_actions + t.actions[t.following[rows]])
        chosen = here * num_actions + actions if self.reward.by_action else here
        terms = step_terms(
            _entries(mean, chosen), _entries(log_std, chosen),
            temporal_difference(taken, next_values, t.ended[rows], self.program.discount), t.known[rows],
            self.program.reward_precision,
        )  # fmt: skip
        imitation = (t.demonstrated[rows] * beta * (taken - _entries(soft, here))).sum()
        return {
            "imitation": imitation,
            "kl": (t.kl_shares[rows] * terms.kl).sum(),
            "constraint": terms.constraint.sum(),
        }

    def returns(self, network: StateNetwork, noise: Tensor) -> Float[Tensor, "draws trajectories"]:
        """Sums of rewards of the trajectories under draws of q: those of one state (and action) share their reward.

        Args:
            network: The networks.
            noise: Standard normal numbers, shape `(draws, P)`, or `(draws, P, A)` where the action counts.
        """
        t = self.table
        mean, log_std = self.moments(network, t.inputs)
        rewards = mean + log_std.exp() * noise
        steps = rewards[:, t.states, t.actions] if self.reward.by_action else rewards[:, t.states]
        return steps.new_zeros(len(noise), t.num_trajectories).index_add(1, t.owners, steps)

    def preferences(self, network: StateNetwork, latents: Tensor, noise: Tensor) -> Tensor:
        """Mean over draws of the log-likelihood of the preferences, with the log prior of its latents."""
        if self.density is None:
            return latents.sum()
        return self.density.log_joints(self.returns(network, noise), latents.expand(len(noise), -1)).mean()

    def noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal numbers for `returns`, each with its mirror image."""
        width = (self.reward.num_actions,) if self.reward.by_action else ()
        shape = (self.engine.num_particles // 2, len(self.table.inputs), *width)
        half = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.cat([half, -half])

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """The weighted sum of `step_sums`."""
        weighted = self.engine.constraint_weight * sums["constraint"] - self.engine.kl_weight * sums["kl"]
        return sums["imitation"] + weighted


def _entries(table: Tensor, places: Tensor) -> Tensor:
    """Entries of a flattened table; unlike that of an index, the derivative of `index_select` is fast."""
    return table.reshape(-1).index_select(0, places)


def scaled_moments(network: StateNetwork, inputs: Tensor, precision: float, min_std: float) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of q(R), of networks that give them in units of the prior.

    Outputs of 0 are the prior; the standard deviation stays above `min_std` of the prior's.
    """
    mean, log_std = network.rewards(inputs)
    log_std = torch.logaddexp(log_std + math.log1p(-min_std), torch.full_like(log_std, math.log(min_std)))
    return mean * precision**-0.5, log_std - 0.5 * math.log(precision)


def fit_states(
    engine: "AVRIL", program: InverseRL, data: Trajectories, *, seed: int, progress: bool
) -> TrajectoryPosterior:
    """The variational posterior of `InverseRL` on states and actions; see `AVRIL`.

    Adam maximises the objective in float64; its step size falls to 0 along a cosine. Latents of the likelihood are
    points, at their mode.
    """
    begin = time.perf_counter()
    assert isinstance(program.reward, StateReward)
    program.reward.check(data)
    if not data.demonstrated.any() and not len(data.preferences):
        raise DataError("the trajectories hold neither demonstrations nor preferences; there is nothing to learn from")
    table = StepTable.of(data, program.reward, kl_once=engine.kl_once)
    density = FeedbackDensity(program.feedback_model, data.groups()) if len(data.preferences) else None
    objective = Objective(engine, program, table, density)
    with seeded(seed):
        network = program.reward.network(table.inputs.shape[1])
    if program.reward.num_states is None:
        network.standardise(table.inputs[table.states])
    latents = (table.inputs.new_zeros(0) if density is None else density.initial_latents).clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    _optimise(objective, network, latents, generator, progress)
    found = _diagnostics(objective, network, latents, generator)
    report = FitReport(
        engine={"name": "AVRIL", "settings": settings_of(engine)},
        seed=seed,
        seconds=time.perf_counter() - begin,
        num_rows=len(table.actions),
        num_items=len(table.inputs),
        num_prompts=len(data),
        num_parameters=sum(p.numel() for p in network.parameters()),
        num_coordinates=sum(p.numel() for p in network.parameters()),
        converged=found["gradient_norm"] <= _ARRIVED,
        gradient_norm=found.pop("gradient_norm"),
        iterations=engine.num_steps,
        prior_precision=program.reward_precision,
        diagnostics=found,
        data_digest=trajectory_digest(data),
    )
    # Demonstrations say nothing of a likelihood's latents: they stay where their prior puts them.
    told = feedback_density(program) if density is None else density
    point = told.constrain((told.initial_latents if density is None else latents.detach())[None])
    return TrajectoryPosterior(program, report, NetworkRewards(program, network.eval(), engine.min_std), point)


def _optimise(
    objective: Objective, network: StateNetwork, latents: Tensor, generator: torch.Generator, progress: bool
) -> None:
    engine, count = objective.engine, len(objective.table.actions)
    optimiser = torch.optim.Adam([*network.parameters(), latents], lr=engine.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, engine.num_steps)
    batches = _batches(count, engine.batch_size, generator)
    for step in tqdm(range(engine.num_steps), unit="step", disable=not progress):
        rows, parts = next(batches)
        value = parts * objective.total(objective.step_sums(network, rows))
        value = value + objective.preferences(network, latents, objective.noise(generator))
        if not bool(torch.isfinite(value)):
            raise EngineError(
                f"AVRIL's objective is not finite after {step} steps; lower `learning_rate`, now {engine.learning_rate}"
            )
        optimiser.zero_grad()
        (-value / count).backward()
        optimiser.step()
        schedule.step()


def _batches(count: int, batch_size: int | None, generator: torch.Generator) -> Iterator[tuple[Tensor | None, int]]:
    """Rows of each step of the optimiser, and the number of parts of the partition that they belong to.

    The sum over a part, times the number of parts, is right on average over the partition, however unequal the parts.
    """
    parts = 1 if batch_size is None else math.ceil(count / batch_size)
    while True:
        if parts == 1:
            yield None, 1
        else:
            for rows in torch.randperm(count, generator=generator).chunk(parts):
                yield rows, parts


def _diagnostics(
    objective: Objective, network: StateNetwork, latents: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """The terms at the end, their sum, and the norm of its gradient in nats a step."""
    sums = objective.step_sums(network)
    preferences = objective.preferences(network, latents, objective.noise(generator))
    total = objective.total(sums) + preferences
    # An action that was never taken in a state of a table has no gradient.
    slopes = torch.autograd.grad(total, [*network.parameters()], allow_unused=True)
    norm = math.sqrt(sum(float(s.square().sum()) for s in slopes if s is not None)) / len(objective.table.actions)
    found = {name: float(value.detach()) for name, value in sums.items()}
    return found | {
        "preferences": float(preferences.detach()),
        "objective": float(total.detach()),
        "gradient_norm": norm,
    }

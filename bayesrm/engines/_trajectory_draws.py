"""Draws from a posterior over rewards of states: of rewards, of latents, and what they predict of preferences."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from .._typing import Tensor
from ..backend import PriorRecorder, seeded
from ..data import Trajectories
from ..errors import LikelihoodError
from ..programs import InverseRL
from ._density import FeedbackDensity
from ._evaluation import _supports, evaluations
from ._schema import FeedbackSchema
from .draws import JointDraws
from .prediction import FeedbackPrediction, GroupPrediction

if TYPE_CHECKING:
    from .trajectory_posterior import TrajectoryPosterior


def spread_evenly(num_draws: int, num_chains: int, wanted: int) -> Int[Tensor, "chosen"]:
    """Places of at most `wanted` draws, but one of each chain at least, spread evenly over every chain."""
    length = num_draws // num_chains
    within = torch.linspace(0, length - 1, min(length, max(1, wanted // num_chains))).round().long()
    return (torch.arange(num_chains)[:, None] * length + within).reshape(-1)


def reward_draws(
    posterior: "TrajectoryPosterior", states: NDArray[Any], num_samples: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Draws of the rewards of distinct states, `(S, P)` or `(S, P, A)`, and which draws of the posterior they are.

    Independent normal rewards are drawn anew, in pairs that mirror each other about the mean; they are no draws of the
    posterior, so that there is nothing to point at.
    """
    drawn = posterior.rewards.draws(states)
    if drawn is not None:
        chosen = spread_evenly(len(drawn), posterior.rewards.num_chains, num_samples)
        return drawn[chosen], chosen
    mean, std = posterior.rewards.moments(states)
    # Numbered states have noise of their own, so that the same seed draws the same rewards whatever the data.
    num_states, pairs = posterior.state_reward.num_states, -(-num_samples // 2)
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, len(states) if num_states is None else num_states, *mean.shape[1:])
    half = torch.randn(shape, generator=generator, dtype=torch.float64)
    half = half if num_states is None else half[:, torch.as_tensor(states)]
    return mean + std * torch.cat([half, -half])[:num_samples], None


def feedback_density(program: InverseRL, data: Trajectories | None = None) -> FeedbackDensity:
    """The density of preferences given sums of rewards; without any, of a made-up one, which shows the latents."""
    groups = [] if data is None else data.groups()
    return FeedbackDensity(program.feedback_model, groups or FeedbackSchema.unseen().example_groups())


def prior_latents(program: InverseRL, count: int, seed: int) -> dict[str, Tensor]:
    """Draws from the prior of the latents of the likelihood, by site, each of shape `(count, *site)`."""
    density = feedback_density(program)
    if not density.num_latents:
        return {}
    zeros = [torch.zeros(g.items.shape, dtype=torch.float64) for g in density.groups]
    comparisons = [g.comparison for g in density.groups]
    drawn: list[dict[str, Tensor]] = []
    with seeded(seed), torch.no_grad():
        for _ in range(count):
            with PriorRecorder({}) as recorder:
                program.feedback_model.feedback(zeros, comparisons)
            drawn.append({name: value.double() for name, (_, value) in recorder.sites.items()})
    return {name: torch.stack([values[name] for values in drawn]) for name in drawn[0]}


def unconstrained(density: FeedbackDensity, values: dict[str, Tensor], count: int) -> Float[Tensor, "draws latents"]:
    """Latents by site, `count` of each, as rows of unconstrained numbers; where a site is missing, its start."""
    parts = [
        site.transform.inv(values[site.name].double()).reshape(count, -1)
        if site.name in values
        else density.initial_latents[site.start : site.stop].expand(count, -1)
        for site in density.sites
    ]
    return torch.cat(parts, dim=1) if parts else torch.zeros(count, 0, dtype=torch.float64)


def predict_feedback(density: FeedbackDensity, draws: JointDraws, weight: Tensor, num_rows: int) -> FeedbackPrediction:
    """Posterior predictive of preferences: probabilities of all outcomes, averaged over draws.

    Raises:
        LikelihoodError: The likelihood does not say which outcomes it has.
    """
    supports = _supports(density, draws)
    log_prob = torch.full((num_rows,), float("nan"), dtype=torch.float64)
    found = []
    for place, (group, support) in enumerate(zip(density.groups, supports, strict=True)):
        if support is None:
            raise LikelihoodError("the likelihood of preferences does not list its outcomes; give it a `support`")
        columns = []
        for outcome in support:
            asked = dataclasses.replace(group, outcome=outcome.expand(group.comparison.num_rows))
            others = [asked if i == place else g for i, g in enumerate(density.groups)]
            parts = [e.log_probs[place] for e in evaluations(density.of_groups(others), draws)]
            columns.append(torch.logsumexp(torch.cat(parts), 0) - np.log(len(draws.rewards)))
        table = torch.stack(columns, dim=1)
        observed = (support == group.outcome[:, None]).to(torch.uint8).argmax(1)
        log_prob[group.rows] = table.gather(1, observed[:, None])[:, 0]
        found.append(GroupPrediction(group.label, group.rows, support, table.exp(), observed))
    return FeedbackPrediction(log_prob, tuple(found), weight)

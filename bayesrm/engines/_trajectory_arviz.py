"""A posterior over rewards of states as ArviZ's inference data, with named dimensions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from .._arviz import arviz, inference_data
from .._typing import Tensor
from ..data import Trajectories
from ..rewards import StateReward
from ._arviz_export import _STATISTICS, Variable, run_attributes
from ._evaluation import evaluations
from ._state_rewards import DrawnRewards
from ._trajectory_draws import feedback_density, reward_draws, spread_evenly

if TYPE_CHECKING:
    from .trajectory_posterior import TrajectoryPosterior

#: Names of variables and dimensions of the group `posterior`; a latent of such a name gets a prefix.
_TAKEN = frozenset({"reward", "return", "chain", "draw", "state", "action", "trajectory"})


def export(
    posterior: "TrajectoryPosterior", data: Trajectories, *, num_samples: int, seed: int, predictive: bool
) -> Any:
    """What `TrajectoryPosterior.to_arviz` returns.

    Groups and variables:

    * `posterior`: `reward` (chain, draw, state), with `action` where the reward depends on it; `return`, the sum of
      rewards of each trajectory (chain, draw, trajectory); and each latent of the likelihood in constrained space.
    * `log_likelihood`: `feedback` (chain, draw, comparison), of each preference; `taken` (chain, draw,
      demonstration), of all actions of one, where the posterior has draws of action values. `AVRIL` has none: its
      action values are a point that was fitted to these actions, and leave-one-out from it would judge nothing.
    * `posterior_predictive` and `observed_data`: `feedback` (comparison), the place of the preferred one; `taken`
      (step), the actions of the demonstrations.
    * `sample_stats`: what the sampler recorded, under ArviZ's names.
    * `constant_data`: `candidates` (comparison, candidate), `length`, `ended` and `demonstrated` over `trajectory`,
      `state_of_step` and `trajectory_of_step` over `step` (those of demonstrations), `visits` (state, action), how
      often demonstrations took each action, and for states with features `features` (state, feature).

    Coordinates of `trajectory` are names where the data have some; `demonstration` has those of the demonstrations.
    """
    arviz()
    reward = posterior.state_reward
    draws = posterior.draw(data, num_samples=num_samples, seed=seed)
    num_draws = len(draws.rewards)
    features = np.unique(data.states, axis=0) if reward.num_states is None else None
    states = np.arange(reward.num_states or 0) if features is None else features
    # The seed makes them those whose sums `draw` gives.
    rewards, _ = reward_draws(posterior, states, num_samples, seed)

    def by_chain(values: Tensor | NDArray[Any]) -> NDArray[Any]:
        array = np.asarray(values)
        return array.reshape(draws.num_chains, -1, *array.shape[1:])

    sampled = ("chain", "draw")
    cells = ("state", "action") if reward.by_action else ("state",)
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {
            "reward": ((*sampled, *cells), by_chain(rewards)),
            "return": ((*sampled, "trajectory"), by_chain(draws.rewards)),
        },
        "log_likelihood": {},
        "posterior_predictive": {},
        "observed_data": {},
        "sample_stats": {_STATISTICS.get(k, k): (sampled, by_chain(v)) for k, v in draws.sample_stats.items()},
    }
    for name, values in feedback_density(posterior.program).constrain(draws.latents).items():
        shown = f"latent.{name}" if name in _TAKEN else name
        dims = (*sampled, *(f"{shown}_dim_{i}" for i in range(values.dim() - 1)))
        groups["posterior"][shown] = (dims, by_chain(values))
    shown_steps = np.flatnonzero(data.demonstrated[data.owners])
    if len(data.preferences):
        density = feedback_density(posterior.program, data)
        found = list(evaluations(density, draws, seed=seed + 1 if predictive else None))
        log_probs = torch.cat([e.log_probs[0] for e in found])
        groups["log_likelihood"]["feedback"] = ((*sampled, "comparison"), by_chain(log_probs))
        groups["observed_data"]["feedback"] = (("comparison",), np.zeros(len(data.preferences), dtype=np.int64))
        if predictive:
            drawn = torch.cat([e.outcomes[0] for e in found if e.outcomes is not None])
            groups["posterior_predictive"]["feedback"] = ((*sampled, "comparison"), by_chain(drawn))
    if len(shown_steps):
        groups["observed_data"]["taken"] = (("step",), data.actions[shown_steps])
        log_policies = _log_policies(posterior, data.states[shown_steps], num_draws, num_samples)
        if isinstance(posterior.rewards, DrawnRewards):
            values = _of_demonstrations(log_policies, data, shown_steps)
            groups["log_likelihood"]["taken"] = ((*sampled, "demonstration"), by_chain(values))
        if predictive:
            taken = _actions(log_policies, seed + 2)
            groups["posterior_predictive"]["taken"] = ((*sampled, "step"), by_chain(taken))
    groups["constant_data"] = _constants(data, reward, states, features, shown_steps)
    names = np.arange(len(data)) if data.ids is None else np.asarray(data.ids)
    coordinates = {
        "chain": np.arange(draws.num_chains),
        "draw": np.arange(num_draws // draws.num_chains),
        "trajectory": names,
        "demonstration": names[data.demonstrated],
        "step": shown_steps,
    }
    datasets = {name: _dataset(variables, coordinates) for name, variables in groups.items() if variables}
    return inference_data(datasets, run_attributes(posterior.report, seed))


def _dataset(variables: Mapping[str, Variable], coordinates: Mapping[str, NDArray[Any]]) -> Any:
    import xarray

    sizes = {dim: n for dims, values in variables.values() for dim, n in zip(dims, values.shape, strict=True)}
    return xarray.Dataset(dict(variables), {dim: coordinates.get(dim, np.arange(n)) for dim, n in sizes.items()})


def _log_policies(
    posterior: "TrajectoryPosterior", states: NDArray[Any], num_draws: int, num_samples: int
) -> Float[Tensor, "draws steps actions"]:
    """Log probabilities of the actions at each step under each draw; action values that are a point serve all."""
    distinct, places = np.unique(states, axis=0, return_inverse=True)
    if isinstance(posterior.rewards, DrawnRewards):
        chosen = spread_evenly(len(posterior.rewards.values), posterior.num_chains, num_samples)
        found = posterior.rewards.log_policies(distinct)[chosen]
    else:
        found = posterior.rewards.policy(distinct).log().expand(num_draws, -1, -1)
    return found[:, torch.as_tensor(places.reshape(-1))]


def _of_demonstrations(
    log_policies: Tensor, data: Trajectories, steps: NDArray[np.int64]
) -> Float[Tensor, "draws demonstrations"]:
    """Log probability of all actions of each demonstration."""
    each = log_policies[:, torch.arange(len(steps)), torch.as_tensor(data.actions[steps])]
    _, owner = np.unique(data.owners[steps], return_inverse=True)
    total = each.new_zeros(len(each), int(owner.max()) + 1)
    return total.index_add(1, torch.as_tensor(owner), each)


def _actions(log_policies: Tensor, seed: int) -> Tensor:
    """Drawn actions, shape `(draws, steps)`."""
    generator = torch.Generator().manual_seed(seed)
    below = log_policies.exp().cumsum(2)
    uniform = torch.rand(*below.shape[:2], 1, generator=generator, dtype=torch.float64)
    # Against the last sum rather than 1, which it may miss by a rounding.
    return (uniform * below[..., -1:] > below[..., :-1]).sum(2)


def _constants(
    data: Trajectories, reward: StateReward, states: NDArray[Any], features: NDArray[Any] | None, steps: NDArray[Any]
) -> dict[str, Variable]:
    place = data.states if features is None else np.unique(data.states, axis=0, return_inverse=True)[1].reshape(-1)
    visits = np.zeros((len(states), reward.num_actions), dtype=np.int64)
    np.add.at(visits, (place[steps], data.actions[steps]), 1)
    variables: dict[str, Variable] = {
        "length": (("trajectory",), data.lengths),
        "ended": (("trajectory",), data.ended),
        "demonstrated": (("trajectory",), data.demonstrated),
        "visits": (("state", "action"), visits),
    }
    if len(steps):
        variables["state_of_step"] = (("step",), place[steps])
        variables["trajectory_of_step"] = (("step",), data.owners[steps])
    if len(data.preferences):
        variables["candidates"] = (("comparison", "candidate"), data.preferences)
    if features is not None:
        variables["features"] = (("state", "feature"), features)
    return variables

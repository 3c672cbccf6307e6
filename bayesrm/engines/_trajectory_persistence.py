"""A `TrajectoryPosterior` on disk: the files that other posteriors have too."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._typing import Tensor
from ..errors import LikelihoodChangedWarning, PersistenceError
from ..likelihoods import base as likelihoods
from ..priors import Gaussian
from ..programs import InverseRL
from ..programs.tabular_mdp import TabularMDP
from ..rewards import StateReward
from ._saved_run import new_run, read_run, write_run
from ._state_rewards import DrawnRewards, NetworkRewards, StateRewards
from .report import FitReport
from .trajectory_posterior import TrajectoryPosterior


def save(posterior: TrajectoryPosterior, path: str | Path) -> None:
    """Writes `posterior` to folder `path`; an existing run there is replaced only when the new one is complete."""
    settings, tensors = to_saved(posterior)
    with new_run(path) as folder:
        write_run(folder, settings, tensors)


def load(path: str | Path, likelihood: Any = None) -> TrajectoryPosterior:
    """Reads the posterior in folder `path`, after checking its files against the manifest."""
    folder = Path(path)
    settings, tensors = read_run(folder)
    if settings.get("type") != TrajectoryPosterior.__name__:
        raise PersistenceError(
            f"{folder} holds a {settings.get('type')}; read it with `bayesrm.Posterior.from_pretrained`"
        )
    posterior, changed = from_saved(settings, tensors, likelihood)
    for name in changed:
        warnings.warn(
            f"the source of likelihood '{name}' has changed since the posterior in {folder} was fitted",
            LikelihoodChangedWarning,
            stacklevel=3,
        )
    return posterior


def to_saved(posterior: TrajectoryPosterior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A posterior as JSON values and tensors."""
    program, reward = posterior.program, posterior.program.reward
    assert isinstance(reward, StateReward)
    if reward.dynamics is not None and not isinstance(reward.dynamics, TabularMDP):
        raise PersistenceError(f"dynamics of type {type(reward.dynamics).__name__} cannot be saved; use TabularMDP")
    tensors = {f"latents.{name}": value for name, value in posterior._latents.items()}
    if isinstance(reward.dynamics, TabularMDP):
        for name in ("transitions", "terminal", "start"):
            tensors[f"dynamics.{name}"] = _tensor(getattr(reward.dynamics, name))
    beliefs: dict[str, Any]
    if isinstance(posterior.rewards, DrawnRewards):
        beliefs = {"type": "DrawnRewards", "num_chains": posterior.rewards.num_chains}
        tensors["rewards.values"] = posterior.rewards.values
        tensors |= {f"stats.{name}": value for name, value in posterior.rewards.sample_stats.items()}
    else:
        assert isinstance(posterior.rewards, NetworkRewards)
        state = posterior.rewards.network.state_dict()
        tensors |= {f"network.{name}": value for name, value in state.items()}
        beliefs = {"type": "NetworkRewards", "min_std": posterior.rewards.min_std}
    likelihood: Any
    if isinstance(program.likelihood, Mapping):
        likelihood = {"kinds": {kind: likelihoods.to_config(value) for kind, value in program.likelihood.items()}}
    else:
        likelihood = likelihoods.to_config(program.likelihood)
    precision = program.prior.precision
    names = ("num_actions", "num_states", "hidden", "by_action")
    return {
        "type": TrajectoryPosterior.__name__,
        "program": {
            "type": "InverseRL",
            "reward": {"type": "StateReward"} | {name: getattr(reward, name) for name in names},
            "likelihood": likelihood,
            "prior": {"precision": dict(precision) if isinstance(precision, Mapping) else precision},
            "discount": program.discount,
            "rationality": program.rationality,
        },
        "rewards": beliefs,
        "report": dataclasses.asdict(posterior.report),
    }, tensors


def from_saved(
    settings: dict[str, Any], tensors: dict[str, Tensor], likelihood: Any = None
) -> tuple[TrajectoryPosterior, list[str]]:
    """The posterior that `to_saved` took apart, and the names of likelihoods whose source has changed."""
    config = settings["program"]
    changed: list[str] = []
    if likelihood is None and "kinds" in config["likelihood"]:
        likelihood = {}
        for kind, value in config["likelihood"]["kinds"].items():
            likelihood[kind], inner = likelihoods.from_config(value)
            changed += inner
    elif likelihood is None:
        likelihood, changed = likelihoods.from_config(config["likelihood"])
    dynamics = None
    if "dynamics.transitions" in tensors:
        parts = {name: tensors[f"dynamics.{name}"].numpy() for name in ("transitions", "terminal", "start")}
        dynamics = TabularMDP(**parts)
    own = {name: value for name, value in config["reward"].items() if name != "type"}
    reward = StateReward(**own | {"hidden": tuple(own["hidden"]), "dynamics": dynamics})
    program = InverseRL(
        reward, likelihood, Gaussian(**config["prior"]), discount=config["discount"], rationality=config["rationality"]
    )
    rewards: StateRewards
    if settings["rewards"]["type"] == "DrawnRewards":
        # Runs of the first releases have none.
        stats = {k.removeprefix("stats."): v for k, v in tensors.items() if k.startswith("stats.")}
        rewards = DrawnRewards(program, tensors["rewards.values"], settings["rewards"]["num_chains"], stats)
    else:
        state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        network = reward.network(len(state["center"]))
        network.load_state_dict(state)
        rewards = NetworkRewards(program, network.eval(), settings["rewards"]["min_std"])
    latents = {k.removeprefix("latents."): v for k, v in tensors.items() if k.startswith("latents.")}
    return TrajectoryPosterior(program, FitReport(**settings["report"]), rewards, latents), changed


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))

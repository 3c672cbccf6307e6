"""A `TrajectoryPosterior` on disk: the files that other posteriors have too."""

import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from .._typing import Tensor
from ..errors import LikelihoodChangedWarning, PersistenceError
from ..likelihoods import base as likelihoods
from ..priors import Gaussian
from ..programs import InverseRL
from ..programs.tabular_mdp import TabularMDP
from ..rewards import StateReward
from .report import FitReport
from .trajectory_posterior import DrawnRewards, NetworkRewards, StateRewards, TrajectoryPosterior


def save(posterior: TrajectoryPosterior, path: str | Path) -> None:
    """Writes `posterior` to folder `path`; an existing run there is replaced only when the new one is complete."""
    from ._persistence import _MANIFEST, _SETTINGS, _TENSORS, FORMAT_VERSION, _digest, put_in_place

    target = Path(path)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / _MANIFEST).exists())):
        raise PersistenceError(f"{target} exists and is not a saved posterior; choose another folder")
    settings, tensors = to_saved(posterior)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PersistenceError(f"cannot write to {target.parent}: {error}") from error
    try:
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        safetensors.torch.save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / _TENSORS)
        files = {f.name: _digest(f) for f in sorted(folder.iterdir())}
        manifest = {"format": "bayesrm.posterior", "version": FORMAT_VERSION, "sha256": files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        folder.chmod(0o755)
        put_in_place(folder, target)
    except OSError as error:
        raise PersistenceError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(path: str | Path, likelihood: Any = None) -> TrajectoryPosterior:
    """Reads the posterior in folder `path`, after checking its files against the manifest."""
    from ._persistence import _MANIFEST, _SETTINGS, _TENSORS, FORMAT_VERSION, _digest, _read_json

    folder = Path(path)
    manifest = _read_json(folder / _MANIFEST)
    if manifest.get("format") != "bayesrm.posterior" or manifest.get("version") != FORMAT_VERSION:
        raise PersistenceError(
            f"{folder / _MANIFEST} describes {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this release reads 'bayesrm.posterior' version {FORMAT_VERSION}"
        )
    for name in (_SETTINGS, _TENSORS):
        if not (folder / name).is_file():
            raise PersistenceError(f"{folder / name} is missing; the run directory is incomplete")
        if _digest(folder / name) != manifest.get("sha256", {}).get(name):
            raise PersistenceError(f"{folder / name} differs from the digest in {_MANIFEST}; it was damaged or edited")
    settings = _read_json(folder / _SETTINGS)
    if settings.get("type") != TrajectoryPosterior.__name__:
        raise PersistenceError(
            f"{folder} holds a {settings.get('type')}; read it with `bayesrm.Posterior.from_pretrained`"
        )
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise PersistenceError(f"{folder / _TENSORS} cannot be read: {error}") from error
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
    tensors = {f"latents.{name}": value for name, value in posterior.latents.items()}
    if isinstance(reward.dynamics, TabularMDP):
        for name in ("transitions", "terminal", "start"):
            tensors[f"dynamics.{name}"] = _tensor(getattr(reward.dynamics, name))
    beliefs: dict[str, Any]
    if isinstance(posterior.rewards, DrawnRewards):
        beliefs = {"type": "DrawnRewards", "num_chains": posterior.rewards.num_chains}
        tensors["rewards.values"] = posterior.rewards.values
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
        rewards = DrawnRewards(program, tensors["rewards.values"], settings["rewards"]["num_chains"])
    else:
        state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        network = reward.network(len(state["center"]))
        network.load_state_dict(state)
        rewards = NetworkRewards(program, network.eval(), settings["rewards"]["min_std"])
    latents = {k.removeprefix("latents."): v for k, v in tensors.items() if k.startswith("latents.")}
    return TrajectoryPosterior(program, FitReport(**settings["report"]), rewards, latents), changed


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))

"""The folder of a training run: whose it is, its checkpoints, and its final state."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors
import safetensors.torch
import torch
import xxhash

from .._typing import Tensor
from ..errors import PersistenceError
from ..likelihoods import base as likelihoods
from ..programs import RewardModel
from ..rewards import LoRANetwork
from ._density import FeedbackDensity
from ._processes import Processes
from .training import Training, TrainingReport

_IDENTITY, _FINISHED, _COMPLETE = "training.json", "finished.json", "complete.json"
_STATE = "trained.safetensors"
#: Settings of `Training` that leave the weights at each step as they are.
_INCIDENTAL = ("output_dir", "save_steps", "save_total_limit", "logging_steps", "callbacks", "report_to")


def run_identity(
    network: LoRANetwork,
    program: RewardModel,
    density: FeedbackDensity,
    sequences: Sequence[np.ndarray],
    training: Training,
    seed: int,
) -> dict[str, Any]:
    """What decides the outcome of a run, as a flat mapping of JSON values; the network stands at its starting point."""
    kinds = program.likelihood if isinstance(program.likelihood, Mapping) else {"": program.likelihood}
    parts = {
        "reward": network.settings.to_config() | {"device": None},
        "prior": {site: program.prior.of(site) for site in network.sites},
        "likelihood": {kind: likelihoods.to_config(likelihood) for kind, likelihood in kinds.items()},
        "training": {k: v for k, v in training.to_config().items() if k not in _INCIDENTAL},
    }
    identity = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    identity |= {
        "seed": seed,
        "data.texts": _digest(sequences),
        "data.feedback": _digest([a for g in density.groups for a in _arrays(g)]),
        "starting point": _digest([network.theta().cpu().numpy(), network.initial_theta().cpu().numpy()]),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(identity, default=lambda value: type(value).__qualname__))
    return loaded


@runtime_checkable
class Trainable(Protocol):
    """A network with named parameters to train."""

    @property
    def sites(self) -> Mapping[str, torch.nn.Parameter]:
        """Trainable parameters by name."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        ...


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of one run; made by `open`.

    Attributes:
        path: The folder.
        processes: The processes of the run; the first one writes.
        same_processes: Whether they are as many as when the folder was begun.
    """

    path: Path
    processes: Processes
    same_processes: bool

    @classmethod
    def open(cls, path: str | Path, identity: Mapping[str, Any], processes: Processes) -> "RunFolder":
        """Begins a run in a folder, or finds the one that is there.

        Raises:
            PersistenceError: The folder holds another run, or cannot be written.
        """
        folder = Path(path)
        try:
            known = _read_json(folder / _IDENTITY) if (folder / _IDENTITY).exists() else None
            if known is None and any(folder.glob("checkpoint-*")):
                raise PersistenceError(
                    f"`output_dir` {folder} holds checkpoints without {_IDENTITY}, of a run that is not known; "
                    "give another folder"
                )
            _refuse_other(folder, known, identity)
            processes.wait()
            if processes.index == 0:
                folder.mkdir(parents=True, exist_ok=True)
                if known is None:
                    _write_json(folder / _IDENTITY, {"identity": dict(identity), "processes": processes.count})
                for checkpoint in folder.glob("checkpoint-*"):
                    if not (checkpoint / _COMPLETE).exists():
                        shutil.rmtree(checkpoint)
            processes.wait()
        except OSError as error:
            raise PersistenceError(f"`output_dir` {folder} cannot be used: {error}") from error
        return cls(folder, processes, known is None or known.get("processes") == processes.count)

    def finished(self, network: Trainable) -> TrainingReport | None:
        """The report of a finished run, whose weights are put into the network; `None` where there is none."""
        file = self.path / _FINISHED
        if not file.exists():
            if not self.same_processes:
                raise PersistenceError(
                    f"`output_dir` {self.path} holds an unfinished run on another number of processes than "
                    f"{self.processes.count}; go on with as many as it had, or give another folder"
                )
            return None
        latents = load_state(self.path / _STATE, network)
        stored = _read_json(file)
        stored |= {"log": tuple(stored["log"]), "resumed_from": str(self.path)}
        return TrainingReport(latents=latents, **stored)

    def latest(self) -> str | None:
        """The checkpoint with most steps among those that were written whole."""
        found = self._checkpoints()
        return str(found[-1]) if found else None

    def complete(self, checkpoint: str, keep: int) -> None:
        """Marks a checkpoint as whole, once every process has written its part, and removes all but the last `keep`."""
        self.processes.wait()
        if self.processes.index == 0:
            _write_json(Path(checkpoint) / _COMPLETE, {})
            for old in self._checkpoints()[:-keep]:
                shutil.rmtree(old)
        self.processes.wait()

    def finish(self, network: Trainable, report: TrainingReport) -> None:
        """Writes the final state; `finished.json` comes last and makes it count."""
        if self.processes.index == 0:
            save_state(self.path / _STATE, network, report.latents)
            values = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name != "latents"}
            _write_json(self.path / _FINISHED, values | {"log": [dict(entry) for entry in report.log]})
        self.processes.wait()

    def _checkpoints(self) -> list[Path]:
        whole = [p for p in self.path.glob("checkpoint-*") if (p / _COMPLETE).exists()]
        return sorted(whole, key=lambda p: int(p.name.rpartition("-")[2]))


def save_state(file: Path, network: Trainable, latents: Tensor) -> None:
    """Writes trainable weights and latents; frozen weights are the model's own and stay where they are.

    Raises:
        PersistenceError: The file cannot be written.
    """
    tensors = {f"reward.{site}": p.detach().cpu().contiguous() for site, p in network.sites.items()}
    partial = file.with_name(file.name + ".partial")
    try:
        safetensors.torch.save_file(tensors | {"latents": latents.detach().cpu()}, partial)
        os.replace(partial, file)
    except (OSError, safetensors.SafetensorError) as error:
        raise PersistenceError(f"{file} cannot be written: {error}") from error


def load_state(file: Path, network: Trainable) -> Tensor:
    """Puts stored weights into the network and returns the latents, shape `(Q,)`.

    Raises:
        PersistenceError: The file is missing or damaged, or of another network.
    """
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise PersistenceError(f"{file} cannot be read: {error}") from error
    latents: Tensor | None = tensors.pop("latents", None)
    expected = {f"reward.{site}": p.shape for site, p in network.sites.items()}
    if latents is None or {name: t.shape for name, t in tensors.items()} != expected:
        raise PersistenceError(f"{file} does not hold the weights of this network and its latents")
    with torch.no_grad():
        for site, p in network.sites.items():
            p.copy_(tensors[f"reward.{site}"])
    return latents


def _refuse_other(folder: Path, known: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> None:
    if known is None:
        return
    there = known.get("identity", {})
    differing = sorted(k for k in {*there, *identity} if there.get(k) != identity.get(k))
    if differing:
        shown = "; ".join(f"{k}: {there.get(k)!r} there, {identity.get(k)!r} here" for k in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise PersistenceError(
            f"`output_dir` {folder} holds a run with other settings ({shown}{more}); give another folder, "
            "or remove this one to begin anew"
        )


def _arrays(group: Any) -> list[np.ndarray]:
    found: list[np.ndarray] = []

    def keep(array: Tensor) -> Tensor:
        found.append(array.detach().cpu().numpy())
        return array

    group.map_arrays(keep)
    text = json.dumps([group.label, group.comparison.num_levels, group.comparison.num_annotators])
    return [np.frombuffer(text.encode(), np.uint8), *found]


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return str(digest.hexdigest())


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2))
        os.replace(partial, file)
    except OSError as error:
        raise PersistenceError(f"{file} cannot be written: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PersistenceError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PersistenceError(f"{file} does not hold a JSON object")
    return value

"""A posterior on disk: `posterior.json`, `posterior.safetensors` and `manifest.json` with their digests."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from ..errors import LikelihoodChangedWarning, PersistenceError
from ..likelihoods import base as likelihoods
from ..priors import Gaussian
from ..programs import RewardModel
from ..rewards import MLP, FeatureExtractor, Linear
from ..rewards.heads import head_config
from .gaussian_posterior import GaussianPosterior
from .posterior import FeedbackSchema, FitReport, Posterior

FORMAT_VERSION = 1
_SETTINGS, _TENSORS, _MANIFEST = "posterior.json", "posterior.safetensors", "manifest.json"
_HEADS = {"Linear": Linear, "MLP": MLP}
_POSTERIORS = {"GaussianPosterior": GaussianPosterior}


def save(posterior: Posterior, path: str | Path) -> None:
    """Writes `posterior` to folder `path`; an existing run there is replaced only when the new one is complete."""
    target = Path(path)
    tensors = posterior._state()
    settings = {
        "type": type(posterior).__name__,
        "program": _program_config(posterior.program),
        "schema": dataclasses.asdict(posterior.schema),
        "report": dataclasses.asdict(posterior.report),
    }
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / _MANIFEST).exists())):
        raise PersistenceError(f"{target} exists and is not a saved posterior; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PersistenceError(f"cannot write to {target.parent}: {error}") from error
    try:
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / _TENSORS)
        files = {name: _digest(folder / name) for name in (_SETTINGS, _TENSORS)}
        manifest = {"format": "bayesrm.posterior", "version": FORMAT_VERSION, "sha256": files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        folder.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            try:
                os.replace(folder, target)
            except OSError:
                os.replace(old / target.name, target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, target)
    except OSError as error:
        raise PersistenceError(f"cannot write {target}: {error}") from error
    finally:
        # Gone already unless something, an interrupt too, kept it from taking the target's place.
        shutil.rmtree(folder, ignore_errors=True)


def load(path: str | Path, likelihood: Any = None) -> Posterior:
    """Reads the posterior in folder `path`, after checking its files against the manifest."""
    import warnings

    folder = Path(path)
    manifest = _read_json(folder / _MANIFEST)
    if manifest.get("format") != "bayesrm.posterior" or manifest.get("version") != FORMAT_VERSION:
        raise PersistenceError(
            f"{folder / _MANIFEST} describes {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this release reads 'bayesrm.posterior' version {FORMAT_VERSION}"
        )
    for name in (_SETTINGS, _TENSORS):
        file = folder / name
        if not file.is_file():
            raise PersistenceError(f"{file} is missing; the run directory is incomplete")
        if _digest(file) != manifest.get("sha256", {}).get(name):
            raise PersistenceError(f"{file} differs from the digest in {_MANIFEST}; it was damaged or edited")
    settings = _read_json(folder / _SETTINGS)
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise PersistenceError(f"{folder / _TENSORS} cannot be read: {error}") from error
    program, changed = _program(settings["program"], likelihood)
    for name in changed:
        warnings.warn(
            f"the source of likelihood '{name}' has changed since the posterior in {folder} was fitted",
            LikelihoodChangedWarning,
            stacklevel=3,
        )
    schema = FeedbackSchema(tuple(settings["schema"]["kinds"]), tuple(settings["schema"]["annotators"]))
    report = FitReport(**settings["report"])
    cls = _POSTERIORS[settings["type"]]
    return cls._restore(program, schema, report, tensors)


def _program_config(program: RewardModel) -> dict[str, Any]:
    if isinstance(program.likelihood, Mapping):
        likelihood: Any = {"kinds": {kind: likelihoods.to_config(value) for kind, value in program.likelihood.items()}}
    else:
        likelihood = likelihoods.to_config(program.likelihood)
    if type(program.reward).__name__ not in _HEADS:
        raise PersistenceError(
            f"a reward function of type {type(program.reward).__name__} cannot be saved; use one of {sorted(_HEADS)}"
        )
    precision = program.prior.precision
    return {
        "reward": head_config(program.reward),
        "likelihood": likelihood,
        "prior": {"precision": dict(precision) if isinstance(precision, Mapping) else precision},
    }


def _program(config: dict[str, Any], given: Any) -> tuple[RewardModel, list[str]]:
    reward = config["reward"]
    extractor = None if reward["features"] is None else FeatureExtractor.from_config(reward["features"])
    # JSON has no tuples.
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in reward["settings"].items()}
    head = _HEADS[reward["type"]](features=extractor, **values)
    changed: list[str] = []
    if given is not None:
        likelihood = given
        stored = config["likelihood"].get("source")
        if stored and not isinstance(given, Mapping) and stored != likelihoods.source_hash(given):
            changed.append(getattr(given, "__name__", type(given).__name__))
    elif "kinds" in config["likelihood"]:
        likelihood = {}
        for kind, value in config["likelihood"]["kinds"].items():
            likelihood[kind], inner = likelihoods.from_config(value)
            changed += inner
    else:
        likelihood, changed = likelihoods.from_config(config["likelihood"])
    return RewardModel(head, likelihood, Gaussian(**config["prior"])), changed


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise PersistenceError(f"{file} is missing; is {file.parent} a saved posterior?") from error
    except (OSError, ValueError) as error:
        raise PersistenceError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PersistenceError(f"{file} does not hold a JSON object")
    return value


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""What decides the outcome of a run of `align`, so that a folder is not taken for another run's."""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ..engines.token_posterior import TokenPosterior
from ..engines.training import Training
from ._reference import ReferenceWeights
from ._weights import Snapshot
from .policy import Policy

#: Settings that leave the weights at each step as they are.
_INCIDENTAL = ("output_dir", "save_steps", "save_total_limit", "logging_steps", "callbacks", "report_to")
#: How deep settings may be nested.
_DEPTH = 6


def run_identity(policy: Policy, *, place: Path, training: Training, **settings: Any) -> dict[str, Any]:
    """The run as a flat mapping of JSON values: weights at the start and of the reference, and all settings.

    A policy that has the weights with which the run in `place` ended is taken for the one that it began with, so that
    the same call finds its finished run.
    """
    from ..engines._run_folder import _read_json
    from ._report import FINISHED

    current = weights_digest(policy.snapshot(device="cpu"))
    if (place / FINISHED).exists() and _read_json(place / FINISHED).get("trained") == current:
        known = _read_json(place / "training.json").get("identity", {})
        current = known.get("policy", current)
    identity = {
        "policy": current,
        "policy.reference": weights_digest(policy.reference),
        "policy.limits": [policy.max_prompt_tokens, policy.max_new_tokens],
    }
    frozen = {name: p for name, p in policy.model.named_parameters() if name not in policy.trainable}
    if frozen:
        identity["policy.frozen"] = weights_digest(Snapshot(frozen))
    for name, value in settings.items():
        identity |= _flat(name, described(value))
    kept = {name: value for name, value in training.to_config().items() if name not in _INCIDENTAL}
    identity |= {f"training.{name}": value for name, value in kept.items()}
    loaded: dict[str, Any] = json.loads(json.dumps(identity))
    return loaded


def weights_digest(snapshot: Snapshot | ReferenceWeights) -> str:
    """A digest of the names and values of weights, and of which kind of reference they are."""
    digest = xxhash.xxh3_128(b"" if isinstance(snapshot, Snapshot) else b"without adapters")
    for name, value in sorted(snapshot.values.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return str(digest.hexdigest())


def described(value: Any, depth: int = 0) -> Any:
    """Settings as JSON values that are the same in another process: objects by their class and what they hold.

    Functions count by their code, defaults and what they close over; posteriors, networks and arrays by a digest of
    their numbers. What is nested too deeply counts by its class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray):
        array = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else value
        return f"{array.shape} {xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).tobytes())}"
    if depth > _DEPTH or isinstance(value, type | types.ModuleType | Policy):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, list | tuple):
        parts = [described(part, depth + 1) for part in value]
        long = len(parts) > 16
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode()) if long else parts
    if isinstance(value, Mapping):
        return {str(key): described(part, depth + 1) for key, part in value.items()}
    if isinstance(value, types.MethodType):
        return [described(value.__func__, depth + 1), described(value.__self__, depth + 1)]
    if isinstance(value, types.FunctionType):
        return _code(value, depth)
    if isinstance(value, functools.partial):
        return [described(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    state = getattr(value, "_state", None)
    if isinstance(value, torch.nn.Module):
        held: Any = {"weights": weights_digest(Snapshot(value.state_dict()))}
    elif callable(state):
        held = dict(state())
        if isinstance(value, TokenPosterior):
            # Its tensors are the likelihood's latents alone; the network has weights of its own.
            held |= {"reward": value.head}
    elif dataclasses.is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        held = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("__")}
    return {"": type(value).__qualname__} | {str(k): described(v, depth + 1) for k, v in held.items()}


def _code(function: types.FunctionType, depth: int) -> list[Any]:
    """Name, code, defaults and closure of a function."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    bound = [described(part, depth + 1) for part in (function.__defaults__ or (), function.__kwdefaults__ or {}, cells)]
    return [function.__qualname__, _digest_of(function.__code__), *bound]


def _digest_of(code: types.CodeType) -> str:
    constants = [_digest_of(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return xxhash.xxh3_128_hexdigest(code.co_code + repr((constants, code.co_names)).encode())


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested mappings as `a.b.c`, so that what differs can be named."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= _flat(f"{name}.{key}" if key else name, part)
    return found

"""What the settings of rewards that are made of a language model have in common."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import ArgumentError
from ._checks import check_choice, check_device, check_integer
from ._encoder import Encoder

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Not `typing.Self`, which run-time type checkers of single methods cannot resolve.
_Settings = TypeVar("_Settings", bound="NetworkSettings")


class NetworkSettings:
    """Checks of a language model with low-rank adapters, and settings as JSON values; a base of frozen dataclasses."""

    def _check_network(self, *, least_rank: int) -> None:
        """Raises `ArgumentError` for a setting without use; writes paths, devices and sequences in one form."""
        settings: Any = self
        if not isinstance(settings.model, str | os.PathLike) or not str(settings.model):
            raise ArgumentError(f"`model` must be a folder or the id of a model, got {settings.model!r}")
        check_integer("rank", settings.rank, least_rank)
        if not settings.alpha > 0:
            raise ArgumentError(f"`alpha` is {settings.alpha}; it is a positive number")
        if not 0.0 <= settings.dropout < 1.0:
            raise ArgumentError(f"`dropout` is {settings.dropout}; it is a probability below 1")
        check_choice("on_long", settings.on_long, ("shorten", "raise"))
        check_choice("dtype", settings.dtype, DTYPES)
        check_device(settings.device)
        targets = settings.target_modules
        if targets is not None and not isinstance(targets, str):
            if not isinstance(targets, Sequence) or not targets or not all(isinstance(t, str) for t in targets):
                raise ArgumentError(f"`target_modules` is {targets!r}; give names of modules, or 'all-linear'")
            targets = tuple(targets)
        settled = {
            "model": os.fspath(settings.model),
            "target_modules": targets,
            "device": None if settings.device is None else str(settings.device),
        }
        if getattr(settings, "adapter", None) is not None:
            settled["adapter"] = os.fspath(settings.adapter)
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def source(self) -> Encoder:
        """Where configuration, tokenizer and weights of the model come from."""
        settings: Any = self
        return Encoder(
            settings.model, revision=settings.revision, pooling="last", layer=-1, device=settings.device,
            dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, watch_files=False,
        )  # fmt: skip

    def to_config(self) -> dict[str, Any]:
        """Settings as JSON values, for `from_config`."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls: type[_Settings], config: Mapping[str, Any]) -> _Settings:
        """The settings that `to_config` described."""
        # JSON has no tuples.
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**values)

"""From a folder or hub id to a causal language model, with adapters where asked."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..backend import seeded
from ..errors import ArgumentError
from ._encoder import Encoder, quiet_loading
from ._sequences import _OFFSET_POSITIONS

_LOG = logging.getLogger("bayesrm")


@runtime_checkable
class AdapterSettings(Protocol):
    """Settings of new low-rank adapters."""

    @property
    def rank(self) -> int:
        """Rank."""
        ...

    @property
    def alpha(self) -> float:
        """Adapters are multiplied by `alpha / rank`."""
        ...

    @property
    def dropout(self) -> float:
        """Dropout on their input."""
        ...

    @property
    def target_modules(self) -> str | tuple[str, ...] | None:
        """Modules that get them; `None` for what peft knows for the architecture."""
        ...


def base_of_adapter(path: str) -> str | None:
    """The model that the adapter in this folder belongs to; `None` where the folder holds no adapter."""
    file = Path(path).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"`path` {path!r} holds an adapter whose settings cannot be read: {error}") from error
    if not base:
        raise ArgumentError(
            f"`path` {path!r} holds an adapter that does not name its model; pass the model, and `adapter`"
        )
    return str(base)


def load_model(source: Encoder, *, attention: str | None, seed: int) -> tuple[Any, tuple[str, ...]]:
    """The model, and the names of its weights that the checkpoint lacks and that are new."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = source.load(AutoConfig, "settings (config.json)")
    if getattr(config, "is_encoder_decoder", False):
        raise ArgumentError(
            f"`path` {source.model!r} is a model of two parts, an encoder and a decoder; a policy is a causal model"
        )
    if (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        # An encoder is a causal model when its tokens see only those before them.
        config.is_decoder = True
    extra = {} if attention is None else {"attn_implementation": attention}
    with seeded(seed), quiet_loading():
        model, info = source.load(
            AutoModelForCausalLM, "weights", config=config, dtype=getattr(torch, source.dtype),
            output_loading_info=True, **extra,
        )  # fmt: skip
    missing = sorted(info["missing_keys"])
    backbone = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if backbone:
        raise ArgumentError(
            f"`path` {source.model!r}: the checkpoint lacks weights, such as {backbone[0]!r} ({len(backbone)} in all), "
            "which would be random. Save the model again, or correct the architecture in its config.json"
        )
    if missing:
        _LOG.warning(
            "%s has no language-model head: %d weights, such as %s, are new and random; train the policy on text first",
            source.model, len(missing), missing[0],
        )  # fmt: skip
    return model, tuple(missing)


def with_adapters(model: Any, lora: AdapterSettings | None, adapter: str | None, seed: int) -> Any:
    """The peft model around `model`: a saved adapter, or a new one that changes nothing yet."""
    import peft
    from transformers.pytorch_utils import Conv1D

    if adapter is not None:
        try:
            return peft.PeftModel.from_pretrained(model, os.fspath(adapter), is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ArgumentError(f"`adapter` {adapter!r} cannot be loaded: {error}") from error
    if lora is None:
        return model
    targets = lora.target_modules
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    try:
        with seeded(seed), warnings.catch_warnings():
            # A model may have both kinds of linear layer; peft sets this for each of them, and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
        )
        raise ArgumentError(
            f"`target_modules` is {targets!r}, which peft cannot apply to {type(model).__name__}: {error}. Its linear "
            f"modules end in {linear}"
        ) from error


def checkpoint_activations(model: Any) -> None:
    """Recomputes the activations of layers in backward passes."""
    # transformers 5 renamed the method; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def without_dropout(model: Any) -> None:
    """Sets every dropout of a model to 0, that of adapters excepted, which their own setting asks for."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    modules = [module for name, module in model.named_modules() if "lora_dropout" not in name]
    for owner in (*configs, *modules):
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(owner, torch.nn.Dropout))):
                setattr(owner, name, 0.0)


def positions_of(config: Any) -> int | None:
    """Most tokens that the model reads, `None` where its settings do not say."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # Some families count positions from the one after the padding token's id.
    offset = any(family in text.model_type for family in _OFFSET_POSITIONS)
    return positions - (text.pad_token_id + 1 if offset else 0)

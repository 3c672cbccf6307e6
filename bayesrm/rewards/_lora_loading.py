"""From settings to a peft model: weights, head, adapters."""

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ..backend import seeded
from ..errors import ArgumentError
from ._encoder import Encoder, quiet_loading

if TYPE_CHECKING:
    from .lora import LoRA


def load_classifier(settings: "LoRA", encoder: Encoder, seed: int) -> tuple[Any, list[str]]:
    """The model with a scalar head, and the names of the modules that are trained whole."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = encoder.load(AutoConfig, "settings (config.json)", num_labels=1)
    if not settings.base_dropout:
        _without_dropout(config)
    extra = {} if settings.attention is None else {"attn_implementation": settings.attention}
    with seeded(seed), quiet_loading():
        model, info = encoder.load(
            AutoModelForSequenceClassification, "weights with a classification head", config=config,
            dtype=getattr(torch, settings.dtype), output_loading_info=True, **extra,
        )  # fmt: skip
    missing = set(info["missing_keys"])
    backbone = f"{model.base_model_prefix}."
    heads = [
        name for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]  # fmt: skip
    new = sorted(key.rsplit(".", 1)[0] for key in missing if key.startswith(backbone))
    strange = [name for name in new if "pooler" not in name]
    if strange:
        raise ArgumentError(
            f"`model` {settings.model!r}: the checkpoint lacks weights, such as {strange[0]!r} ({len(strange)} "
            "modules), which would be random. Save the model again, or correct the architecture in its config.json"
        )
    if not heads:
        raise ArgumentError(f"`model` {settings.model!r}: {type(model).__name__} has no head beside its backbone")
    final = final_layer(model, heads)
    if any(key.startswith(f"{final}.") for key in missing):
        with torch.no_grad():
            for parameter in model.get_submodule(final).parameters():
                parameter.zero_()
    return model, [*heads, *dict.fromkeys(new)]


def final_layer(model: torch.nn.Module, heads: list[str]) -> str:
    """Name of the last linear module of the head, the one that returns the reward."""
    found = [
        name for head in heads for name, module in model.named_modules()
        if (name == head or name.startswith(f"{head}.")) and getattr(module, "out_features", 0) == 1
    ]  # fmt: skip
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no linear layer with one output in its head ({heads})")
    last: str = found[-1]
    return last


def with_adapters(settings: "LoRA", model: Any, trained_whole: list[str], seed: int) -> Any:
    """The peft model around `model`, adapters active and trainable with the modules of the head."""
    import peft
    from transformers.pytorch_utils import Conv1D

    if settings.adapter is not None:
        try:
            wrapped = peft.PeftModel.from_pretrained(model, settings.adapter, is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ArgumentError(f"`adapter` {settings.adapter!r} cannot be loaded: {error}") from error
        if not isinstance(wrapped.peft_config["default"], peft.LoraConfig):
            raise ArgumentError(f"`adapter` {settings.adapter!r} is not a LoRA adapter")
        return wrapped
    targets = settings.target_modules
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if settings.layers is not None and depth is not None and max(settings.layers) >= depth:
        raise ArgumentError(
            f"`layers` names {max(settings.layers)}; {type(model).__name__} has layers 0 to {depth - 1}"
        )
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        layers_to_transform=None if settings.layers is None else list(settings.layers),
        # peft appends to the list it is given.
        modules_to_save=list(trained_whole),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with seeded(seed):
            return peft.get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ArgumentError(
            f"`target_modules` is {targets!r}, which peft cannot apply to {type(model).__name__}: {error}. "
            f"Its linear modules end in {linear}"
        ) from error


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's `forward` has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def _without_dropout(config: Any) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if ("drop" in name) and isinstance(value, float):
                setattr(part, name, 0.0)

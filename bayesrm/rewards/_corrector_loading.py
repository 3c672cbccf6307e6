"""From settings to the model of a corrector: an encoder with a decoder, or a decoder alone."""

from typing import TYPE_CHECKING, Any

import torch

from ..backend import seeded
from ..errors import ArgumentError
from ._causal_lm import checkpoint_activations, load_model, with_adapters, without_dropout
from ._encoder import Encoder, quiet_loading

if TYPE_CHECKING:
    from .corrector import Corrector


def load_corrector(settings: "Corrector", source: Encoder, seed: int) -> Any:
    """The model, with adapters where asked, at its starting point."""
    from transformers import AutoConfig

    config = source.load(AutoConfig, "settings (config.json)")
    two_parts = bool(getattr(config, "is_encoder_decoder", False))
    if two_parts:
        model = _load_two_parts(source, settings.attention, seed)
    else:
        model, new = load_model(source, attention=settings.attention, seed=seed)
        if new and settings.rank:
            raise ArgumentError(
                f"`model` {settings.model!r} has no language-model head, and adapters would leave a random one frozen; "
                "train it on text first (rank=0 trains the whole model), or choose another"
            )
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    if settings.rank:
        model = with_adapters(model, None if settings.adapter else settings, settings.adapter, seed)
        if two_parts:
            # What is written in the adapter's settings when it is saved.
            model.peft_config["default"].task_type = "SEQ_2_SEQ_LM"
        wanted = torch.float64 if settings.dtype == "float64" else torch.float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wanted)
    if not settings.base_dropout:
        without_dropout(model)
    return model


def _load_two_parts(source: Encoder, attention: str | None, seed: int) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    extra = {} if attention is None else {"attn_implementation": attention}
    with seeded(seed), quiet_loading():
        model, info = source.load(
            AutoModelForSeq2SeqLM, "weights", dtype=getattr(torch, source.dtype), output_loading_info=True, **extra
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ArgumentError(
            f"`model` {source.model!r}: the checkpoint lacks weights, such as {missing[0]!r} ({len(missing)} in all), "
            "which would be random. Save the model again, or correct the architecture in its config.json"
        )
    if model.config.decoder_start_token_id is None:
        raise ArgumentError(
            f"`model` {source.model!r} does not say with which token its decoder starts; set `decoder_start_token_id` "
            "in its config.json"
        )
    return model

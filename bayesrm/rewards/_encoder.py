"""A pretrained language model: its settings, tokenizer and weights, each loaded when first needed."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from ..errors import ArgumentError, PersistenceError
from ._pooling import pool
from .feature_cache import model_digest, model_files


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Puts token sequences through a model and pools its hidden states; the settings are those of `FeatureExtractor`.

    Args:
        watch_files: Refuse weights that differ from those that `source` described: cached embeddings would be mixed up.
    """

    model: str
    _: dataclasses.KW_ONLY
    revision: str | None
    pooling: str
    layer: int
    device: str | None
    dtype: str
    trust_remote_code: bool
    watch_files: bool

    def embed(self, sequences: list[np.ndarray]) -> Float32[np.ndarray, "sequences width"]:
        """Puts one padded batch through the model."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        network = self.network
        device = next(network.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        with torch.inference_mode():
            if self.layer == -1:
                hidden = network(input_ids=ids, attention_mask=mask).last_hidden_state
            else:
                hidden = network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
                    self.layer
                ]
            pooled = pool(hidden if self.dtype == "float64" else hidden.float(), mask.bool(), self.pooling)
        if pooled.shape[1] != self.width:
            raise ArgumentError(
                f"`model` {self.model!r}: hidden states have width {pooled.shape[1]}, its settings say {self.width}; "
                "choose another model or `layer`"
            )
        return pooled.float().cpu().numpy()

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        config = self.load(AutoConfig, "settings (config.json)")
        whole = config if hasattr(config, "hidden_size") else config.get_text_config()
        count = whole.num_hidden_layers + 1
        if not -count <= self.layer < count:
            raise ArgumentError(
                f"`layer` must lie between {-count} and {count - 1} for {self.model!r} ({count - 1} layers and the "
                f"input embedding), got {self.layer}"
            )
        if whole is not config:
            whole._commit_hash = getattr(config, "_commit_hash", None)
        return whole

    @cached_property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def source(self) -> tuple[str, str, dict[str, tuple[int, int]]]:
        """Readable name of the model, what identifies its weights, and the state of its files."""
        if self.folder is not None:
            # Listed first: a change while the contents are read then shows at loading.
            files = model_files(self.folder)
            return self.folder.resolve().name, model_digest(self.folder), files
        commit = getattr(self.config, "_commit_hash", None) or self.revision
        return self.model.replace("/", "--"), f"{self.model}@{commit}", {}

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.load(AutoTokenizer, "tokenizer")

    @cached_property
    def network(self) -> Any:
        from transformers import AutoModel

        files = self.source[2] if self.watch_files else None
        # New layers that a checkpoint lacks are drawn at random while loading.
        with torch.random.fork_rng(devices=[]), quiet_loading():
            network, info = self.load(AutoModel, "weights", output_loading_info=True)
        if files is not None and self.folder is not None and model_files(self.folder) != files:
            raise PersistenceError(
                f"`model` {self.model!r}: its files changed while in use; make a new FeatureExtractor"
            )
        two_parts = bool(getattr(network.config, "is_encoder_decoder", False))
        missing = [
            k for k in info["missing_keys"] if "pooler" not in k and not (two_parts and k.startswith("decoder."))
        ]
        if missing:
            raise ArgumentError(
                f"`model` {self.model!r}: the checkpoint lacks weights, such as {min(missing)!r} ({len(missing)} "
                "in all), which would be random. Save the model again, or correct the architecture in its config.json"
            )
        network = network.get_encoder() if two_parts else network
        network.config.use_cache = False
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return network.to(device=device, dtype=getattr(torch, self.dtype)).eval()

    @cached_property
    def folder(self) -> Path | None:
        """The folder of a local model, `None` for one on the hub."""
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if (folder / "adapter_config.json").exists():
                raise ArgumentError(
                    f"`model` {self.model!r} holds an adapter, not a whole model; merge it into its base model first "
                    "(`merge_and_unload` of peft) and save that"
                )
            return folder
        name = self.model
        if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ArgumentError(
                f"`model` {self.model!r} is neither a folder that exists nor a hub id such as 'org/name'"
            )
        return None

    def load(self, loader: Any, what: str, **arguments: Any) -> Any:
        """Calls `loader.from_pretrained` on the model, with errors that say what could not be loaded."""
        where = str(self.folder or self.model)
        arguments |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return loader.from_pretrained(where, **arguments)
        except Exception as error:
            hint = (
                "the folder must hold a model and a tokenizer as `save_pretrained` writes them"
                if self.folder
                else "pass a local folder, or check the name and the connection (HF_HUB_OFFLINE=1 allows only what was "
                "downloaded before)"
            )
            reason = str(error).strip().split("\n")[0]
            raise ArgumentError(f"`model` {self.model!r}: cannot load its {what}; {hint}. Reason: {reason}") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps progress bars and reports of `transformers` off while weights load, then restores its settings."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()

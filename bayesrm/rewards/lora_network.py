"""A loaded LoRA reward model: a torch module from token sequences to rewards, and its parameters by site."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._typing import Tensor
from ..data.comparisons import Comparisons
from ..data.rendering import Content
from ..errors import ArgumentError, DataError
from ._causal_lm import checkpoint_activations
from ._checks import check_columns, check_item
from ._flat_weights import FlatWeights
from ._lora_loading import accepts, final_layer, load_classifier, with_adapters
from ._sequences import SequencePlanner
from .lora import LoRA

#: Items whose texts are in memory at one time while they are tokenized.
_CHUNK = 4096
#: A batch in parts has at most this share of the tokens of the whole.
_WORTHWHILE = 0.9
#: Fewest tokens of a part, by kind of device: a pass over fewer leaves the device idle.
_LEAST_TOKENS = {"cpu": 512, "cuda": 8192}


class LoRANetwork(FlatWeights):
    """The network of a `LoRA` reward function; made by `LoRA.load`.

    Attributes:
        settings: The settings it was loaded from.
        model: The peft model: frozen weights, adapters and head. Weights move with training; everything here follows.
        initial: Prior mean of each parameter site.
        head_sites: Sites of the head, and of what else is trained whole.
        lock: Held by whatever changes the weights or hooks of the modules for a while, so that threads can share a
            network; re-entrant. Methods that read or write weights take it themselves.
    """

    def __init__(self, settings: LoRA, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self._encoder = settings.source()
        base, trained_whole = load_classifier(settings, self._encoder, seed)
        self._two_parts = bool(getattr(base.config, "is_encoder_decoder", False))
        self._positions = accepts(base, "position_ids")
        self._settle_padding(base)
        heads = [name for name in trained_whole if "." not in name]
        self._final = final_layer(base, heads)
        brought = {
            name: p.detach().clone() for name, p in base.named_parameters() if name.startswith(tuple(trained_whole))
        }
        self.model = with_adapters(settings, base, trained_whole, seed)
        self._settle_precision()
        if settings.gradient_checkpointing:
            checkpoint_activations(self.model)
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        self.eval()
        self.head_sites = frozenset(site for site in self.sites if not re.search(r"\.lora_\w+$", site))
        if missing := [name for name in trained_whole if not any(s.startswith(name) for s in self.head_sites)]:
            raise ArgumentError(
                f"`adapter` {settings.adapter!r} was saved without {missing[0]!r}, which would stay untrained; save it "
                "with `modules_to_save`, or train anew without `adapter`"
            )
        self.initial = {name: self._center(name, p, brought) for name, p in self.sites.items()}

    def _settle_padding(self, base: Any) -> None:
        tokenizer, config = self._encoder.tokenizer, base.config
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        reads_last = self._two_parts or not (getattr(tokenizer, "cls_token_id", None) is not None)
        if reads_last and eos is None:
            raise ArgumentError(
                f"`model` {self.settings.model!r}: its tokenizer has no end-of-sequence token, where the reward is "
                "read; set `eos_token` in its tokenizer_config.json"
            )
        if self.settings.padding_side == "left" and (self._two_parts or not reads_last):
            raise ArgumentError(
                f"`padding_side` is 'left'; {type(base).__name__} is no decoder and is padded on the right"
            )
        # Decoders take the last token that is not padding: a padding token that ends a sequence would be passed over.
        # Attention never sees padding, so that any other token serves.
        if pad is None or pad == eos:
            others = (tokenizer.unk_token_id, 0, 1)
            pad = next(token for token in others if token is not None and token != eos)
        self._pad = int(pad)
        for part in (config, config.get_text_config()):
            part.pad_token_id = self._pad
            part.use_cache = False
        if self._two_parts and config.eos_token_id is None:
            config.eos_token_id = eos
        self._eos = eos
        self._planner = SequencePlanner(
            self._encoder, kinds=("joint",), max_length=self.settings.max_length, on_long=self.settings.on_long,
            closing=(int(eos),) if reads_last else (),
        )  # fmt: skip

    def _settle_precision(self) -> None:
        """Trains and differentiates in float32 at least; the frozen weights stay as they are."""
        wanted = torch.float64 if self.settings.dtype == "float64" else torch.float32
        for module in self.model.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":
                module.modules_to_save.to(wanted)
                module.register_forward_pre_hook(_caster(wanted))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wanted)

    def _center(self, site: str, parameter: Tensor, brought: Mapping[str, Tensor]) -> Tensor:
        """Prior mean of a site: where it starts; where a trained adapter is the start, where it may have started."""
        if site in brought:
            return brought[site].to(parameter)
        value = parameter.detach().clone()
        return torch.zeros_like(value) if self.settings.adapter is not None and site.endswith(".lora_B") else value

    @property
    def last_layer_sites(self) -> tuple[str, ...]:
        """Sites of the linear layer that returns the reward."""
        return tuple(site for site in self.sites if site.rsplit(".", 1)[0] == self._final)

    def tokenize(self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0) -> list[np.ndarray]:
        """Token sequences of items, int64, special tokens included.

        Args:
            prompts: One for each item: a string (may be empty) or messages.
            responses: One for each item: a string or messages, not empty.
            start: Position of the first item, for error messages.

        Raises:
            DataError: A text cannot be used; the message names the item.
        """
        check_columns(prompts, responses)
        pairs = list(zip(prompts, responses, strict=True))
        for item, (prompt, response) in enumerate(pairs, start):
            check_item(item, prompt, response)
        sequences = []
        for begin in range(0, len(pairs), _CHUNK):
            part = pairs[begin : begin + _CHUNK]
            # Tokenizers change settings of their own while they work.
            with self.lock:
                chunk = self._planner.plan(range(start + begin, start + begin + len(part)), part)
            sequences += [chunk.sequences[i] for i in chunk.uses["joint"]]
        if self._two_parts:
            for item, sequence in enumerate(sequences, start):
                count = int((sequence == self._eos).sum())
                if count != 1:
                    raise DataError(
                        f"item {item}: the text holds {count - 1} end-of-sequence tokens of its own, which this model "
                        "would read as its end; remove them"
                    )
        return sequences

    def tokenize_items(self, data: Comparisons) -> list[np.ndarray]:
        """Token sequences of the unique items of comparisons; texts are read in chunks."""
        sequences: list[np.ndarray] = []
        for begin in range(0, data.num_items, _CHUNK):
            texts = [data.text(i) for i in range(begin, min(begin + _CHUNK, data.num_items))]
            sequences += self.tokenize([p for p, _ in texts], [r for _, r in texts], start=begin)
        return sequences

    def collate(self, sequences: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """One padded batch on the network's device: what `forward` takes."""
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        left = self.settings.padding_side == "left"
        for row, sequence in enumerate(sequences):
            place = slice(longest - len(sequence), None) if left else slice(len(sequence))
            ids[row, place] = torch.from_numpy(sequence)
            mask[row, place] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if left and self._positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return {name: value.to(self.device) for name, value in batch.items()}

    def forward(self, **batch: Tensor) -> Tensor:
        """Rewards of a collated batch, shape `(n,)`.

        While training, a batch of ragged sequences runs in parts of like length, so that padding costs little.
        """
        with self.lock:
            return self._in_parts(batch)

    def _in_parts(self, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask")
        if not self.training or mask is None:
            return self._rewards(batch)
        parts = _parts_of_like_length(mask.sum(1).tolist(), _LEAST_TOKENS.get(mask.device.type, _LEAST_TOKENS["cuda"]))
        if len(parts) == 1:
            return self._rewards(batch)
        rewards = []
        for part in parts:
            columns = mask[part].any(0)
            rewards.append(self._rewards({name: value[part][:, columns] for name, value in batch.items()}))
        order = torch.tensor([i for part in parts for i in part], device=mask.device)
        return torch.cat(rewards)[torch.argsort(order)]

    def _rewards(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits = self.model(**batch).logits.reshape(-1)
        result: Tensor = logits if logits.dtype == torch.float64 else logits.float()
        return result

    def parameter_shapes(self, num_features: int = 0) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter site; token batches have no number of features."""
        return {site: tuple(p.shape) for site, p in self.sites.items()}

    def save_adapter(self, folder: str | Path) -> None:
        """Writes adapters and head in peft's format, to be loaded with `peft.PeftModel.from_pretrained`."""
        with self.lock:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)


def _parts_of_like_length(lengths: Sequence[int], least_tokens: int) -> list[list[int]]:
    """Splits a batch into parts of like length, one where that would not save a tenth of the tokens.

    Args:
        lengths: Length of each sequence.
        least_tokens: Tokens of a part, padding included, below which a pass would not be worth its overhead.

    Example:
        >>> _parts_of_like_length([9, 3, 10, 3], least_tokens=6)
        [[2], [0], [1, 3]]
        >>> _parts_of_like_length([9, 3, 10, 3], least_tokens=12)
        [[0, 1, 2, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # best[j]: fewest tokens for the j longest sequences, and where the last part begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        options = [(math.inf, 0)]
        for start in range(stop):
            tokens = lengths[order[start]] * (stop - start)
            if tokens >= least_tokens or stop - start == len(order):
                options.append((best[start][0] + tokens, start))
        best.append(min(options))
    if best[-1][0] > _WORTHWHILE * len(order) * lengths[order[0]]:
        return [list(range(len(order)))]
    parts, stop = [], len(order)
    while stop:
        start = best[stop][1]
        parts.append(order[start:stop])
        stop = start
    return parts[::-1]


def _caster(dtype: torch.dtype) -> Any:
    def cast(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)

    return cast

"""A loaded corrector: likelihoods of corrected responses, greedy corrections, and its parameters by site."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from .._typing import Tensor
from ..data.rendering import Content
from ..errors import ArgumentError
from ._causal_lm import positions_of
from ._corrector_loading import load_corrector
from ._corrector_tokens import CorrectorCodec, Reading
from ._corrector_writing import write_greedily
from ._flat_weights import FlatWeights
from .corrector import Corrector


class CorrectorNetwork(FlatWeights):
    """The network of a `Corrector`; made by `Corrector.load`.

    Attributes:
        settings: The settings it was loaded from.
        model: The language model, in peft's wrapping where it has adapters.
        codec: From texts to token ids.
        two_parts: Whether an encoder reads and a decoder writes.
        initial: Prior mean of each parameter site.
        lock: Held by whatever changes the weights or hooks of the modules for a while, so that threads can share a
            network; re-entrant.
    """

    def __init__(self, settings: Corrector, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        source = settings.source()
        self.model = load_corrector(settings, source, seed)
        config = self.base.config
        self.two_parts = bool(getattr(config, "is_encoder_decoder", False))
        self.codec = CorrectorCodec(
            settings, source.tokenizer, two_parts=self.two_parts, positions=positions_of(config),
            generation_config=getattr(self.base, "generation_config", None),
        )  # fmt: skip
        pad = source.tokenizer.pad_token_id
        self._pad = int(self.codec.stop_ids[0] if pad is None else pad)
        self.model.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.eval()
        trained = settings.adapter is not None
        self.initial = {
            site: torch.zeros_like(p) if trained and site.endswith(".lora_B") else p.detach().clone()
            for site, p in self.sites.items()
        }

    @property
    def base(self) -> Any:
        """The language model without the wrapper of peft."""
        return self.model.get_base_model() if self.settings.rank else self.model

    def encode(self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0) -> list[Reading]:
        """Token ids of prompts and responses, one each; errors count items from `start`.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A text cannot be used; the message names the item.
        """
        return self.codec.encode(prompts, responses, start=start)

    def collate(self, readings: Sequence[Reading], targets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """One batch on the network's device, padded on the right: what `forward` takes.

        Args:
            readings: What is read.
            targets: Token ids of what is written, at least one each.
        """
        read = [list(reading.tokens) for reading in readings]
        # The last token of a target predicts nothing.
        if self.two_parts:
            start = int(self.base.config.decoder_start_token_id)
            written = [[start, *target[:-1]] for target in targets]
            ids, mask = self._padded(read)
            writing, _ = self._padded(written)
            batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": writing}
            first = [0] * len(targets)
        else:
            writing, mask = self._padded([[*r, *t[:-1]] for r, t in zip(read, targets, strict=True)])
            batch = {"input_ids": writing, "attention_mask": mask}
            first = [len(r) - 1 for r in read]
        predicts = torch.zeros(writing.shape, dtype=torch.bool)
        for row, (begin, target) in enumerate(zip(first, targets, strict=True)):
            predicts[row, begin : begin + len(target)] = True
        batch |= {"predicts": predicts, "targets": torch.tensor([token for target in targets for token in target])}
        return {name: value.to(self.device) for name, value in batch.items()}

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        shape = (len(rows), max(map(len, rows)))
        ids, mask = torch.full(shape, self._pad, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def forward(self, **batch: Tensor) -> Float[Tensor, "n"]:
        """Log-likelihoods of the targets of a collated batch, sums over their tokens, in nats, shape `(n,)`, float64.

        Differentiable in the parameters.
        """
        logits = self.logits(batch)
        chosen = logits.gather(-1, batch["targets"][:, None])[:, 0] - logits.logsumexp(-1)
        rows = batch["predicts"].nonzero()[:, 0]
        return torch.zeros(len(batch["predicts"]), dtype=torch.float64, device=logits.device).index_add(
            0, rows, chosen.double()
        )

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens words"]:
        """Logits of the M target tokens of a collated batch, row by row, shape `(M, V)`, float32 at least."""
        predicts = batch["predicts"]
        inputs = {name: value for name, value in batch.items() if name not in ("predicts", "targets")}

        def selected(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            # The output layer, whose width is the vocabulary's, works where a target token is predicted and nowhere
            # else.
            return (arguments[0][predicts], *arguments[1:])

        with self.lock:
            handle = self.base.get_output_embeddings().register_forward_pre_hook(selected)
            try:
                logits: Tensor = self.model(**inputs, use_cache=False).logits
            finally:
                handle.remove()
        return logits if logits.dtype == torch.float64 else logits.float()

    def log_likelihood(
        self, prompts: Sequence[Content], responses: Sequence[Content], targets: Sequence[Content]
    ) -> Float[Tensor, "n"]:
        """Log-likelihoods log p(target | prompt, response), the end of the sequence included, in nats, shape `(n,)`.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A text cannot be used.
        """
        readings = self.encode(prompts, responses)
        written = [reading.response for reading in self.encode(prompts, targets)]
        found: Tensor = self(**self.collate(readings, written))
        return found

    def correct(self, prompts: Sequence[Content], responses: Sequence[Content], *, batch_size: int = 16) -> list[str]:
        """Corrected responses, the most probable token after token.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A text cannot be used.
        """
        written = self.correct_tokens(self.encode(prompts, responses), batch_size=batch_size)
        return [self.codec.decode(tokens) for tokens in written]

    def correct_tokens(self, readings: Sequence[Reading], *, batch_size: int = 16) -> list[tuple[int, ...]]:
        """Token ids of corrected responses, each up to the end of the sequence, or as long as responses may be."""
        with self.lock:
            return write_greedily(
                self.base, [reading.tokens for reading in readings], two_parts=self.two_parts, pad=self._pad,
                stop_ids=self.codec.stop_ids, max_new_tokens=self.settings.max_response_tokens, batch_size=batch_size,
            )  # fmt: skip

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapters in peft's format, to be loaded with `peft.PeftModel.from_pretrained`."""
        if not self.settings.rank:
            raise ArgumentError("this corrector has no adapters: its `rank` is 0 and the whole model is trained")
        with self.lock:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)

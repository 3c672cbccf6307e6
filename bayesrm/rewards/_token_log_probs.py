"""Log-probabilities of response tokens, without the logits of a whole batch over the whole vocabulary.

While a batch runs, the model's output layer is replaced by one that looks only at positions which predict a response
token, takes them a chunk at a time, and returns two numbers for each instead of one for every word: the token's
log-probability and the logarithm of the normaliser.
"""

import contextlib
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .._typing import Tensor
from ..errors import ArgumentError
from ._tokens import TokenSequences

_LOG = logging.getLogger("bayesrm")

_LOCKS: "weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """Log-probabilities of the tokens of N responses, padded to the longest of T tokens.

    Attributes:
        log_probs: log p(token | prompt, tokens before), in nats, shape `(N, T)`, 0 at padding.
        log_normalisers: Log-sum-exp over the vocabulary of the logits (divided by the temperature) that predict each
            token, the soft value of its state in soft Q-learning; shape `(N, T)`, 0 at padding.
        mask: True at tokens, the end-of-sequence token included, shape `(N, T)`.

    Example:
        >>> import torch
        >>> TokenLogProbs(torch.tensor([[-1.0, -2.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).sums()
        tensor([-3.])
    """

    log_probs: Float[Tensor, "n tokens"]
    log_normalisers: Float[Tensor, "n tokens"]
    mask: Bool[Tensor, "n tokens"]

    def sums(self) -> Float[Tensor, "n"]:
        """Log-probabilities of the responses, shape `(N,)`."""
        return self.log_probs.sum(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences, padded on the right.

    Attributes:
        rows: Which sequences these are.
        ids: Token ids, shape `(b, L)`.
        mask: 1 at tokens, shape `(b, L)`.
        predicts: True at the M positions whose output predicts a response token, shape `(b, L)`.
        targets: The tokens predicted there, row by row, shape `(M,)`.
        places: Where these belong in a flattened `(N, T)` array, shape `(M,)`.
    """

    rows: list[int]
    ids: Int[Tensor, "b L"]
    mask: Int[Tensor, "b L"]
    predicts: Bool[Tensor, "b L"]
    targets: Int[Tensor, "M"]
    places: Int[Tensor, "M"]


def lock_of(model: torch.nn.Module) -> threading.RLock:
    """The lock that whoever changes weights or modules of this model for a while must hold; re-entrant."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model lives."""
    return next(model.parameters()).device


def mixed_logits(
    logits: Float[Tensor, "*b V"], other: Float[Tensor, "*b V"], weight: float
) -> Float[Tensor, "*b V"]:  # fmt: skip
    """Logits of the geometric mixture of two distributions over the next token."""
    return torch.lerp(logits.log_softmax(-1), other.log_softmax(-1), weight)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode inside the block, and in its own mode again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batches(sequences: TokenSequences, *, batch_tokens: int, pad: int, device: torch.device) -> Iterator[Batch]:
    """Batches of sequences of like length, none of more than `batch_tokens` tokens with padding (one sequence may)."""
    pairs = list(zip(sequences.prompts, sequences.responses, strict=True))
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    longest_response = int(sequences.lengths.max(initial=0))
    order = sorted(range(len(pairs)), key=lambda row: -lengths[row])
    while order:
        count = max(batch_tokens // lengths[order[0]], 1)
        rows, order = order[:count], order[count:]
        shape = (len(rows), lengths[rows[0]])
        ids, mask = torch.full(shape, pad, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        predicts = torch.zeros(shape, dtype=torch.bool)
        targets: list[int] = []
        places: list[int] = []
        for place, row in enumerate(rows):
            prompt, response = pairs[row]
            ids[place, : lengths[row]] = torch.tensor([*prompt, *response])
            mask[place, : lengths[row]] = 1
            predicts[place, len(prompt) - 1 : lengths[row] - 1] = True
            targets += response
            places += range(row * longest_response, row * longest_response + len(response))
        yield Batch(
            rows, ids.to(device), mask.to(device), predicts.to(device), torch.tensor(targets, device=device),
            torch.tensor(places, device=device),
        )  # fmt: skip


class Scorer:
    """Scores response tokens under a model.

    Attributes:
        direct: Whether the output layer can be replaced; found out by comparing with the full logits.

    Args:
        model: A causal language model, which may be wrapped by peft.
        pad: A token id to fill batches with; it is never attended to.
        chunk_tokens: Positions whose logits exist at one time.

    Raises:
        ArgumentError: The model lets tokens see later ones.
    """

    def __init__(self, model: Any, *, pad: int, chunk_tokens: int) -> None:
        self.model = model
        self.pad = pad
        self.chunk_tokens = chunk_tokens
        self.direct = True
        with lock_of(model), evaluating(model), torch.no_grad():
            reason = self._why_not_direct()
        if reason is not None:
            self.direct = False
            _LOG.warning(
                "%s: %s, so the logits of whole batches over the whole vocabulary are held in memory",
                type(model).__name__, reason,
            )  # fmt: skip

    def scores(
        self, sequences: TokenSequences, *, temperature: float, batch_tokens: int
    ) -> tuple[Float[Tensor, "n tokens"], Float[Tensor, "n tokens"]]:
        """Log-probabilities and log-normalisers, each of shape `(N, T)`, 0 at padding."""
        device = device_of(self.model)
        shape = (len(sequences), int(sequences.lengths.max(initial=0)))
        mode = contextlib.nullcontext() if torch.is_grad_enabled() else evaluating(self.model)
        found, places = [], []
        with lock_of(self.model), mode:
            for batch in batches(sequences, batch_tokens=batch_tokens, pad=self.pad, device=device):
                found.append(self._batch_scores(batch, temperature))
                places.append(batch.places)
        if not found:
            empty = torch.zeros(shape, device=device)
            return empty, empty
        values = torch.cat(found)
        flat = values.new_zeros(shape[0] * shape[1], 2).index_put((torch.cat(places),), values)
        log_probs, normalisers = flat.reshape(*shape, 2).unbind(-1)
        return log_probs, normalisers

    def scores_and_hidden(
        self, sequences: TokenSequences, *, scored: bool = True
    ) -> tuple[Batch, Float[Tensor, "M 2"], Float[Tensor, "b L H"]]:
        """One batch of sequences: scores as `scores` has them, flat, and what the output layer is given.

        Args:
            sequences: The sequences.
            scored: Whether the scores are wanted; without, they are 0 and no logits are computed where that can be.

        Returns:
            The batch, whose `rows` say how the sequences are ordered in it; log-probabilities and log-normalisers of
            its M response tokens; and the last hidden states.
        """
        longest = max(len(p) + len(r) for p, r in zip(sequences.prompts, sequences.responses, strict=True))
        (batch,) = batches(
            sequences, batch_tokens=longest * len(sequences), pad=self.pad, device=device_of(self.model)
        )  # fmt: skip
        layer = self.model.get_output_embeddings()
        if layer is None:
            raise ArgumentError(f"`model` {type(self.model).__name__} names no output layer")
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], 2)

        if self.direct and not scored:
            with lock_of(self.model), _forward_replaced(layer, keep):
                self._run(batch.ids, batch.mask)
            return batch, seen[0].new_zeros(len(batch.targets), 2), seen[0]
        with lock_of(self.model):
            # The hook runs whether or not the layer's forward is replaced.
            handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            try:
                found = self._batch_scores(batch, 1.0)
            finally:
                handle.remove()
        return batch, found, seen[0]

    def mixture_scores(
        self, sequences: TokenSequences, using: Callable[[], AbstractContextManager[None]], weight: float, *,
        temperature: float, batch_tokens: int,
    ) -> Float[Tensor, "n"]:  # fmt: skip
        """Log-probabilities under the token-level geometric mixture with the weights inside `using()`, shape `(N,)`."""
        device = device_of(self.model)
        sums = torch.zeros(len(sequences), device=device)
        with evaluating(self.model):
            for batch in batches(sequences, batch_tokens=batch_tokens, pad=self.pad, device=device):
                own = self._run(batch.ids, batch.mask)[batch.predicts]
                with using():
                    other = self._run(batch.ids, batch.mask)[batch.predicts]
                mixed = mixed_logits(_precise(own) / temperature, _precise(other) / temperature, weight)
                log_probs = mixed.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
                rows = torch.tensor(batch.rows, device=device).repeat_interleave(batch.predicts.sum(1))
                sums.index_add_(0, rows, log_probs.to(sums))
        return sums

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _batch_scores(self, batch: Batch, temperature: float) -> Float[Tensor, "M 2"]:
        if not self.direct:
            logits = self._run(batch.ids, batch.mask)[batch.predicts]
            return self._in_chunks(lambda part: part, logits, batch.targets, temperature)
        layer = self.model.get_output_embeddings()
        project = layer.forward

        def forward(hidden: Tensor) -> Tensor:
            values = self._in_chunks(project, hidden[batch.predicts], batch.targets, temperature)
            # Models may look at the shape of their logits, so that each position keeps its place.
            return values.new_zeros(*batch.predicts.shape, 2).index_put((batch.predicts,), values)

        with _forward_replaced(layer, forward):
            return self._run(batch.ids, batch.mask)[batch.predicts]

    def _in_chunks(
        self, project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float
    ) -> Float[Tensor, "M 2"]:
        def scores(part: Tensor, wanted: Tensor) -> Tensor:
            logits = _precise(project(part))
            found: Tensor = _TokenScores.apply(logits if temperature == 1.0 else logits / temperature, wanted)
            return found

        parts = list(zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([scores(*part) for part in parts])
        # Otherwise the logits of all chunks would wait for the backward pass.
        return torch.cat([checkpoint(scores, *part, use_reentrant=False) for part in parts])

    def _why_not_direct(self) -> str | None:
        """Compares the two ways on a short text; returns what speaks against the direct one."""
        layer = self.model.get_output_embeddings()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        device = device_of(self.model)
        text = [token % vocabulary for token in range(6)]
        ids = torch.tensor([text], device=device)
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda *call: seen.append(call[2])) if layer is not None else None
        try:
            full = self._run(ids, torch.ones_like(ids))
        finally:
            if handle is not None:
                handle.remove()
        self._check_causal(ids, full)
        if layer is None:
            return "the model names no output layer"
        if len(seen) != 1:
            return f"the model calls its output layer {len(seen)} times"
        if seen[0].shape != full.shape or not torch.equal(seen[0].to(full.dtype), full):
            return "the model changes what its output layer returns (it scales, caps or masks logits)"
        sequence = TokenSequences((tuple(text[:3]),), (tuple(text[3:]),), (False,))
        (batch,) = batches(sequence, batch_tokens=len(text), pad=self.pad, device=device)
        expected = self._in_chunks(lambda part: part, full[batch.predicts], batch.targets, 1.0)
        try:
            found = self._batch_scores(batch, 1.0)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            return f"the model does not run with another output layer ({error})"
        if not torch.allclose(found, expected, rtol=0.0, atol=_rounding(full)):
            return "the model gives other log-probabilities with another output layer"
        return None

    def _check_causal(self, ids: Tensor, logits: Tensor) -> None:
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % self.model.get_input_embeddings().weight.shape[0]
        changed = self._run(other, torch.ones_like(other))
        if not torch.allclose(changed[:, :-1].float(), logits[:, :-1].float(), rtol=0.0, atol=_rounding(logits)):
            raise ArgumentError(
                f"`model` {type(self.model).__name__} lets tokens see later ones, so it gives no probabilities of a "
                "next token; load it with `is_decoder=True` in its configuration, or choose a causal model"
            )


class _TokenScores(torch.autograd.Function):
    """Log-probability of a token and log-normaliser, with one array of the logits' size kept and one made backward."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "M V"], targets: Int[Tensor, "M"]) -> Float[Tensor, "M 2"]:
        normaliser = logits.logsumexp(-1)
        ctx.save_for_backward(logits, targets, normaliser)
        return torch.stack([logits.gather(-1, targets[:, None])[:, 0] - normaliser, normaliser], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "M 2"]) -> tuple[Float[Tensor, "M V"], None]:
        logits, targets, normaliser = ctx.saved_tensors
        of_token, of_normaliser = gradient.unbind(-1)
        # d log p / d logits = one-hot - softmax, d log Z / d logits = softmax.
        found = (logits - normaliser[:, None]).exp_().mul_((of_normaliser - of_token)[:, None])
        return found.scatter_add_(-1, targets[:, None], of_token[:, None]), None


@contextlib.contextmanager
def _forward_replaced(layer: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # Hooks of other libraries put a `forward` of their own on the module, which must come back.
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _rounding(logits: Tensor) -> float:
    """Difference of two computations of the same logits that rounding can make."""
    exact = logits.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    return (1e-4 if exact else 5e-2) * max(1.0, float(logits.float().abs().max()))

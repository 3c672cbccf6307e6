"""Draws responses from exactly the distribution whose log-probability is reported with them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from .._typing import Tensor
from ..errors import ArgumentError, EngineError
from ..rewards._checks import check_integer
from ..rewards._lora_loading import accepts
from ..rewards._token_log_probs import device_of, evaluating, lock_of, mixed_logits
from ..rewards._tokens import TokenSequences


@dataclasses.dataclass(frozen=True)
class GeneratedResponse:
    """A response that a policy has drawn.

    Attributes:
        prompt: Token ids of the prompt as the policy read it.
        tokens: Token ids of the response, the end-of-sequence token included where it ended.
        text: The response without special tokens.
        ended: Whether it ended by itself; otherwise it was stopped at the largest number of tokens.
        log_prob: Log-probability of `tokens` under the distribution they were drawn from, in nats. That of a response
            which did not end has no factor for an end.

    Example:
        >>> GeneratedResponse(prompt=(5,), tokens=(7, 2), text="yes", ended=True, log_prob=-1.5).ended
        True
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    ended: bool
    log_prob: float


@dataclasses.dataclass(frozen=True)
class Draws:
    """Token ids and log-probabilities of drawn responses."""

    tokens: list[tuple[int, ...]]
    ended: list[bool]
    log_probs: list[float]


def as_sequences(generated: Sequence[Sequence[GeneratedResponse]]) -> TokenSequences:
    """All responses, those of the first prompt first."""
    flat = [response for group in generated for response in group]
    return TokenSequences(
        tuple(r.prompt for r in flat), tuple(r.tokens for r in flat), tuple(r.ended for r in flat)
    )  # fmt: skip


def draw(
    model: Any, prompts: Sequence[tuple[int, ...]], uniforms: Float[np.ndarray, "n steps"], *, temperature: float,
    stop_ids: tuple[int, ...], pad: int, batch_size: int, mixture: "tuple[Callable[[], Any], float] | None",
) -> Draws:  # fmt: skip
    """One response to each prompt.

    Args:
        model: The language model without the wrapper of peft.
        prompts: Token ids, a row for each response.
        uniforms: Uniform numbers in [0, 1), one for each token that a row may draw.
        temperature: Logits are divided by it.
        stop_ids: Tokens that end a response.
        pad: Token to fill batches with.
        batch_size: Rows drawn side by side.
        mixture: What makes a context in which the model has the other weights, and their share.

    Raises:
        EngineError: The model's probabilities are not finite.
    """
    found = Draws([()] * len(prompts), [False] * len(prompts), [0.0] * len(prompts))
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with lock_of(model), evaluating(model), _plain_generation(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            _draw_batch(model, prompts, uniforms, rows, found, temperature, stop_ids, pad, mixture)
    return found


def _draw_batch(
    model: Any, prompts: Sequence[tuple[int, ...]], uniforms: Float[np.ndarray, "n steps"], rows: list[int],
    found: Draws, temperature: float, stop_ids: tuple[int, ...], pad: int, mixture: Any,
) -> None:  # fmt: skip
    from transformers import GenerationConfig, LogitsProcessorList

    device = device_of(model)
    longest = max(len(prompts[row]) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
        mask[place, longest - len(prompts[row]) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    other = None if mixture is None else _OtherWeights(model, mask, *mixture)
    sampler = _Sampler(torch.from_numpy(uniforms[rows]).to(device), temperature, other)
    # Every setting that would bend the distribution is off: `sampler` alone chooses the tokens.
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=uniforms.shape[1], eos_token_id=list(stop_ids), pad_token_id=pad,
        use_cache=True, return_dict_in_generate=False,
    )  # fmt: skip
    model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings,
        logits_processor=LogitsProcessorList([sampler]),
    )  # fmt: skip
    tokens = torch.stack(sampler.tokens, dim=1).tolist()
    # A sum in double precision adds no rounding of its own.
    log_probs = torch.stack(sampler.log_probs, dim=1).double().cpu()
    for place, row in enumerate(rows):
        end = next((step for step, token in enumerate(tokens[place]) if token in stop_ids), None)
        count = len(tokens[place]) if end is None else end + 1
        found.tokens[row] = tuple(tokens[place][:count])
        found.ended[row] = end is not None
        found.log_probs[row] = float(log_probs[place, :count].sum())


class _Sampler:
    """Chooses each token by inverting the distribution function at a given uniform number.

    The numbers belong to a response and not to a batch, so that a draw does not depend on what is drawn beside it.
    """

    def __init__(self, uniforms: Tensor, temperature: float, other: "_OtherWeights | None") -> None:
        self._uniforms = uniforms
        self._temperature = temperature
        self._other = other
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Int[Tensor, "b L"], scores: Float[Tensor, "b V"]) -> Float[Tensor, "b V"]:
        logits = scores.float() / self._temperature
        if self._other is not None:
            logits = mixed_logits(logits, self._other.logits(input_ids) / self._temperature, self._other.weight)
        log_probs = logits.log_softmax(-1)
        cumulative = log_probs.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise EngineError(
                "the policy's probabilities of a next token are not finite; its weights may have diverged"
            )
        level = self._uniforms[:, len(self.tokens), None] * total
        token = torch.searchsorted(cumulative, level, right=True)
        self.tokens.append(token[:, 0])
        self.log_probs.append(log_probs.gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class _OtherWeights:
    """Next-token logits under other weights of the same model, with a cache of keys and values of its own."""

    def __init__(self, model: Any, mask: Tensor, using: Callable[[], Any], weight: float) -> None:
        self.weight = weight
        self._model = model
        self._mask = mask
        self._using = using
        self._cache: Any = None

    def logits(self, input_ids: Int[Tensor, "b L"]) -> Float[Tensor, "b V"]:
        new = self._mask.new_ones(len(input_ids), input_ids.shape[1] - self._mask.shape[1])
        self._mask = torch.cat([self._mask, new], dim=1)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": self._mask, "use_cache": True}
        if accepts(self._model, "position_ids"):
            arguments["position_ids"] = (self._mask.cumsum(1) - 1).clamp_min(0)
        if self._cache is not None:
            arguments |= {"past_key_values": self._cache, "input_ids": input_ids[:, -1:]}
            if "position_ids" in arguments:
                arguments["position_ids"] = arguments["position_ids"][:, -1:]
        with self._using():
            output = self._model(**arguments)
        self._cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[:, -1]
        return logits.float()


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without the model's own generation settings, which `generate` would put where ours say nothing."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def uniform_numbers(
    seed: int | Sequence[int], num_prompts: int, num_candidates: int, steps: int
) -> Float[np.ndarray, "n steps"]:  # fmt: skip
    """Uniform numbers in [0, 1) for each response, keyed by the seed, the prompt and the place of the response."""
    if isinstance(seed, int):
        check_integer("seed", seed, 0)
        keys: list[tuple[int, ...]] = [(seed, row) for row in range(num_prompts)]
    else:
        if len(seed) != num_prompts:
            raise ArgumentError(
                f"`seed` has {len(seed)} entries; give one number, or one for each of {num_prompts} prompts"
            )
        for one in seed:
            check_integer("seed", one, 0)
        keys = [(one,) for one in seed]
    rows = [np.random.default_rng([*key, place]).random(steps) for key in keys for place in range(num_candidates)]
    return np.stack(rows) if rows else np.empty((0, steps))

"""A language model as policy: it draws responses, scores them, and keeps copies of its weights."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from .._typing import Tensor
from ..data.rendering import Content
from ..errors import ArgumentError, EngineError, PersistenceError
from ..rewards._causal_lm import (
    base_of_adapter,
    checkpoint_activations,
    load_model,
    positions_of,
    with_adapters,
    without_dropout,
)
from ..rewards._checks import check_choice, check_device, check_integer
from ..rewards._encoder import Encoder
from ..rewards._token_log_probs import Scorer, TokenLogProbs, device_of, lock_of
from ..rewards._tokens import Codec, TokenSequences, stop_tokens
from ._generation import GeneratedResponse, as_sequences, draw, uniform_numbers
from ._policy_lora import PolicyLoRA
from ._reference import ReferenceWeights, load_reference, reference_weights
from ._weights import Snapshot, assign, swapped, take_snapshot

_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Responses of the first draws whose log-probabilities are computed again, in the other way.
_CHECKED_DRAWS = 8
#: Tokens of a batch of which the logits of two policies over the whole vocabulary are held.
_MIXTURE_TOKENS = 1024


class Policy:
    """A causal language model with its tokenizer, trained whole or through adapters of peft.

    Dropout is set to 0 in the model, so that training, scoring and drawing mean the same distribution. A prompt is a
    string, which the tokenizer's special tokens surround (its end-of-sequence token excepted), or a list of messages,
    which goes through the chat template up to the opening of the assistant's turn. Prompts that are too long lose their
    start. The tokens of a response are those of its text alone, closed by the end-of-sequence token; encoders such as
    BERT, loaded as decoders, take their separator for it.

    Methods that swap weights or modules hold a lock on the model, so that threads can share it.

    Args:
        model: A model of `AutoModelForCausalLM`, which peft may have wrapped.
        tokenizer: Its tokenizer.
        max_prompt_tokens: Most tokens of a prompt; lowered to what the model can read beside a response.
        max_new_tokens: Most tokens of a response, its end-of-sequence token included.
        chunk_tokens: Response tokens whose logits over the whole vocabulary exist at one time while scoring. Larger is
            faster (with gradients, one chunk alone is not computed twice) and takes more memory.
        batch_tokens: Most tokens of one pass while scoring, padding included. With gradients it bounds the padding and
            not the memory, since all passes wait for the backward pass.
        reference: Another model as p0, of the same architecture and vocabulary: to go on from trained weights and stay
            near the model that those came from. Its weights are copied. By default the policy as it is now.

    Attributes:
        trainable: Parameters that require gradients, by name.
        reference: Weights of p0. Without the argument a snapshot of the start: the adapters alone where the policy has
            adapters, otherwise one more copy of the model. It may be set to another snapshot.
        stop_ids: Tokens that end a response; the first closes responses that come as text.
        new_weights: Names of weights that the checkpoint lacked (see `from_pretrained`).

    Raises:
        ArgumentError: The model is not causal, the tokenizer has no token that ends a response, a limit leaves no room,
            or the reference has another vocabulary or architecture.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> import transformers
        >>> raw = Tokenizer(models.WordLevel({"<eos>": 0, "no": 1, "yes": 2, "why": 3}, unk_token="why"))
        >>> raw.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
        >>> config = transformers.GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=16,
        ...                                  bos_token_id=0, eos_token_id=0)
        >>> policy = Policy(transformers.GPT2LMHeadModel(config), tokenizer, max_prompt_tokens=8, max_new_tokens=4)
        >>> answers = policy.generate(["why", "why yes"], num_candidates=3, seed=0)
        >>> again = policy.log_probs(policy.sequences(answers)).tolist()
        >>> abs(again[0] - answers[0][0].log_prob) < 1e-4
        True
        >>> policy.encode(["why"], ["no no"]).responses
        ((1, 1, 0),)
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_prompt_tokens: int = 512, max_new_tokens: int = 128,
        chunk_tokens: int = 512, batch_tokens: int = 8192, reference: "Policy | None" = None,
    ) -> None:  # fmt: skip
        for name, value in (
            ("max_prompt_tokens", max_prompt_tokens), ("max_new_tokens", max_new_tokens),
            ("chunk_tokens", chunk_tokens), ("batch_tokens", batch_tokens),
        ):  # fmt: skip
            check_integer(name, value, 1)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.new_weights: tuple[str, ...] = ()
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise ArgumentError(
                "`model` has an adapter that lengthens prompts; a policy takes adapters of weights (LoRA)"
            )
        self.stop_ids = stop_tokens(tokenizer, getattr(self._base, "generation_config", None))
        self._pad = int(self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self._positions = positions_of(self._base.config)
        if self._positions is not None:
            if self._positions <= max_new_tokens:
                raise ArgumentError(
                    f"`max_new_tokens` is {max_new_tokens}; the model reads {self._positions} tokens in all, and a "
                    "prompt needs some of them"
                )
            max_prompt_tokens = min(max_prompt_tokens, self._positions - max_new_tokens)
        self._codec = Codec(
            tokenizer, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids
        )
        without_dropout(model)
        self._scorer = Scorer(model, pad=self._pad, chunk_tokens=chunk_tokens)
        self._compared: set[bool] = set()
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.reference: Snapshot | ReferenceWeights
        if reference is None:
            self.reference = self.snapshot()
        elif not isinstance(reference, Policy):
            raise ArgumentError(
                f"`reference` is a {type(reference).__name__}; give a Policy, or a path to "
                "`Policy.from_pretrained(reference=...)`"
            )
        else:
            self.reference = reference_weights(self, reference.model, reference.tokenizer, name="`reference`")

    @classmethod
    def from_pretrained(
        cls, path: str, *, lora: PolicyLoRA | None = None, adapter: str | None = None, device: str | None = None,
        dtype: str = "float32", max_prompt_tokens: int = 512, max_new_tokens: int = 128, attention: str | None = None,
        gradient_checkpointing: bool = False, trust_remote_code: bool = False, revision: str | None = None,
        chunk_tokens: int = 512, batch_tokens: int = 8192, reference: str | None = None, seed: int = 0,
    ) -> "Policy":  # fmt: skip
        """Loads a policy.

        A checkpoint of an encoder (BERT) becomes a decoder: each token sees those before it. If it has no
        language-model head, that head's new weights are random and named in `new_weights`; such a policy must be
        trained on text before anything else, and takes adapters only after it has been saved.

        Args:
            path: Folder of a model, its id on the Hugging Face hub, or a folder that `save_pretrained` wrote for a
                policy with adapters.
            lora: New adapters to train; the model's own weights are then frozen.
            adapter: Folder of an adapter that peft has saved, which is trained on.
            device: Where the model lives; by default a GPU if there is one.
            dtype: Number format of the weights.
            max_prompt_tokens: See `Policy`.
            max_new_tokens: See `Policy`.
            attention: Implementation of attention (`"sdpa"`, `"eager"`, ...); by default the model's.
            gradient_checkpointing: Recompute activations in backward passes, for memory.
            trust_remote_code: Run code that comes with the model.
            revision: Branch, tag or commit on the hub.
            chunk_tokens: See `Policy`.
            batch_tokens: See `Policy`.
            reference: Folder or hub id of another model as p0, whole or an adapter, see `Policy`.
            seed: Seed of what is new and random.

        Raises:
            ArgumentError: The model cannot be loaded, or is no causal language model.
        """
        check_choice("dtype", dtype, _DTYPES)
        check_device(device)
        if lora is not None and adapter is not None:
            raise ArgumentError("pass `lora` for new adapters or `adapter` for saved ones, not both")
        path = os.fspath(path)
        base = base_of_adapter(path)
        if base is not None:
            if lora is not None or adapter is not None:
                raise ArgumentError(
                    f"`path` {path!r} holds an adapter; pass the model's own folder with `lora` or `adapter`"
                )
            path, adapter = base, path
        source = Encoder(
            path, revision=revision, pooling="last", layer=-1, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, watch_files=False,
        )  # fmt: skip
        model, new = load_model(source, attention=attention, seed=seed)
        if new and (lora is not None or adapter is not None):
            raise ArgumentError(
                f"`path` {path!r} has no language-model head, and adapters would leave a random one frozen; load it "
                "without adapters, train it on text, save it with `save_pretrained`, and put adapters on that"
            )
        if gradient_checkpointing:
            checkpoint_activations(model)
        model = with_adapters(model, lora, adapter, seed)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        policy = cls(
            model, source.tokenizer, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens,
            chunk_tokens=chunk_tokens, batch_tokens=batch_tokens,
        )  # fmt: skip
        policy.new_weights = new
        if reference is not None:
            # The copy of the start makes room for the other model.
            policy.reference = Snapshot({})
            policy.reference = load_reference(
                policy, os.fspath(reference), dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
            )
        return policy

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return device_of(self.model)

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of a prompt, as lowered to what the model can read."""
        return self._codec.max_prompt_tokens

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a response, its end-of-sequence token included."""
        return self._codec.max_new_tokens

    def encode(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, on_long: str = "raise"
    ) -> TokenSequences:
        """Token ids of prompts with responses that come as text, one each, N in all.

        Args:
            prompts: Strings or lists of messages.
            responses: Strings (may be empty) or lists of messages.
            on_long: `"raise"` refuses a response of more than `max_new_tokens` tokens; `"shorten"` cuts its end off,
                and with it the end-of-sequence token, which `response_shortened` of the result records.

        Raises:
            ArgumentError: The columns differ in length.
            DataError: A response is too long, or goes on after an end-of-sequence token; a prompt has no tokens.
        """
        return self._codec.encode(prompts, responses, on_long)

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses that are token ids, without special tokens."""
        return self._codec.decode(responses)

    def sequences(self, generated: Sequence[Sequence[GeneratedResponse]]) -> TokenSequences:
        """What `generate` drew as sequences to score: all responses of the first prompt, then of the second, ..."""
        return as_sequences(generated)

    def log_probs(self, sequences: TokenSequences, *, temperature: float = 1.0) -> Float[Tensor, "n"]:
        """Log-probabilities of responses given their prompts, in nats, shape `(N,)`, differentiable.

        Sums over the tokens of a response, the end-of-sequence token included where it ended. Without gradients (under
        `torch.no_grad`) any number of sequences takes the memory of one pass.

        Args:
            sequences: N prompts and responses.
            temperature: Logits are divided by it.

        Raises:
            ArgumentError: The temperature is not positive, or a sequence is longer than the model can read.
        """
        return self.token_log_probs(sequences, temperature=temperature).sums()

    def token_log_probs(self, sequences: TokenSequences, *, temperature: float = 1.0) -> TokenLogProbs:
        """Log-probabilities and log-normalisers of each response token, shapes `(N, T)`; see `log_probs`."""
        self._check(sequences, temperature)
        log_probs, normalisers = self._scorer.scores(sequences, temperature=temperature, batch_tokens=self.batch_tokens)
        lengths = torch.from_numpy(sequences.lengths).to(log_probs.device)
        mask = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
        return TokenLogProbs(log_probs, normalisers, mask)

    @torch.no_grad()
    def mixture_log_probs(
        self, sequences: TokenSequences, mixture: tuple[Snapshot | ReferenceWeights, float], *, temperature: float = 1.0
    ) -> Float[Tensor, "n"]:
        """Log-probabilities under the token-level geometric mixture that `generate` draws from, shape `(N,)`.

        Args:
            sequences: N prompts and responses.
            mixture: Other weights and their share, as for `generate`.
            temperature: Logits of both are divided by it.

        Raises:
            ArgumentError: As for `log_probs`; or the share is outside [0, 1].
        """
        self._check(sequences, temperature)
        snapshot, weight = _checked_mixture(mixture)
        with lock_of(self.model):
            return self._scorer.mixture_scores(
                sequences, partial(self.using, snapshot), weight, temperature=temperature,
                batch_tokens=min(self.batch_tokens, _MIXTURE_TOKENS),
            )  # fmt: skip

    def generate(
        self, prompts: Sequence[Content], num_candidates: int, *, seed: int | Sequence[int], temperature: float = 1.0,
        batch_size: int = 32, mixture: tuple[Snapshot | ReferenceWeights, float] | None = None,
    ) -> list[list[GeneratedResponse]]:  # fmt: skip
        """Draws responses, and tells the log-probability of each under the very distribution it was drawn from.

        Nothing but the temperature bends the model's distribution: the model's own generation settings are set aside,
        and top-k and top-p are not offered, since importance weights need a proposal that can draw whatever the target
        can. A draw depends on the weights, its prompt, its seed and its number alone, up to rounding: not on
        `batch_size`, and not on any global random state.

        With `mixture`, each token is drawn from softmax((1 - w) log pi + w log pi_other), normalised token by token,
        the opponent of Nash-MD (Munos et al. 2023, 2312.00886); every token then costs two passes.

        Args:
            prompts: Strings or lists of messages.
            num_candidates: Responses to each prompt.
            seed: One seed, from which each prompt by its position gets its own, or one seed for each prompt.
            temperature: Logits are divided by it.
            batch_size: Responses drawn side by side.
            mixture: Other weights, and their share w between 0 and 1.

        Returns:
            For each prompt its responses.

        Raises:
            ArgumentError: A setting has a value that cannot be used.
            DataError: A prompt has no tokens.
            EngineError: The model's probabilities are not finite, or those of its step-by-step generation (with padding
                and cached keys) are not those of `log_probs`; the first draws are compared.
        """
        check_integer("num_candidates", num_candidates, 1)
        check_integer("batch_size", batch_size, 1)
        _check_temperature(temperature)
        uniforms = uniform_numbers(seed, len(prompts), num_candidates, self.max_new_tokens)
        prompt_ids, _ = self._codec.prompts(prompts)
        others = None
        if mixture is not None:
            snapshot, weight = _checked_mixture(mixture)
            others = (partial(self.using, snapshot), weight)
        draws = draw(
            self._base, [ids for ids in prompt_ids for _ in range(num_candidates)], uniforms, temperature=temperature,
            stop_ids=self.stop_ids, pad=self._pad, batch_size=batch_size, mixture=others,
        )  # fmt: skip
        texts = self.decode(draws.tokens)
        flat = [
            GeneratedResponse(prompt_ids[row // num_candidates], tokens, text, ended, log_prob)
            for row, (tokens, text, ended, log_prob) in enumerate(
                zip(draws.tokens, texts, draws.ended, draws.log_probs, strict=True)
            )
        ]
        if flat and (mixture is None) not in self._compared:
            self._compare_ways(flat[:: max(len(flat) // _CHECKED_DRAWS, 1)], temperature, mixture)
            self._compared.add(mixture is None)
        return [flat[start : start + num_candidates] for start in range(0, len(flat), num_candidates)]

    def snapshot(self, *, device: str | torch.device | None = None) -> Snapshot:
        """A copy of the trainable weights, by default where they live; as much memory as those take."""
        return take_snapshot(self.trainable, device)

    @contextlib.contextmanager
    def using(self, snapshot: Snapshot | ReferenceWeights) -> Iterator[None]:
        """Inside the block the policy has the weights of a snapshot or reference; afterwards exactly its own again.

        A backward pass belongs under the same weights as its forward pass, and no optimiser step belongs in the block.

        Raises:
            ArgumentError: The snapshot is of another model.
        """
        with lock_of(self.model), contextlib.ExitStack() as stack:
            if isinstance(snapshot, ReferenceWeights):
                stack.enter_context(snapshot.inside(self.model))
            else:
                stack.enter_context(swapped(self.trainable, snapshot))
            yield

    def assign(self, snapshot: Snapshot) -> None:
        """Writes the snapshot's weights into the policy, for good.

        Raises:
            ArgumentError: The snapshot is of another model.
        """
        with lock_of(self.model):
            assign(self.trainable, snapshot)

    def perplexity(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, on_long: str = "raise"
    ) -> float:  # fmt: skip
        """Exponential of the mean negative log-probability of a response token, ends included, over all responses."""
        sequences = self.encode(prompts, responses, on_long=on_long)
        if not len(sequences):
            raise ArgumentError("`responses` is empty; the perplexity is that of at least one response")
        with torch.no_grad():
            total = float(self.log_probs(sequences).double().sum())
        return math.exp(-total / int(sequences.lengths.sum()))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes model (or adapter) and tokenizer as transformers and peft read them.

        Raises:
            PersistenceError: The folder cannot be written.
        """
        try:
            with lock_of(self.model):
                self.model.save_pretrained(os.fspath(folder))
            self.tokenizer.save_pretrained(os.fspath(folder))
        except OSError as error:
            raise PersistenceError(f"cannot write the policy to {os.fspath(folder)}: {error}") from error

    def _check(self, sequences: TokenSequences, temperature: float) -> None:
        _check_temperature(temperature)
        if self._positions is None:
            return
        for row, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
            if len(prompt) + len(response) > self._positions:
                raise ArgumentError(
                    f"`sequences`: row {row} has {len(prompt) + len(response)} tokens; the model reads at most "
                    f"{self._positions}"
                )

    def _compare_ways(
        self,
        drawn: list[GeneratedResponse],
        temperature: float,
        mixture: tuple[Snapshot | ReferenceWeights, float] | None,
    ) -> None:
        sequences = as_sequences([drawn])
        with torch.no_grad():
            if mixture is None:
                scored = self.log_probs(sequences, temperature=temperature)
            else:
                scored = self.mixture_log_probs(sequences, mixture, temperature=temperature)
        gaps = np.abs(scored.double().cpu().numpy() - [r.log_prob for r in drawn]) / sequences.lengths
        whole = all(p.dtype in (torch.float32, torch.float64) for p in self.model.parameters())
        exact = whole and torch.get_float32_matmul_precision() == "highest"
        allowed = (1e-3 if exact else 0.1) * max(1.0, 1.0 / temperature)
        if not float(gaps.max()) <= allowed:
            raise EngineError(
                f"{type(self._base).__name__} gives other probabilities when it generates token by token than when it "
                f"reads whole sequences (up to {float(gaps.max()):.2g} nats a token, {allowed:g} allowed), so draws "
                "cannot be weighted; choose another architecture, or `attention`"
            )


def _checked_mixture(mixture: tuple[Snapshot | ReferenceWeights, float]) -> tuple[Snapshot | ReferenceWeights, float]:
    if not 0.0 <= mixture[1] <= 1.0:
        raise ArgumentError(f"`mixture` gives the other weights a share of {mixture[1]}; it lies between 0 and 1")
    return mixture


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ArgumentError(f"`temperature` is {temperature}; it is a positive number")

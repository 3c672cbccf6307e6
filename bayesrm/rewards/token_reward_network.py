"""A loaded `TokenReward`: from token sequences to log-probabilities, values and rewards of steps, and its texts."""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float
from tqdm import tqdm

from .._typing import Tensor
from ..data.rendering import Content, render
from ..errors import ArgumentError, DataError, PersistenceError
from ._causal_lm import checkpoint_activations, load_model, positions_of, with_adapters, without_dropout
from ._checks import check_columns, check_item
from ._token_log_probs import Scorer, device_of
from ._tokens import Codec, TokenSequences, stop_tokens, token_spans
from .token_head import TokenScores
from .token_reward import StateValues, TokenReward

_LOG = logging.getLogger("bayesrm")

_WEIGHTS = "token_reward.safetensors"
#: Positions whose logits over the whole vocabulary exist at one time.
_CHUNK_TOKENS = 512
#: Responses that are scored together.
_BATCH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSteps:
    """The steps of n responses, padded to the longest of T tokens.

    Attributes:
        log_probs: log pi(a_t | s_t), in nats, shape `(n, T)`.
        values: V(s_t), the soft value of the state before the token, shape `(n, T)`; of `StateValues.LOGITS` that of
            the logits.
        mean: Mean of the reward's variational distribution, shape `(n, T)`.
        log_std: Logarithm of its standard deviation, shape `(n, T)`.
        mask: True at tokens, shape `(n, T)`.
        ended: Whether the last token of each ended it, shape `(n,)`.
    """

    log_probs: Float[Tensor, "n T"]
    values: Float[Tensor, "n T"]
    mean: Float[Tensor, "n T"]
    log_std: Float[Tensor, "n T"]
    mask: Bool[Tensor, "n T"]
    ended: Bool[Tensor, "n"]

    @property
    def last(self) -> Bool[Tensor, "n T"]:
        """True at the last token of each response."""
        return self.mask & ~torch.nn.functional.pad(self.mask[:, 1:], (0, 1))


class TokenRewardNetwork(torch.nn.Module):
    """The network of a `TokenReward`; made by `TokenReward.load`.

    It is also a `TokenScorer`: under q its tokens are independent.

    Attributes:
        settings: The settings it was loaded from.
        model: The causal language model, in peft's wrapping where it has adapters.
        tokenizer: Its tokenizer.
        heads: From the hidden state behind a token to the mean and the log standard deviation of its reward, and to the
            value of the state.
        log_std_floor: Smallest logarithm of a standard deviation.
    """

    title = "TokenReward"
    num_draws = 1

    def __init__(self, settings: TokenReward, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        source = settings.source()
        model, new = load_model(source, attention=settings.attention, seed=seed)
        self.tokenizer = source.tokenizer
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        if settings.rank:
            model = with_adapters(model, settings, None, seed)
            # A head that the checkpoint lacks is random; behind adapters it would stay so.
            for name, parameter in model.named_parameters():
                if any(name.endswith(missing) for missing in new):
                    parameter.requires_grad_(True)
        without_dropout(model)
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._stop = stop_tokens(self.tokenizer, getattr(base, "generation_config", None))
        room = positions_of(base.config)
        if room is not None and room <= settings.max_new_tokens:
            raise ArgumentError(
                f"`max_new_tokens` is {settings.max_new_tokens}; the model reads {room} tokens in all, and a prompt "
                "needs some of them"
            )
        most = (
            settings.max_prompt_tokens
            if room is None
            else min(settings.max_prompt_tokens, room - settings.max_new_tokens)
        )
        self._codec = Codec(
            self.tokenizer, max_prompt_tokens=most, max_new_tokens=settings.max_new_tokens, stop_ids=self._stop
        )
        wanted = torch.float64 if settings.dtype == "float64" else torch.float32
        for parameter in self.model.parameters():
            if parameter.requires_grad and settings.rank:
                parameter.data = parameter.data.to(wanted)
        width = model.get_output_embeddings().in_features
        self.heads = torch.nn.Linear(width, 3, dtype=wanted)
        torch.nn.init.zeros_(self.heads.weight)
        torch.nn.init.zeros_(self.heads.bias)
        self.log_std_floor = -math.inf
        pad = self._stop[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._scorer = Scorer(model, pad=int(pad), chunk_tokens=_CHUNK_TOKENS)
        self.eval()

    def start_at(self, std: float) -> None:
        """Gives the rewards of all tokens mean 0 and this standard deviation."""
        with torch.no_grad():
            self.heads.weight.zero_()
            self.heads.bias.zero_()
            self.heads.bias[1] = math.log(std)

    @property
    def sites(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return device_of(self.heads)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.sites.values())

    def encode(self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0) -> TokenSequences:
        """Token ids of prompts and responses; errors count items from `start`.

        Raises:
            DataError: A text cannot be used.
        """
        check_columns(prompts, responses)
        for item, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start):
            check_item(item, prompt, response)
        try:
            return self._codec.encode(prompts, responses, self.settings.on_long)
        except DataError as error:
            if error.row is None or not start:
                raise
            raise DataError(str(error).removeprefix(f"row {error.row}: "), row=error.row + start) from error

    def steps(self, sequences: TokenSequences, *, policy: bool = True) -> TokenSteps:
        """Log-probabilities, values and rewards of the steps of responses, in one pass, differentiable.

        Args:
            sequences: The responses.
            policy: Whether log-probabilities and values are wanted; without, they are 0, and the pass is cheaper.
        """
        batch, scores, hidden = self._scorer.scores_and_hidden(sequences, scored=policy)
        count, longest = len(sequences), int(sequences.lengths.max())
        places = batch.predicts.nonzero()
        # The state before a token is behind the one that predicts it; the token itself stands one further on.
        heads = self.heads(hidden.to(self.heads.weight.dtype))
        of_state = heads[batch.predicts][:, 2]
        of_token = heads[places[:, 0], places[:, 1] + 1]
        if not policy:
            of_state = torch.zeros_like(of_state)
        values = scores[:, 1] if self.settings.values == StateValues.LOGITS else of_state
        columns = torch.stack(
            [scores[:, 0].to(of_state), values.to(of_state), of_token[:, 0], of_token[:, 1]], dim=1
        )  # fmt: skip
        flat = columns.new_zeros(count * longest, 4).index_put((batch.places,), columns)
        log_probs, soft, mean, log_std = flat.reshape(count, longest, 4).unbind(-1)
        lengths = torch.from_numpy(sequences.lengths).to(flat.device)
        mask = torch.arange(longest, device=flat.device) < lengths[:, None]
        ended = torch.tensor(sequences.ended, device=flat.device)
        return TokenSteps(log_probs, soft, mean, log_std.clamp_min(self.log_std_floor), mask, ended)

    def score(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0, progress: bool = False
    ) -> list[TokenScores]:
        """Rewards of the tokens of responses under q.

        Raises:
            DataError: A text cannot be used; the message names the item.
        """
        sequences = self.encode(prompts, responses, start=start)
        if cut := sum(sequences.response_shortened):
            _LOG.warning(
                "%d of %d responses have more than %d tokens: the reward of what comes after is not known, and not in "
                "their sum; raise `max_new_tokens`, or refuse them by on_long='raise'",
                cut, len(sequences), self.settings.max_new_tokens,
            )  # fmt: skip
        texts = [
            render(prompt, response, self.tokenizer)[1] for prompt, response in zip(prompts, responses, strict=True)
        ]
        pairs = zip(sequences.prompts, sequences.responses, strict=True)
        order = np.argsort([-len(prompt) - len(response) for prompt, response in pairs], kind="stable").tolist()
        found: dict[int, TokenScores] = {}
        with torch.no_grad(), tqdm(total=len(order), unit="response", disable=not progress) as bar:
            for begin in range(0, len(order), _BATCH):
                rows = order[begin : begin + _BATCH]
                part = sequences[rows]
                steps = self.steps(part, policy=False)
                for place, row in enumerate(rows):
                    count = len(part.responses[place])
                    found[row] = TokenScores(
                        part.prompts[place], part.responses[place], texts[row],
                        token_spans(self.tokenizer, texts[row], count),
                        steps.mean[place, :count].double().cpu()[None],
                        (2.0 * steps.log_std[place, :count].double().cpu()).exp(),
                    )  # fmt: skip
                bar.update(len(rows))
        return [found[row] for row in range(len(sequences))]

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the trained weights, and returns the settings."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.sites.items()}
        safetensors.torch.save_file(tensors, folder / _WEIGHTS)
        # The network is loaded onto what the machine at hand has.
        floor = None if math.isinf(self.log_std_floor) else self.log_std_floor
        return {"token_reward": self.settings.to_config() | {"device": None}, "log_std_floor": floor}

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> "TokenRewardNetwork":
        """The network that `save` wrote.

        Raises:
            PersistenceError: The weights are those of another network.
        """
        network = TokenReward.from_config(config["token_reward"]).load()
        if config["log_std_floor"] is not None:
            network.log_std_floor = config["log_std_floor"]
        tensors = safetensors.torch.load_file(folder / _WEIGHTS)
        if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in network.sites.items()}:
            raise PersistenceError(
                f"{folder / _WEIGHTS} does not hold the weights of {network.settings.model!r} with these settings; has "
                "the model changed?"
            )
        with torch.no_grad():
            for name, p in network.sites.items():
                p.copy_(tensors[name])
        return network

    def save_policy(self, folder: str | os.PathLike[str]) -> None:
        """Writes the policy that the action values imply, AVA's direct optimisation.

        The language model, or its adapter in peft's format, and the tokenizer: what `alignment.Policy.from_pretrained`
        reads.

        Raises:
            PersistenceError: The folder cannot be written.
        """
        try:
            self.model.save_pretrained(os.fspath(folder))
            self.tokenizer.save_pretrained(os.fspath(folder))
        except OSError as error:
            raise PersistenceError(f"cannot write the policy to {os.fspath(folder)}: {error}") from error

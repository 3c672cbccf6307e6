"""The candidates of one round of alignment with all that is fixed about them, in memory and on disk."""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from ..beliefs import RewardBelief
from ..errors import PersistenceError
from ..programs import ScoredCandidates
from ..rewards._tokens import TokenSequences

#: What a round may hold of each token, shape `(B, n, T)`.
ALONG_TOKENS = ("target_values", "target_log_probs", "token_rewards", "token_reference")


def by_prompt(
    values: Shaped[Tensor, "n *rest"], mask: Bool[Tensor, "prompts candidates"]
) -> Shaped[Tensor, "prompts candidates *rest"]:
    """Values of all candidates, those of the first prompt first, in a row for each prompt; 0 where there is none."""
    if bool(mask.all()):
        return values.reshape(*mask.shape, *values.shape[1:])
    rows = values.new_zeros(*mask.shape, *values.shape[1:])
    return rows.index_put((mask.to(values.device),), values)


def mask_of(counts: Sequence[int]) -> Bool[Tensor, "prompts candidates"]:
    """True for the first `counts[i]` places of prompt i."""
    return torch.arange(max(counts)) < torch.tensor(list(counts))[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """B prompts with at most n candidates each, as `candidates.mask` says.

    Attributes:
        prompts: Which of the run's prompts these are, shape `(B,)`.
        sequences: Token ids of all candidates, those of the first prompt first.
        texts: The responses, for each prompt.
        candidates: Beliefs and log-probabilities.
        policy: log-probabilities under the policy when the round began, shape `(B, n)`.
        target_values: The anchor's log-normalisers at each token, shape `(B, n, T)`, for path consistency.
        target_log_probs: The anchor's log-probabilities of each token, for the same.
        token_rewards: What stands for the reward of each token, shape `(B, n, T)`, for a token policy gradient.
        token_reference: The reference's log-probabilities of each token, for the same.
    """

    prompts: Tensor
    sequences: TokenSequences
    texts: list[list[str]]
    candidates: ScoredCandidates
    policy: Tensor
    target_values: Tensor | None = None
    target_log_probs: Tensor | None = None
    token_rewards: Tensor | None = None
    token_reference: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Candidates of each prompt."""
        counts: list[int] = self.candidates.mask.sum(1).tolist()
        return counts

    def sequences_of(self, prompts: Sequence[int]) -> TokenSequences:
        """Token ids of the candidates of some prompts, by their places in the round."""
        counts = self.counts
        ends = list(itertools.accumulate(counts))
        return self.sequences[[i for prompt in prompts for i in range(ends[prompt] - counts[prompt], ends[prompt])]]

    def save(self, file: Path) -> None:
        """Writes the round; a file that exists is whole.

        Raises:
            PersistenceError: The file cannot be written.
        """
        s, c = self.sequences, self.candidates
        tensors = {
            "prompts": self.prompts,
            "prompt_tokens": _flat(s.prompts),
            "prompt_lengths": _lengths(s.prompts),
            "response_tokens": _flat(s.responses),
            "response_lengths": _lengths(s.responses),
            "ended": torch.tensor(s.ended),
            "policy": self.policy,
            "reference": c.reference,
            "mean": c.belief.mean,
            "root": c.belief.root,
            "mask": c.mask,
        }
        optional = {
            "draws": c.belief.draws, "proposal": c.proposal, "anchor": c.anchor, "preferences": c.preferences,
            **{name: getattr(self, name) for name in ALONG_TOKENS},
        }  # fmt: skip
        tensors |= {name: value for name, value in optional.items() if value is not None}
        metadata = {"texts": json.dumps(self.texts), "sources": json.dumps(c.sources)}
        partial = file.with_name(file.name + ".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
            os.replace(partial, file)
        except (OSError, safetensors.SafetensorError) as error:
            raise PersistenceError(f"{file} cannot be written: {error}") from error

    @classmethod
    def load(cls, file: Path) -> "Round":
        """Reads what `save` wrote.

        Raises:
            PersistenceError: The file cannot be read.
        """
        try:
            with safetensors.safe_open(file, "pt") as stored:
                metadata = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
            texts, sources = json.loads(metadata["texts"]), json.loads(metadata["sources"])
            mask, reference, policy, prompts = (tensors[n] for n in ("mask", "reference", "policy", "prompts"))
            flat = [tensors[f"{part}_{what}"] for part in ("prompt", "response") for what in ("tokens", "lengths")]
            mean, root, ended = tensors["mean"], tensors["root"], tensors["ended"]
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PersistenceError(f"{file} cannot be read: {error}; remove it to draw its round again") from error
        draws = tensors.get("draws")
        belief = RewardBelief(mean, root, mask) if draws is None else RewardBelief.from_draws(draws, mask)
        candidates = ScoredCandidates(
            belief, reference, tensors.get("proposal"), tensors.get("anchor"), tensors.get("preferences"),
            None if sources is None else tuple(sources),
        )  # fmt: skip
        sequences = TokenSequences(_ragged(flat[0], flat[1]), _ragged(flat[2], flat[3]), tuple(ended.tolist()))
        return cls(
            prompts, sequences, texts, candidates, policy,
            **{name: tensors.get(name) for name in ALONG_TOKENS},
        )  # fmt: skip


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _lengths(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _ragged(flat: Tensor, lengths: Tensor) -> tuple[tuple[int, ...], ...]:
    parts: list[Any] = list(flat.split(lengths.tolist()))
    return tuple(tuple(part.tolist()) for part in parts)

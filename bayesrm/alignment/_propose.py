"""A round's candidates: drawn from the method's proposals, scored, and given their log-probabilities."""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..beliefs import RewardBelief
from ..data.rendering import Content
from ..engines._processes import Processes
from ..errors import ArgumentError
from ..programs import ScoredCandidates
from ..rewards._tokens import TokenSequences
from ._generation import GeneratedResponse
from ._round import ALONG_TOKENS, Round, by_prompt, mask_of
from ._scoring import Preferences, Reward, check_preferences, score
from ._token_rewards import token_rewards
from ._weights import Snapshot
from .method import Method
from .policy import Policy

#: A log-probability may exceed 0 by rounding.
_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Proposer:
    """Makes rounds; the same weights, prompts and seed make the same round on any number of processes.

    Attributes:
        policy: The policy.
        method: What draws the candidates.
        reward: Beliefs about them.
        preferences: Preferences between them; by default those that the rewards imply.
        given: Responses of every prompt that are taken instead of draws.
        given_log_probs: Their log-probabilities under what drew them; by default those of the reference.
        temperature: Of the draws.
        batch_size: Responses drawn side by side.
        processes: Among which the prompts are shared out.
    """

    policy: Policy
    method: Method
    reward: Reward
    preferences: Preferences | None
    given: Sequence[Sequence[str]] | None
    given_log_probs: Sequence[Sequence[float]] | None
    temperature: float
    batch_size: int
    processes: Processes

    def propose(self, prompts: Sequence[Content], chosen: Sequence[int], anchor: Snapshot | None, seed: int) -> Round:
        """The round of the prompts at the places `chosen`."""
        own = range(self.processes.index, len(chosen), self.processes.count)
        part = self._part([prompts[chosen[i]] for i in own], [chosen[i] for i in own], anchor, seed)
        if self.processes.count == 1:
            return part
        return _joined(_gathered(part), len(chosen))

    def _part(self, prompts: Sequence[Content], chosen: list[int], anchor: Snapshot | None, seed: int) -> Round:
        if self.given is not None:
            texts = [list(self.given[row]) for row in chosen]
            asked = [prompt for prompt, of_prompt in zip(prompts, texts, strict=True) for _ in of_prompt]
            sequences = self.policy.encode(asked, [response for of_prompt in texts for response in of_prompt])
            log_probs = (
                None if self.given_log_probs is None else [x for row in chosen for x in self.given_log_probs[row]]
            )
        else:
            sequences, texts, log_probs = self._drawn(prompts, chosen, anchor, seed)
        mask = mask_of([len(of_prompt) for of_prompt in texts])

        def shaped(values: Tensor) -> Tensor:
            return by_prompt(values.detach().float().cpu(), mask)

        with torch.no_grad():
            now = shaped(self.policy.log_probs(sequences))
            with self.policy.using(self.policy.reference):
                of_reference = self.policy.token_log_probs(sequences)
            reference = shaped(of_reference.sums())
            log_anchor, along = now.clone(), dict[str, Tensor]()
            if self.method.needs_token_rewards:
                # `align` has checked both.
                reward, projection = typing.cast(Any, self.reward), typing.cast(Any, self.method.projection)
                rewards = token_rewards(reward, projection, self.policy, prompts, texts, sequences)
                along = {"token_rewards": rewards, "token_reference": shaped(of_reference.log_probs)}
            if anchor is not None or self.method.needs_tokens:
                with self.policy.using(self.policy.snapshot() if anchor is None else anchor):
                    tokens = self.policy.token_log_probs(sequences)
                log_anchor = shaped(tokens.sums())
                if self.method.needs_tokens:
                    along |= {
                        "target_values": shaped(tokens.log_normalisers),
                        "target_log_probs": shaped(tokens.log_probs),
                    }
        candidates = ScoredCandidates(
            score(self.reward, prompts, texts),
            reference=reference,
            # Responses that are given without log-probabilities count as draws of the reference policy.
            proposal=reference.clone() if log_probs is None else shaped(torch.tensor(log_probs)),
            anchor=log_anchor,
            preferences=None if self.preferences is None else check_preferences(self.preferences, prompts, texts),
            sources=self.method.sources if self.given is None else ("given",) * mask.shape[1],
        )
        return Round(torch.tensor(chosen), sequences, texts, candidates, now, **along)

    def _drawn(
        self, prompts: Sequence[Content], chosen: list[int], anchor: Snapshot | None, seed: int
    ) -> tuple[TokenSequences, list[list[str]], list[float]]:
        sources = self.method.sources
        drawn: dict[str, list[list[GeneratedResponse]]] = {}
        for number, source in enumerate(sorted(set(sources))):
            seeds = [int(np.random.SeedSequence([seed, number, row]).generate_state(1)[0]) for row in chosen]
            drawn[source] = self._from(source, prompts, sources.count(source), seeds, anchor)
        ordered = _ordered(drawn, sources)
        log_probs = [response.log_prob for group in ordered for response in group]
        return self.policy.sequences(ordered), [[r.text for r in group] for group in ordered], log_probs

    def _from(
        self, source: str, prompts: Sequence[Content], count: int, seeds: list[int], anchor: Snapshot | None
    ) -> list[list[GeneratedResponse]]:
        settings: dict[str, Any] = {
            "seed": seeds, "temperature": self.temperature, "batch_size": self.batch_size
        }  # fmt: skip
        if source == "mixture":
            settings["mixture"] = (self.policy.reference, self.method.mixture_weight)
        other = {"reference": self.policy.reference, "anchor": anchor}.get(source)
        if other is None:
            return self.policy.generate(prompts, count, **settings)
        with self.policy.using(other):
            return self.policy.generate(prompts, count, **settings)


def _ordered(
    drawn: Mapping[str, list[list[GeneratedResponse]]], sources: tuple[str, ...]
) -> list[list[GeneratedResponse]]:
    """The draws of each prompt in the order of `sources`."""
    groups = []
    for prompt in range(len(next(iter(drawn.values())))):
        waiting = {source: iter(groups_of[prompt]) for source, groups_of in drawn.items()}
        groups.append([next(waiting[source]) for source in sources])
    return groups


def _gathered(part: Round) -> list[Round]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, part)
    return found


def _joined(parts: list[Round], count: int) -> Round:
    """The parts of all processes, which hold every so-manieth prompt each, as one round."""
    starts = np.cumsum([0, *(len(part.prompts) for part in parts)])
    places = [int(starts[i % len(parts)]) + i // len(parts) for i in range(count)]

    def joined(tensors: Sequence[Tensor | None]) -> Any:
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) < len(tensors):
            return None
        # Prompts of another process may have more candidates, and longer ones.
        most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in found), strict=True)]
        return torch.cat([_padded(tensor, most) for tensor in found])

    candidates = ScoredCandidates(
        RewardBelief.concatenate([part.candidates.belief for part in parts]),
        sources=max((part.candidates.sources or () for part in parts), key=len),
        **{
            name: joined([getattr(part.candidates, name) for part in parts])
            for name in ("reference", "proposal", "anchor", "preferences")
        },
    ).select(torch.tensor(places))
    along: dict[str, Any] = {}
    for name in ("policy", *ALONG_TOKENS):
        tensor = joined([getattr(part, name) for part in parts])
        along[name] = None if tensor is None else tensor[places]
    texts, counts = [texts for part in parts for texts in part.texts], [n for part in parts for n in part.counts]
    ends = np.cumsum(counts)
    s = [part.sequences for part in parts]
    columns = [sum((getattr(x, name) for x in s), ()) for name in ("prompts", "responses", "ended")]
    return Round(
        prompts=torch.cat([part.prompts for part in parts])[places],
        sequences=TokenSequences(*columns)[[i for p in places for i in range(int(ends[p]) - counts[p], int(ends[p]))]],
        texts=[texts[place] for place in places],
        candidates=candidates,
        **along,
    )


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor with zeros up to these sizes of all dimensions but the first."""
    extra = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [k for one in reversed(extra) for k in (0, one)])


def check_given(
    given: Sequence[Sequence[str]], log_probs: Sequence[Sequence[float]] | None, prompts: Sequence[Content],
    method: Method,
) -> None:  # fmt: skip
    """Raises `ArgumentError` unless every prompt has given responses, and as many as the projection takes."""
    name = type(method.projection).__name__
    if (sources := getattr(method.projection, "draws", None)) is not None:
        raise ArgumentError(
            f"{name} learns from draws of {' and '.join(dict.fromkeys(sources))} that are made as it goes; it takes no "
            "`candidates`: leave them out, or use another method"
        )
    least, most = getattr(method.projection, "candidates_taken", (1, None))
    if len(given) != len(prompts):
        raise ArgumentError(f"`candidates` has {len(given)} entries for {len(prompts)} prompts; give one for each")
    for row, responses in enumerate(given):
        if isinstance(responses, str) or not isinstance(responses, Sequence):
            raise ArgumentError(
                f"`candidates`[{row}] is of type {type(responses).__name__}; give a list of responses for each prompt"
            )
        if len(responses) < least or (most is not None and len(responses) > most):
            takes = f"exactly {least}" if least == most else f"at least {least}"
            raise ArgumentError(
                f"`candidates`[{row}] holds {len(responses)} responses; {name} takes {takes} for each prompt"
            )
        if not all(isinstance(response, str) for response in responses):
            raise ArgumentError(f"`candidates`[{row}] holds a response that is no text")
    if log_probs is None:
        return
    if len(log_probs) != len(given):
        raise ArgumentError("`candidate_log_probs` must hold a list for each entry of `candidates`")
    for row, (values, responses) in enumerate(zip(log_probs, given, strict=True)):
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != len(responses):
            raise ArgumentError(f"`candidate_log_probs`[{row}] must hold a number for each of `candidates`[{row}]")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= _ROUNDING:
                raise ArgumentError(
                    f"`candidate_log_probs`[{row}] holds {value!r}; a log-probability is a finite number of at most 0"
                )

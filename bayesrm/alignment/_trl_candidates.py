"""Candidates of prompts: what is believed about them, and their texts as TRL's trainers take them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ..beliefs import RewardBelief
from ..data.rendering import Content
from ..errors import ArgumentError, DataError
from ..selection import select
from ._scoring import Predicts
from ._trl_groups import content_key, is_empty

#: Prompts whose candidates are read together.
_TOGETHER = 256


def read_candidates(
    posterior: Predicts, prompts: Sequence[Content], candidates: Sequence[Sequence[Content]], progress: bool
) -> Iterator[tuple[int, list[str], RewardBelief]]:
    """Where a run of prompts starts, what each is known by, and the belief about their candidates."""
    if len(prompts) != len(candidates):
        raise ArgumentError(f"{len(prompts)} prompts but candidates for {len(candidates)}")
    for b, texts in enumerate(candidates):
        if isinstance(texts, str) or not len(texts):
            raise ArgumentError(f"`candidates` of prompt {b} is {texts!r}; give a list of at least one response")
        for i, text in enumerate(texts):
            if is_empty(text):
                raise DataError(f"prompt {b}: candidate {i} has no words; leave it out")
    with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
        for start in range(0, len(prompts), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            with torch.no_grad():
                belief = posterior.predict(list(prompts[some]), [list(texts) for texts in candidates[some]])
            yield start, [content_key(prompt) for prompt in prompts[some]], belief
            bar.update(belief.num_prompts)


def first_best(belief: RewardBelief, scores: Float[Tensor, "prompts candidates"]) -> Int[Tensor, "prompts"]:
    """The candidate of each prompt with the highest score; the first of equals."""
    return select(belief, lambda _: scores)


def are_different(texts: Sequence[Content]) -> Bool[Tensor, "candidates candidates"]:
    """Whether each two of a prompt's candidates are different, shape `(K, K)`."""
    number: dict[str, int] = {}
    which = torch.tensor([number.setdefault(content_key(text), len(number)) for text in texts])
    return which[:, None] != which[None, :]


def conversational(prompts: Sequence[Content], candidates: Sequence[Sequence[Content]]) -> bool:
    """Whether any prompt or candidate is a list of messages."""
    return any(not isinstance(text, str) for texts in (prompts, *candidates) for text in texts)


def as_trl(as_messages: bool, **contents: Content) -> dict[str, Any]:
    """Texts, or all of them as messages: the prompt of the user, the others of the assistant."""
    if not as_messages:
        return dict(contents)
    roles = {name: "user" if name == "prompt" else "assistant" for name in contents}
    return {name: _messages(content, roles[name]) for name, content in contents.items()}


def _messages(content: Content, role: str) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)

"""The completions of one prompt as a group, what is believed about it, and its scores."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

from ..beliefs import RewardBelief
from ..data.rendering import Content
from ..errors import ArgumentError, DataError
from ..rewards._checks import plain
from ..selection import Rule
from ._scoring import Predicts


@dataclasses.dataclass(frozen=True)
class Groups:
    """Completions that are not empty, grouped by equal prompts wherever they stand.

    Attributes:
        keys: What is equal for equal prompts, one a group.
        prompts: The prompt of each group.
        distinct: The distinct completions of each group.
        members: Which of them stands at each place of the group, shape `(groups, places)`; -1 where there is none.
        places: Group and place of each completion, shape `(rows, 2)`; -1 for an empty one.
    """

    keys: tuple[str, ...]
    prompts: tuple[Any, ...]
    distinct: tuple[tuple[Any, ...], ...]
    members: Int[Tensor, "groups places"]
    places: Int[Tensor, "rows 2"]

    @classmethod
    def of(cls, prompts: Sequence[Content], completions: Sequence[Content]) -> "Groups":
        """Groups completions by their prompts, in the order of their first completions."""
        if len(prompts) != len(completions):
            raise ArgumentError(f"{len(prompts)} prompts but {len(completions)} completions; give one prompt for each")
        order: dict[str, int] = {}
        kept: list[Any] = []
        texts: list[dict[str, tuple[int, Any]]] = []
        members: list[list[int]] = []
        places = torch.full((len(prompts), 2), -1)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if is_empty(completion):
                continue
            group = order.setdefault(content_key(prompt), len(order))
            if group == len(kept):
                kept.append(prompt)
                texts.append({})
                members.append([])
            text, _ = texts[group].setdefault(content_key(completion), (len(texts[group]), completion))
            places[row] = torch.tensor([group, len(members[group])])
            members[group].append(text)
        most = max(map(len, members), default=0)
        padded = [[*group, *[-1] * (most - len(group))] for group in members]
        return cls(
            keys=tuple(order),
            prompts=tuple(kept),
            distinct=tuple(tuple(completion for _, completion in group.values()) for group in texts),
            members=torch.tensor(padded, dtype=torch.long).reshape(len(kept), most),
            places=places,
        )

    def part(self, rows: range) -> "Groups":
        """The groups that some of the completions belong to, with the places of these alone."""
        places = self.places[rows.start : rows.stop].clone()
        kept = places[places[:, 0] >= 0, 0].unique()
        number = torch.full((len(self.keys) + 1,), -1)
        number[kept] = torch.arange(len(kept))
        # The last number stands for the group -1.
        places[:, 0] = number[places[:, 0]]
        chosen = kept.tolist()
        return Groups(
            keys=tuple(self.keys[g] for g in chosen),
            prompts=tuple(self.prompts[g] for g in chosen),
            distinct=tuple(self.distinct[g] for g in chosen),
            members=self.members[kept],
            places=places,
        )

    def belief(self, posterior: Predicts) -> RewardBelief:
        """Joint belief about every place of every group; a completion that stands twice is read once."""
        about = posterior.predict(list(self.prompts), [list(texts) for texts in self.distinct])
        mask = (self.members >= 0).to(about.mean.device)
        index = self.members.clamp_min(0).to(about.mean.device)
        rank = index[..., None].expand(-1, -1, about.root.shape[2])
        draws = None if about.draws is None else about.draws.gather(2, index.expand(len(about.draws), -1, -1))
        if draws is not None:
            draws = torch.where(mask, draws, 0.0)
        return RewardBelief(about.mean.gather(1, index), about.root.gather(1, rank), mask, draws)


def is_empty(completion: Content) -> bool:
    """Whether a completion has no words, so that nothing can be believed about it."""
    return not plain(completion).strip()


def content_key(content: Content) -> str:
    """What is equal for equal texts or messages, and different for a text and a message."""
    try:
        return json.dumps(content, sort_keys=True)
    except TypeError as error:
        raise DataError(f"a prompt or completion is neither text nor messages of text: {error}") from None


def derived_seed(seed: int, step: int, key: str) -> int:
    """A seed of its own for each prompt and step, whatever else is in the batch."""
    return xxhash.xxh3_64_intdigest(f"{seed} {step} {key}".encode()) >> 1


def is_seeded(utility: Rule) -> bool:
    """Whether a utility draws: a dataclass with a `seed`."""
    return dataclasses.is_dataclass(utility) and isinstance(getattr(utility, "seed", None), int)


def utilities(utility: Rule, belief: RewardBelief, keys: Sequence[str], step: int = 0) -> Tensor:
    """Scores of shape `(B, K)`; a utility that draws gets a seed for each prompt and step.

    Raises:
        ArgumentError: The scores have another shape, or NaN for a real candidate.
    """
    if is_seeded(utility):
        seed = cast(Any, utility).seed
        scores = torch.zeros_like(belief.mean)
        for b, key in enumerate(keys):
            of_prompt: Rule = dataclasses.replace(cast(Any, utility), seed=derived_seed(seed, step, key))
            scores[b, belief.valid[b]] = _checked(of_prompt, belief[b])[0]
        return scores
    return torch.where(belief.valid, _checked(utility, belief), 0.0)


def _checked(utility: Rule, belief: RewardBelief) -> Tensor:
    scores = torch.as_tensor(utility(belief))
    if scores.shape != belief.mean.shape:
        raise ArgumentError(
            f"the utility returned scores of shape {tuple(scores.shape)}; expected {tuple(belief.mean.shape)}"
        )
    if bool(torch.isnan(scores[belief.valid]).any()):
        raise ArgumentError("the utility returned NaN for a completion")
    return scores.to(belief.mean)

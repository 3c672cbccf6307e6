"""What is believed about the responses that a policy drew."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..beliefs import RewardBelief
from ..errors import ArgumentError
from ._round import mask_of


@runtime_checkable
class Predicts(Protocol):
    """Whatever predicts rewards of texts as a `Posterior` does."""

    def predict(self, prompts: Sequence[Any], candidates: Sequence[Any]) -> RewardBelief:
        """Joint belief about the candidates of each prompt."""
        ...


#: A posterior over rewards, or a function with the arguments of its `predict`.
Reward: TypeAlias = Predicts | Callable[[Sequence[Any], Sequence[Any]], RewardBelief]

#: From prompts and their candidates to P(i preferred to j), shape `(B, n, n)`.
Preferences: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], Tensor]


def score(reward: Reward, prompts: Sequence[Any], candidates: Sequence[Sequence[str]]) -> RewardBelief:
    """Joint belief about the candidates of each prompt, shape `(B, n)` with n the most of them.

    A response that was drawn twice is read once. Nothing can be believed of a response without words: it counts as the
    response of its prompt with the lowest mean, and as 0 where no response has words.

    Raises:
        ArgumentError: `reward` returned a belief about other candidates.
    """
    predict = reward.predict if isinstance(reward, Predicts) else reward
    distinct = [list(dict.fromkeys(text for text in texts if text.strip())) for texts in candidates]
    asked = [row for row, texts in enumerate(distinct) if texts]
    mask = mask_of([len(texts) for texts in candidates])
    if not asked:
        return RewardBelief(torch.zeros(mask.shape), torch.zeros(*mask.shape, 1), mask)
    belief = predict([prompts[row] for row in asked], [distinct[row] for row in asked])
    most = max(len(distinct[row]) for row in asked)
    if not isinstance(belief, RewardBelief):
        raise ArgumentError(f"`reward` returned a {type(belief).__name__}; it returns a RewardBelief")
    if belief.mean.shape != (len(asked), most):
        raise ArgumentError(
            f"`reward` returned a belief about {tuple(belief.mean.shape)} candidates; it was asked about "
            f"{(len(asked), most)}"
        )
    belief = belief.to("cpu")
    lowest = belief.mean.masked_fill(~belief.valid, torch.inf).argmin(1)
    places = torch.zeros(mask.shape, dtype=torch.int64)
    for row, of_prompt in zip(asked, range(len(asked)), strict=True):
        place = {text: i for i, text in enumerate(distinct[row])}
        found = [place.get(text, int(lowest[of_prompt])) for text in candidates[row]]
        places[row, : len(found)] = torch.tensor(found)
    return _placed(belief, torch.tensor(asked), places, mask)


def _placed(belief: RewardBelief, rows: Tensor, places: Tensor, mask: Tensor) -> RewardBelief:
    """The belief with candidates repeated as `places` says, for the prompts `rows`; zeros for the others."""
    index = places[rows]
    mean = belief.mean.new_zeros(places.shape)
    mean[rows] = belief.mean.gather(1, index)
    if belief.draws is not None:
        draws = belief.draws.new_zeros(len(belief.draws), *places.shape)
        draws[:, rows] = belief.draws.gather(2, index.expand(len(belief.draws), -1, -1))
        return RewardBelief.from_draws(draws, mask)
    rank = belief.root.shape[2]
    root = belief.root.new_zeros(*places.shape, rank)
    root[rows] = belief.root.gather(1, index[..., None].expand(-1, -1, rank))
    return RewardBelief(mean, root, mask)


def check_preferences(
    preferences: Preferences, prompts: Sequence[Any], candidates: Sequence[Sequence[Any]]
) -> Float[Tensor, "prompts candidates candidates"]:
    """P(i preferred to j) of each prompt's candidates, n the most of them; what stands for missing ones is ignored.

    A response without words loses to every other for certain, and is not judged.

    Raises:
        ArgumentError: `preferences` returned another shape.
    """
    kept = [[i for i, text in enumerate(texts) if not _blank(text)] for texts in candidates]
    if all(len(places) == len(texts) for places, texts in zip(kept, candidates, strict=True)):
        return _judged(preferences, prompts, candidates)
    count = max(map(len, candidates))
    asked = [row for row, places in enumerate(kept) if places]
    matrix = torch.full((len(prompts), count, count), 0.5)
    if not asked:
        return matrix
    found = _judged(preferences, [prompts[r] for r in asked], [[candidates[r][i] for i in kept[r]] for r in asked])
    matrix = matrix.to(found.dtype)
    for row, judged in zip(asked, found, strict=True):
        places = torch.tensor(kept[row])
        matrix[row, places] = 1.0
        matrix[row, :, places] = 0.0
        matrix[row, places[:, None], places] = judged[: len(places), : len(places)]
    return matrix


def _blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _judged(preferences: Preferences, prompts: Sequence[Any], candidates: Sequence[Sequence[Any]]) -> Tensor:
    """The matrix that `preferences` returns, its shape checked."""
    matrix = preferences(prompts, candidates)
    count = max(map(len, candidates))
    if not isinstance(matrix, Tensor):
        raise ArgumentError(f"`preferences` returned a {type(matrix).__name__}; it returns a tensor of probabilities")
    matrix = matrix.detach().cpu()
    if tuple(matrix.shape) != (len(prompts), count, count):
        raise ArgumentError(
            f"`preferences` returned shape {tuple(matrix.shape)}; it returns {(len(prompts), count, count)}"
        )
    return matrix

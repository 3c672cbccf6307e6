"""Rewards of the tokens that a policy drew."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ArgumentError
from ..rewards._tokens import TokenSequences, token_spans
from ..token_beliefs import TokenBelief
from ._round import by_prompt, mask_of
from .policy import Policy
from .projections import TokenPolicyGradient


@runtime_checkable
class PredictsTokens(Protocol):
    """Whatever predicts rewards of tokens as a `TokenPosterior` does."""

    def predict_tokens(self, prompts: Sequence[Any], responses: Sequence[Any]) -> TokenBelief:
        """Belief about the tokens of responses, one prompt each."""
        ...


def token_rewards(
    reward: PredictsTokens, projection: TokenPolicyGradient, policy: Policy, prompts: Sequence[Any],
    texts: Sequence[Sequence[str]], sequences: TokenSequences,
) -> Float[Tensor, "prompts candidates tokens"]:  # fmt: skip
    """What stands for the rewards of the policy's tokens in a projection, shape `(B, n, T)`, 0 at padding.

    It is found on the reward's own tokens and goes over to those of the policy by the characters they share; the sum of
    a response stays the same. A response that was drawn twice is read once. Nothing can be believed of a response
    without words: its last token gets the lowest sum of its prompt's responses, and 0 where none has words.

    Raises:
        ArgumentError: The belief is about other responses, or the policy's tokens cannot be found in them.
    """
    flat = [(row, text) for row, row_texts in enumerate(texts) for text in row_texts]
    asked = list(dict.fromkeys(key for key in flat if key[1].strip()))
    found = torch.zeros(len(flat), int(sequences.lengths.max(initial=0)))
    if asked:
        belief = reward.predict_tokens([prompts[row] for row, _ in asked], [text for _, text in asked])
        _check(belief, [text for _, text in asked])
        belief = dataclasses.replace(belief, mean=projection.rewards(belief))
        place = {key: i for i, key in enumerate(asked)}
        known = [i for i, key in enumerate(flat) if key in place]
        spans = torch.zeros(len(known), found.shape[1], 2, dtype=torch.int64)
        mask = torch.zeros(len(known), found.shape[1], dtype=torch.bool)
        for row, i in enumerate(known):
            ids = sequences.responses[i]
            spans[row, : len(ids)] = torch.from_numpy(_spans(policy, ids, flat[i][1]))
            mask[row, : len(ids)] = True
        found[known] = belief[[place[flat[i]] for i in known]].onto(spans, mask).mean.float()
        sums = torch.full((len(flat),), torch.inf).index_put_((torch.tensor(known),), found[known].sum(1))
        rows = torch.tensor([row for row, _ in flat])
        lowest = torch.full((len(texts),), torch.inf).scatter_reduce(0, rows, sums, "amin").tolist()
        for i, key in enumerate(flat):
            if key not in place and np.isfinite(lowest[key[0]]):
                found[i, len(sequences.responses[i]) - 1] = lowest[key[0]]
    return by_prompt(found, mask_of([len(row_texts) for row_texts in texts]))


def _check(belief: Any, texts: Sequence[str]) -> None:
    if not isinstance(belief, TokenBelief):
        raise ArgumentError(
            f"`predict_tokens` of `reward` returned a {type(belief).__name__}; it returns a TokenBelief"
        )
    if list(belief.texts) != list(texts):
        raise ArgumentError(
            f"`reward.predict_tokens` returned a belief about other responses than the {len(texts)} that it was asked "
            "about; its `texts` are those, in their order"
        )


def _spans(policy: Policy, ids: Sequence[int], text: str) -> Int[np.ndarray, "tokens 2"]:
    """Where the policy's tokens stand in a response, offsets as in `TokenBelief.spans`.

    A token takes the characters that it adds to the decoded text: a text that is tokenized again may give other tokens
    than were drawn. Only where a tokenizer does not give a text back as it was (it lowers case, say), and the response
    came as text, its offsets tell.
    """
    # One pass over all beginnings: quadratic in the length, and still nothing beside the draw itself.
    beginnings = policy.decode([ids[: count + 1] for count in range(len(ids))])
    whole = beginnings[-1]
    offset = whole.find(text)
    if offset < 0:
        again = policy.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: len(ids)]
        if list(again) != list(ids[: len(again)]):
            raise ArgumentError(
                f"the policy's tokens cannot be found in the response {text[:60]!r}: its tokenizer decodes them as "
                f"{whole[:60]!r}"
            )
        return token_spans(policy.tokenizer, text, len(ids))
    # A character of which a part is still to come is decoded as another one.
    ends = np.array([_agreement(beginning, whole) for beginning in beginnings])
    ends = np.clip(np.maximum.accumulate(ends) - offset, 0, len(text))
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)


def _agreement(one: str, other: str) -> int:
    """Characters until two texts differ."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

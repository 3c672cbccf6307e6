"""Sampled conversations of several turns, the value of each turn from preferences between them, and training rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float

from .._typing import Tensor
from ..data import Conversations
from ..errors import ArgumentError, DataError

Message: TypeAlias = Mapping[str, Any]

#: Answers every one of several conversations: the policy's replies.
Respond: TypeAlias = Callable[[list[list[Message]]], Sequence[str]]

#: What the other party says next in a conversation, or `None` where it ends.
Environment: TypeAlias = Callable[[list[Message]], str | None]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A conversation of the policy with its environment.

    Attributes:
        messages: All messages, each with `role` and `content`.
        start: How many of them were given.
        replies: Positions of the policy's replies, ascending.
        ended: Whether the environment ended it, not the limit of turns.
    """

    messages: tuple[Message, ...]
    start: int
    replies: tuple[int, ...]
    ended: bool

    @property
    def turns(self) -> list[Message]:
        """The messages after the start: what a reward or preference model takes as the response."""
        return list(self.messages[self.start :])


@dataclasses.dataclass(frozen=True)
class TurnRow:
    """A reply, the messages before it, and what it is worth.

    Attributes:
        prompt: Messages before the reply.
        response: The reply.
        value: Estimate of Q(prompt, reply).
        rollout: Which conversation of its start it is from.
        turn: Which reply of the conversation it is.
    """

    prompt: tuple[Message, ...]
    response: str
    value: float
    rollout: int
    turn: int


def rollouts(
    starts: Sequence[Sequence[Message]],
    respond: Respond,
    environment: Environment,
    *,
    num_rollouts: int,
    max_turns: int,
) -> list[list[Rollout]]:
    """Independent conversations over each start; those that have not ended get their replies together.

    Args:
        starts: Messages with which the conversations begin.
        respond: The policy: takes conversations, returns a reply to each.
        environment: The other party: takes a conversation that ends with a reply, returns its next words or `None`.
        num_rollouts: Conversations of each start.
        max_turns: Most replies of the policy in a conversation.

    Returns:
        For each start its conversations.

    Raises:
        ArgumentError: A number is not positive, a start is empty, or `respond` returns another number of replies.

    Example:
        >>> start = [{"role": "user", "content": "Hi"}]
        >>> said = lambda messages: "More?" if len(messages) < 4 else None
        >>> ((one,),) = rollouts([start], lambda asked: ["Yes."] * len(asked), said, num_rollouts=1, max_turns=5)
        >>> [message["content"] for message in one.messages], one.replies, one.ended
        (['Hi', 'Yes.', 'More?', 'Yes.'], (1, 3), True)
    """
    for name, number in (("num_rollouts", num_rollouts), ("max_turns", max_turns)):
        if number < 1:
            raise ArgumentError(f"`{name}` is {number}; it is at least 1")
    if not all(len(start) for start in starts):
        raise ArgumentError("a start holds no messages; give at least one")
    talks: list[list[Message]] = [list(start) for start in starts for _ in range(num_rollouts)]
    replies: list[list[int]] = [[] for _ in talks]
    ended = [False] * len(talks)
    for turn in range(max_turns):
        live = [i for i, over in enumerate(ended) if not over]
        if not live:
            break
        said = respond([list(talks[i]) for i in live])
        if len(said) != len(live):
            raise ArgumentError(f"`respond` returned {len(said)} replies to {len(live)} conversations")
        for i, reply in zip(live, said, strict=True):
            replies[i].append(len(talks[i]))
            talks[i].append({"role": "assistant", "content": reply})
            answer = environment(list(talks[i]))
            ended[i] = answer is None
            # Words after the last reply would be judged without an answer.
            if answer is not None and turn + 1 < max_turns:
                talks[i].append({"role": "user", "content": answer})
    made = [
        Rollout(tuple(talk), len(starts[i // num_rollouts]), tuple(positions), over)
        for i, (talk, positions, over) in enumerate(zip(talks, replies, ended, strict=True))
    ]
    return [made[i : i + num_rollouts] for i in range(0, len(made), num_rollouts)]


def leave_one_out(preferences: Float[Tensor, "*starts n n"]) -> Float[Tensor, "*starts n"]:
    """Mean probability that each of n conversations is preferred to the others.

    As the others are independent draws of the policy, it is an unbiased estimate of E[P(final, final')] given the
    conversation, and of Q(s, a) of the policy against itself for each of its turns.

    Args:
        preferences: P(i preferred to j), for instance `posterior.predict_preferences(...).preference_matrix()`.

    Raises:
        ArgumentError: There are fewer than 2 conversations.

    Example:
        >>> leave_one_out(torch.tensor([[0.5, 0.9, 0.7], [0.1, 0.5, 0.5], [0.3, 0.5, 0.5]]))
        tensor([0.8000, 0.3000, 0.4000], dtype=torch.float64)
    """
    n = preferences.shape[-1]
    if n < 2:
        raise ArgumentError(f"`preferences` compares {n} conversation; at least 2 are needed")
    p = preferences.double()
    values: Tensor = (p.sum(-1) - p.diagonal(dim1=-2, dim2=-1)) / (n - 1)
    return values


def turn_rows(
    conversations: Sequence[Rollout],
    preferences: Float[Tensor, "n n"],
    *,
    log_ratios: Sequence[Sequence[float]] | None = None,
    regularisation: float = 0.0,
) -> list[TurnRow]:
    """Every reply of the conversations of one start, with an estimate of Q(s, a) as in `multi_turn`.

    The value of a reply is the leave-one-out preference of its conversation, less `regularisation` times the
    log-ratios of the replies *after* it, whose mean is the divergence of the turns to come. The estimate is unbiased
    for the policy that drew the conversations, against itself.

    Args:
        conversations: Independent conversations over one start.
        preferences: P(conversation i preferred to j).
        log_ratios: log pi(reply) - log p0(reply) of every reply; needed with a regularisation.
        regularisation: tau.

    Raises:
        ArgumentError: Shapes disagree, or the log-ratios are missing.

    Example:
        >>> start = ({"role": "user", "content": "Hi"},)
        >>> talks = [Rollout((*start, {"role": "assistant", "content": c}), 1, (1,), True) for c in ("Hello!", "What?")]
        >>> [(row.response, row.value) for row in turn_rows(talks, torch.tensor([[0.5, 0.75], [0.25, 0.5]]))]
        [('Hello!', 0.75), ('What?', 0.25)]
    """
    if len(preferences) != len(conversations):
        raise ArgumentError(f"`preferences` compares {len(preferences)} conversations, there are {len(conversations)}")
    if regularisation != 0.0 and log_ratios is None:
        raise ArgumentError("`log_ratios` is missing; a regularisation is the cost of leaving the reference")
    ratios = [[0.0] * len(c.replies) for c in conversations] if log_ratios is None else log_ratios
    counts = [len(c.replies) for c in conversations]
    if [len(r) for r in ratios] != counts:
        raise ArgumentError(
            f"`log_ratios` has {[len(r) for r in ratios]} entries; the conversations have {counts} replies"
        )
    rows = []
    values = leave_one_out(preferences).tolist()
    for i, (talk, value, ratio) in enumerate(zip(conversations, values, ratios, strict=True)):
        for turn, place in enumerate(talk.replies):
            cost = regularisation * sum(ratio[turn + 1 :])
            rows.append(TurnRow(talk.messages[:place], str(talk.messages[place]["content"]), value - cost, i, turn))
    return rows


def to_conversations(
    groups: Sequence[Sequence[Rollout]], preferences: Sequence[Float[Tensor, "n n"]], *, seed: int
) -> Conversations:
    """The pairs of different conversations of each start, with a winner drawn from the preferences, for storage.

    Pairs of conversations with the same words say nothing and are left out.

    Args:
        groups: Conversations of each start.
        preferences: For each start P(conversation i preferred to j).
        seed: Seed of the winners.

    Raises:
        ArgumentError: Shapes disagree.
        DataError: All conversations of every start are the same.
    """
    if [len(p) for p in preferences] != [len(g) for g in groups]:
        raise ArgumentError(
            f"`preferences` compares {[len(p) for p in preferences]} conversations, "
            f"there are {[len(g) for g in groups]}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for group, matrix in zip(groups, preferences, strict=True):
        lost = (torch.rand(matrix.shape, generator=generator, dtype=torch.float64) >= matrix.double()).tolist()
        rows += [
            {"conversations": [list(group[i].messages), list(group[j].messages)], "choice": int(lost[i][j])}
            for i in range(len(group))
            for j in range(i + 1, len(group))
            if group[i].messages != group[j].messages
        ]
    if not rows:
        raise DataError("all conversations of every start are the same; there is nothing to compare")
    return Conversations.load(rows)

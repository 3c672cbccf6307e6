"""Conversations: whole dialogues over the same start, of which one was preferred."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from ._fields import (
    BadRowError,
    Row,
    present,
    read_annotator,
    read_choice,
    read_flag,
    read_list,
    read_messages,
    read_weight,
)
from ._prompts import split_prompt
from .formats import Format, Judgement
from .records import Records

Messages = list[dict[str, Any]]


def _parse_list(row: Row, kind: str) -> Iterator[Judgement]:
    values = read_list(row[present(row, "conversations")], "`conversations`")
    if len(values) < 2:
        raise BadRowError(f"`conversations` has {len(values)} entries; a comparison needs at least 2")
    names = [f"`conversations`[{place}]" for place in range(len(values))]
    yield _judge(row, kind, values, names, read_choice(row, len(values), "conversations"))


def _parse_pair(row: Row, kind: str) -> Iterator[Judgement]:
    values = [row[present(row, name)] for name in ("chosen", "rejected")]
    tie = row.get("tie")
    outcome = 2 if tie not in (None, "") and read_flag(tie, "`tie`") else 0
    yield _judge(row, kind, values, ("`chosen`", "`rejected`"), outcome)


def _judge(row: Row, kind: str, values: Sequence[Any], names: Sequence[str], outcome: int) -> Judgement:
    conversations = [read_messages(value, name) for value, name in zip(values, names, strict=True)]
    for conversation, name in zip(conversations, names, strict=True):
        if len(conversation) < 2:
            raise BadRowError(f"{name} has {len(conversation)} message; a conversation needs at least 2")
        if conversation[0] != conversations[0][0]:
            raise BadRowError(f"{name} does not begin like {names[0]}; compare conversations over the same start")
    start, rest = split_prompt(None, conversations, names)
    for place, text in enumerate(rest):
        if text in rest[:place]:
            raise BadRowError(f"{names[place]} repeats {names[rest.index(text)]}; remove one of them")
    return Judgement(kind, start, rest, (outcome,), annotator=read_annotator(row), weight=read_weight(row))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Conversations(Records):
    """Two or more conversations that begin alike, and which of them was preferred.

    Columns `conversations` (a list of lists of messages) and `choice` (an index, or `"tie"`), or `chosen` and
    `rejected` (lists of messages) with an optional `tie`; a row may have `annotator` and `weight`.

    Example:
        >>> start = [{"role": "user", "content": "Recommend a book."}]
        >>> ends = [[{"role": "assistant", "content": text}] for text in ("Emma.", "No.")]
        >>> data = Conversations.load([{"conversations": [start + end for end in ends], "choice": 0}])
        >>> len(data.start(0)), data.turns(0)[0][0]["content"], int(data.outcome[0])
        (1, 'Emma.', 0)
    """

    formats: ClassVar[tuple[Format, ...]] = (
        Format("choice among conversations", (("conversations",), ("choice",)), ("choice",), _parse_list),
        Format("pairs of conversations", (("chosen",), ("rejected",)), ("choice",), _parse_pair, ("tie",)),
    )

    @property
    def outcome(self) -> Int64[np.ndarray, " rows"]:
        """Index of the preferred conversation of each row, or their number for a tie, shape `(rows,)`."""
        return self._rows.outcomes.values.astype(np.int64)

    @property
    def num_candidates(self) -> Int64[np.ndarray, " rows"]:
        """Number of conversations of each row, shape `(rows,)`."""
        return self._rows.candidates.lengths

    def start(self, row: int) -> Messages:
        """Returns the messages that the conversations of a row have in common.

        Raises:
            ArgumentError: There is no such row.
        """
        return list(self._row_texts(row)[0])

    def turns(self, row: int) -> list[Messages]:
        """Returns, for each conversation of a row, the messages after the common start.

        Raises:
            ArgumentError: There is no such row.
        """
        return [list(messages) for messages in self._row_texts(row)[1:]]

    def conversations(self, row: int) -> list[Messages]:
        """Returns the whole conversations of a row.

        Raises:
            ArgumentError: There is no such row.
        """
        start = self.start(row)
        return [start + messages for messages in self.turns(row)]

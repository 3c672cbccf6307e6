"""Demonstrations: responses that somebody gave to show how it is done."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ._fields import Row, read_annotator, read_weight
from .formats import PROMPT, Format, Judgement, read_single
from .records import Records


def _parse(row: Row, kind: str) -> Iterator[Judgement]:
    prompt, response = read_single(row, ("completion", "response"))
    yield Judgement(kind, prompt, (response,), (), annotator=read_annotator(row), weight=read_weight(row))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Demonstrations(Records):
    """Prompts with a demonstrated completion: columns `prompt`, and `completion` or `response`.

    Texts are strings or lists of messages; a row may have `annotator` and `weight`.

    Example:
        >>> data = Demonstrations.load([{"prompt": "Greet me.", "completion": "Good morning!"}])
        >>> data.text(0)
        ('Greet me.', 'Good morning!')
    """

    formats: ClassVar[tuple[Format, ...]] = (
        Format("demonstrations", (PROMPT, ("completion", "response")), ("demonstration",), _parse),
    )

    def text(self, row: int) -> tuple[Any, Any]:
        """Returns the prompt and the completion of a row: strings, or lists of messages.

        Raises:
            ArgumentError: There is no such row.
        """
        prompt, completion = self._row_texts(row)
        return prompt, completion

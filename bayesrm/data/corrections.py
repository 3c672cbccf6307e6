"""Corrections: a response and what somebody made of it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ._fields import Row, present, read_annotator, read_weight
from ._prompts import split_prompt
from .formats import PROMPT, Format, Judgement
from .records import Records


def _parse(row: Row, kind: str) -> Iterator[Judgement]:
    texts = [row[present(row, name)] for name in ("response", "corrected")]
    prompt, responses = split_prompt(row[present(row, *PROMPT)], texts, ("`response`", "`corrected`"))
    yield Judgement(kind, prompt, responses, (), annotator=read_annotator(row), weight=read_weight(row))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corrections(Records):
    """Responses with their corrected form: columns `prompt`, `response` and `corrected`.

    Texts are strings or lists of messages; a row may have `annotator` and `weight`. A response that somebody read and
    left as it was is its own correction.

    Example:
        >>> data = Corrections.load([{"prompt": "2 + 2?", "response": "5", "corrected": "4"}])
        >>> data.text(0)
        ('2 + 2?', '5', '4')
    """

    formats: ClassVar[tuple[Format, ...]] = (
        Format("corrections", (PROMPT, ("response",), ("corrected",)), ("correction",), _parse),
    )

    def text(self, row: int) -> tuple[Any, Any, Any]:
        """Returns the prompt, the response and its correction: strings, or lists of messages.

        Raises:
            ArgumentError: There is no such row.
        """
        prompt, response, corrected = self._row_texts(row)
        return prompt, response, corrected

"""Reads prompts with candidate responses: columns `prompt` and `responses`, no feedback."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..data._canonical import is_canonical
from ..data._fields import present, read_list
from ..data._prompts import split_prompt
from ..data.base import Batch, parse_batches, read_batches
from ..data.formats import PROMPT
from ..errors import DataError

#: Columns that make rows with `responses` feedback instead.
_FEEDBACK = {"choice", "ranking", "scores"}


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Prompts and the responses to choose from.

    Attributes:
        rows: Where each prompt stands in the source, counted from 0.
        prompts: Strings or lists of messages.
        responses: For each prompt, its responses, at least one.
    """

    rows: list[int]
    prompts: list[Any]
    responses: list[list[Any]]


def holds_candidates(source: str, *, columns: Mapping[str, str] | None = None, split: str | None = None) -> bool:
    """Whether a source has prompts with responses and no feedback on them."""
    if is_canonical(source):
        return False
    first = next(read_batches(source, columns=columns, split=split))
    found = set().union(*first.rows)
    return "responses" in found and not found & _FEEDBACK


def read_candidates(
    source: str, *, on_bad_row: str = "raise", columns: Mapping[str, str] | None = None, split: str | None = None
) -> tuple[Candidates, list[tuple[int, str]]]:
    """Reads prompts with responses.

    Args:
        source: A file with the columns `prompt` and `responses`.
        on_bad_row: `"raise"` or `"skip"`.
        columns: Renames columns: our name to the source's name.
        split: Split to read, for a data set with several.

    Returns:
        The candidates, and index and reason of each row left out.

    Raises:
        DataError: The file or a row cannot be used; the message names them.
    """
    refused: list[tuple[int, str]] = []
    found: list[tuple[Any, list[Any]]] = []
    for rows in parse_batches(
        _checked(read_batches(source, columns=columns, split=split)), _parse, on_bad_row, refused
    ):
        found.extend(rows)
    if not found:
        reason = f"; the first is row {refused[0][0]}: {refused[0][1]}" if refused else ""
        raise DataError(f"none of its rows can be used{reason}", source=source)
    left_out = {row for row, _ in refused}
    kept = [row for row in range(len(found) + len(refused)) if row not in left_out]
    return Candidates(kept, [prompt for prompt, _ in found], [responses for _, responses in found]), refused


def _checked(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        columns = set().union(*batch.rows)
        if batch.start == 0 and not ("responses" in columns and columns & set(PROMPT)):
            raise DataError(
                f"the columns {sorted(columns)} hold no candidates; accepted are `prompt` and `responses` (a list)",
                source=batch.source,
            )
        yield batch


def _parse(row: Mapping[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
    values = read_list(row[present(row, "responses")], "`responses`")
    names = [f"`responses`[{place}]" for place in range(len(values))]
    if not values:
        values, names = [""], ["`responses`"]
    prompt, responses = split_prompt(row[present(row, *PROMPT)], values, names)
    yield prompt.decode(), [response.decode() for response in responses]

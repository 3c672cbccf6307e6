"""What one check for failures found."""

import dataclasses

from ._html import Html
from ._section import Status


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        title: What was looked for.
        status: How it turned out.
        sentence: What was found, in one sentence with its number.
        advice: What to do; empty where there is nothing to do.
        body: What it rests on.
    """

    title: str
    status: Status
    sentence: str
    advice: str
    body: Html

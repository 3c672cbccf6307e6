"""What a section of the report is: a verdict in one sentence, what to do about it, and what it rests on."""

import dataclasses
import enum

from ._html import Html, element, paragraph


class Status(enum.StrEnum):
    """How a section turned out."""

    GOOD = "good"
    """Nothing speaks against the posterior here."""
    CAUTION = "caution"
    """Something to keep in mind or to look into."""
    PROBLEM = "problem"
    """Do not rely on the posterior before this is resolved."""
    NOTE = "note"
    """Nothing to judge: for information."""


#: Sign and words of each status: colour alone must not carry it.
_SHOWN = {
    Status.GOOD: ("✓", "good"),
    Status.CAUTION: ("!", "look closer"),
    Status.PROBLEM: ("✗", "problem"),
    Status.NOTE: ("i", "for information"),
}


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        name: Short name, the section's anchor in the page.
        title: Heading.
        status: How it turned out.
        verdict: One sentence in plain words with its number.
        advice: What to do; empty where there is nothing to do.
        body: Tables, figures and texts below the verdict.
    """

    name: str
    title: str
    status: Status
    verdict: str
    advice: str
    body: Html

    def render(self) -> Html:
        """The section as HTML."""
        return element(
            "section",
            element("h2", self.title, id=f"{self.name}-title"),
            paragraph(badge(self.status), " ", self.verdict, class_=f"verdict {self.status}"),
            paragraph(element("b", "What to do: "), self.advice, class_="advice") if self.advice else None,
            self.body,
            id=self.name,
            aria_labelledby=f"{self.name}-title",
        )


def badge(status: Status) -> Html:
    """A status as a sign with words."""
    sign, words = _SHOWN[status]
    return element("span", element("span", sign, aria_hidden="true"), f" {words}", class_=f"badge {status}")


def worst(statuses: list[Status]) -> Status:
    """The most serious of several statuses; good for none.

    Example:
        >>> worst([Status.NOTE, Status.CAUTION, Status.GOOD]).value
        'caution'
    """
    order = [Status.NOTE, Status.GOOD, Status.CAUTION, Status.PROBLEM]
    return max(statuses, key=order.index, default=Status.GOOD)


def several(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun.

    Example:
        >>> several(1, "row"), several(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"

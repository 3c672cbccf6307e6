"""What was read, and what was not."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Report:
    """How a table came about.

    Attributes:
        source: Where the rows came from.
        format: Name of the format that was detected.
        num_source_rows: Rows in the source, or `None` where the table was not read from rows.
        num_mentions: Responses named by the source, before equal ones were merged.
        num_repeats: How many of those were merged into an item already there.
        refused: Index and reason of each row left out.
        ignored: Columns of the source that its format does not use.
    """

    source: str
    format: str
    num_source_rows: int | None = None
    num_mentions: int | None = None
    num_repeats: int = 0
    refused: tuple[tuple[int, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def part(self) -> "Report":
        """Returns the report of a selection of the rows."""
        source = self.source if self.source.startswith("part of ") else f"part of {self.source}"
        return dataclasses.replace(self, source=source, num_mentions=None)

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        found = [f"source: {self.source} ({self.format})"]
        if self.num_source_rows is not None:
            found.append(f"rows read: {self.num_source_rows}, refused: {len(self.refused)}")
        found += [f"  row {row}: {reason}" for row, reason in self.refused[:3]]
        if len(self.refused) > 3:
            found.append(f"  and {len(self.refused) - 3} more (see `refused`)")
        if self.ignored:
            found.append(f"columns not used: {', '.join(self.ignored)}")
        return found

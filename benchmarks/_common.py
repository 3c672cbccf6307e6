"""What the benchmarks share: measured numbers with bounds, the folder of the real data, and the command line."""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bayesrm.diagnostics import Estimate


@dataclasses.dataclass(frozen=True)
class Claim:
    """A measured number, and the bound that its whole interval must keep.

    Attributes:
        name: What was measured.
        estimate: The number with its interval.
        minimum: The lower end must reach this.
        maximum: The upper end must not exceed this.
    """

    name: str
    estimate: Estimate
    minimum: float | None = None
    maximum: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the bounds are kept; a number without bounds is only recorded."""
        above = self.minimum is None or self.estimate.low >= self.minimum
        return above and (self.maximum is None or self.estimate.high <= self.maximum)

    @property
    def line(self) -> str:
        """`name: value (bound)`."""
        e = self.estimate
        bounds = [f"lower end >= {self.minimum:g}"] if self.minimum is not None else []
        bounds += [f"upper end <= {self.maximum:g}"] if self.maximum is not None else []
        verdict = (" and ".join(bounds) or "recorded") + ("" if self.holds else ", MISSED")
        return f"{self.name}: {e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}] ({verdict})"


def data_folder() -> Path:
    """The folder of the real data: `$BAYESRM_DATA`, else `../shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("BAYESRM_DATA", default))


def main(
    description: str, run: Callable[[bool], tuple[Sequence[Claim], dict[str, Any]]], argv: Sequence[str] | None = None
) -> int:
    """Runs a benchmark from the command line.

    Args:
        description: What it measures.
        run: Takes `quick`, returns the claims and what else goes into the JSON file.
        argv: Arguments, those of the process by default.

    Returns:
        Exit status: 1 when a bound is missed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke run: reduced size, bounds not enforced")
    arguments = parser.parse_args(argv)
    claims, details = run(arguments.quick)
    for claim in claims:
        print(claim.line)
    if arguments.json is not None:
        records = [dataclasses.asdict(c) | {"holds": c.holds} for c in claims]
        arguments.json.write_text(json.dumps({"quick": arguments.quick, "claims": records} | details, indent=2) + "\n")
    return int(not arguments.quick and not all(claim.holds for claim in claims))

"""One HTML file that tells a person whether a posterior can be trusted."""

from ._examine import examine, report, write
from ._section import Section, Status

__all__ = ["Section", "Status", "examine", "report", "write"]

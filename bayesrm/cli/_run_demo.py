"""`bayesrm demo`: calls the demonstration, which is imported only here."""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from . import _parser
from ._console import Console


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser("demo", "Runs the demonstration and writes its report.")
    parser.add_argument("--output", metavar="FILE", default="demo_report.html", help="file for the report")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Runs it; its exit code is the command's."""
    demo = importlib.import_module("bayesrm.cli.demo")
    with contextlib.redirect_stdout(console.stream):
        code = demo.run(Path(settings.output), settings.json)
    raise SystemExit(code)

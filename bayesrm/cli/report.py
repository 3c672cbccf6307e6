"""`bayesrm report`: one HTML file that tells a person whether a saved posterior can be trusted."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from ..data import Comparisons
from ..diagnostics._report import Section, examine, write
from ..errors import DataError
from . import _files, _parser
from ._console import Console
from ._runs import add_run, load_run
from .fit import add_data, describe, load_data, read_data


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser(
        "report",
        "Judges a saved posterior by comparisons that it was not fitted on, and writes one self-contained HTML file: "
        "the declared model drawn, the engine's checks, calibration, predictive checks, uncertainty, the comparisons "
        "it knows least about with their texts, and suspected failures. Of a run on trajectories: their actions and "
        "preferences as predicted, and rewards by state.",
    )
    add_run(parser)
    add_data(parser)
    parser.add_argument("-o", "--output", metavar="FILE.html", required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    parser.add_argument("--ood", metavar="DATA", help="comparisons on subjects that the training data do not cover")
    parser.add_argument(
        "--train", metavar="DATA", help="the data of the fit: shows shared prompts, and the usual range of rewards"
    )
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of draws and bootstraps")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Judges and writes."""
    target = _files.check_output_file(settings.output, ".html", overwrite=settings.overwrite)
    posterior = load_run(settings)
    kinds = posterior.program.data_type
    data = load_data(settings, kinds)
    if isinstance(data, Comparisons) and not any(bool((group.weight > 0).any()) for group in data.groups()):
        raise DataError("every row of `data` has weight 0", source=settings.data_source)
    others = {name: _load(settings, name, kinds) for name in ("train", "ood")}
    console.say(f"{data.summary()}\n")
    sections = examine(posterior, data, **others, seed=settings.seed, progress=True)
    write(posterior, sections, target, title=settings.title)
    console.say("\n".join(_line(section) for section in sections) + f"\nwritten to {target}")
    console.result(
        {
            "command": "report",
            "run": settings.run,
            "output": str(target),
            "data": describe(data),
            "sections": [
                {"name": s.name, "status": s.status.value, "verdict": s.verdict, "advice": s.advice} for s in sections
            ],
        }
    )


def _load(settings: Namespace, name: str, kinds: Any) -> Any:
    """A further data set, read with the flags of the reader."""
    source = settings.get(name)
    return None if source is None else read_data(source, settings.data.as_dict(), kinds)


def _line(section: Section) -> str:
    return f"{section.status.value:8} {section.title}: {section.verdict}"

"""The command line: one thin module a command, imported only when the command is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ._console import Console, reporting

#: Module and one line of help of each command.
COMMANDS = {
    "fit": ("fit", "fit a program to feedback and save its posterior"),
    "predict": ("predict", "predict feedback and score it, or rewards of candidates"),
    "select": ("select", "pick a response for each prompt"),
    "evaluate": ("evaluate", "measure picks and verdicts where the truth is known"),
    "acquire": ("acquire", "choose the comparisons to label next"),
    "audit-labels": ("audit_labels", "rank labels by the probability that they are wrong"),
    "propose": ("propose", "draw responses from a policy"),
    "align": ("align", "move a policy towards the target of a method"),
    "report": ("report", "judge a saved posterior in one HTML file"),
    "simulate": ("simulate", "draw feedback from a program, with the truth beside it"),
    "demo": ("_run_demo", "run the demonstration and write its report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the name of the program; by default those of the process.

    Returns:
        The exit code: 0 for success, 1 when the data, a saved run or the fit fails, 2 when the call is wrong (a name,
        a setting or an output that is not accepted); both say why in one line on stderr.

    Example:
        >>> main(["--version"])
        bayesrm 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return _call(arguments[0], arguments[1:])
    commands = "\n".join(f"  {name:14}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="bayesrm",
        description="Bayesian reward models from the command line.",
        epilog=f"commands:\n{commands}\n\n`bayesrm COMMAND --help` shows what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="one of the commands below")
    parser.add_argument("--version", action="version", version=f"bayesrm {__version__}")
    try:
        parser.parse_args(arguments[:1])
    except argparse.ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    return 2


def _call(name: str, arguments: list[str]) -> int:
    """Parses the arguments of a command and runs it, with errors as exit codes."""
    with reporting() as status:
        # Both may load a program file of the user's, which may print: stdout is for results alone.
        command = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
        settings = command.parse(arguments)
        with Console.open(json=settings.json) as console:
            command.run(settings, console)
    return status.code

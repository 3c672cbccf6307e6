"""The argument RUN: a saved posterior, with the user's own file that its likelihood needs."""

import contextlib
import sys
from typing import Any

from jsonargparse import Namespace

from .. import _ready_files
from ..engines import Posterior
from ..errors import LikelihoodError


def add_run(parser: Any) -> None:
    """Adds RUN and `--program`."""
    parser.add_argument("run", metavar="RUN", help="folder that `bayesrm fit` wrote")
    parser.add_argument(
        "--program",
        metavar="FILE.py",
        help="file that registers the likelihood of RUN, where the package does not",
    )


def load_run(settings: Namespace) -> Posterior:
    """The posterior that the command line names.

    Raises:
        PersistenceError: A file of the run is missing or damaged.
        LikelihoodError: Its likelihood is not known here.
    """
    if settings.program is not None:
        with contextlib.redirect_stdout(sys.stderr):
            _ready_files.load_module(_ready_files.locate("models", settings.program))
    try:
        return Posterior.from_pretrained(settings.run)
    except LikelihoodError as error:
        hint = "on the command line, pass --program with the file that registers it (`@bayesrm.likelihoods.register`)"
        raise LikelihoodError(f"{settings.run}: {error}; {hint}") from error

"""The argument RUN: a saved posterior, with the user's own file that its likelihood needs."""

import contextlib
import inspect
import sys
import warnings
from typing import Any

from jsonargparse import Namespace

from .. import _ready_files
from ..engines import Posterior
from ..errors import ArgumentError, LikelihoodChangedWarning, LikelihoodError
from ._own_likelihood import supplied


def add_run(parser: Any) -> None:
    """Adds RUN and `--program`."""
    parser.add_argument("run", metavar="RUN", help="folder that `bayesrm fit` wrote")
    parser.add_argument(
        "--program",
        metavar="FILE.py",
        help="file of the program of RUN, or one that registers its likelihood, where the likelihood is your own",
    )


def load_run(settings: Namespace) -> Posterior:
    """The posterior that the command line names.

    Raises:
        PersistenceError: A file of the run is missing or damaged.
        ArgumentError: Its likelihood is not known here, and `--program` does not give it.

    Warns:
        LikelihoodChangedWarning: The source of its likelihood is not that of the fit.
    """
    build = None
    if settings.program is not None:
        with contextlib.redirect_stdout(sys.stderr):
            module = _ready_files.load_module(_ready_files.locate("models", settings.program))
        build = getattr(module, "build", None)
    likelihood = supplied(settings.run, settings.program, build if inspect.isfunction(build) else None)
    with warnings.catch_warnings():
        if likelihood is not None:
            # `supplied` has told it, of likelihoods inside others too.
            warnings.simplefilter("ignore", LikelihoodChangedWarning)
        try:
            return Posterior.from_pretrained(settings.run, likelihood=likelihood)
        except LikelihoodError as error:
            hint = "on the command line, pass --program with the file that registers it"
            raise ArgumentError(f"{settings.run}: {error}; {hint} (`@bayesrm.likelihoods.register`)") from error

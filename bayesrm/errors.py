"""The errors and warnings that this package raises.

Every error a user can cause derives from `BayesRMError`, so ``except brm.BayesRMError`` catches them all; each also
derives from the built-in type that fits (`ValueError`, `RuntimeError`).
"""


class BayesRMError(Exception):
    """Base class of every error of this package."""


class ArgumentError(BayesRMError, ValueError):
    """An argument has a value that cannot be used; the message names the argument and what is accepted."""


class DataError(BayesRMError, ValueError):
    """A data source or one of its rows cannot be used; the message names the file or the row, and the reason.

    Attributes:
        source: Where the data came from (a path, or a short description), if known.
        row: Zero-based index of the offending row, if one row is to blame.
    """

    def __init__(self, message: str, *, source: str | None = None, row: int | None = None) -> None:
        place = ", ".join(p for p in (source, None if row is None else f"row {row}") if p)
        super().__init__(f"{place}: {message}" if place else message)
        self.source = source
        self.row = row


class LikelihoodError(BayesRMError, ValueError):
    """A likelihood does not fit the feedback, or does not return a proper distribution over it."""


class EngineError(BayesRMError, RuntimeError):
    """An inference engine cannot serve a program, or could not finish; the message says what to do."""


class PersistenceError(BayesRMError, RuntimeError):
    """A saved posterior cannot be written or read; the message names the file."""


class ConvergenceWarning(UserWarning):
    """Optimisation stopped before it reached the stated gradient norm: the result is not the mode of the posterior."""


class ParetoWarning(UserWarning):
    """Importance weights have too heavy a tail: what was averaged with them is not reliable."""


class ApproximationWarning(UserWarning):
    """An approximation is known to be far from the posterior that was declared; the message says what serves better."""


class LikelihoodChangedWarning(UserWarning):
    """The source of a likelihood differs from the source it was fitted with."""

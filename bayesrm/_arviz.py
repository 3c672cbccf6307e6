"""The one place that knows ArviZ: what differs between its 0.x line (`InferenceData`) and 1.x (`xarray.DataTree`)."""

import functools
import importlib
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError

#: Quantiles whose effective sample sizes `ess_tail` takes the smaller of.
_TAIL = (0.05, 0.95)


@functools.cache
def arviz() -> ModuleType:
    """The installed ArviZ.

    Raises:
        EngineError: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            # The last releases of the 0.x line announce their successor once a day, whoever imports them.
            warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
            return importlib.import_module("arviz")
    except ModuleNotFoundError as error:
        if error.name != "arviz":
            raise
        raise EngineError("ArviZ is not installed; run `pip install arviz`") from error


def is_tree() -> bool:
    """Whether the installed ArviZ keeps inference data in an `xarray.DataTree`, as it does from 1.0 on."""
    return int(arviz().__version__.partition(".")[0]) >= 1


def inference_data(groups: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    """Inference data of the installed line: `arviz.InferenceData`, or from ArviZ 1.0 on an `xarray.DataTree`.

    Args:
        groups: An `xarray.Dataset` for each group, named as in ArviZ's schema.
        attributes: Attributes of the whole.
    """
    if not is_tree():
        return arviz().InferenceData(attrs=dict(attributes), **groups)
    import xarray

    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs = dict(attributes)
    return tree


def pareto_smoothed(log_weights: NDArray[np.float64], relative_efficiency: float) -> tuple[NDArray[np.float64], float]:
    """Normalised Pareto-smoothed log weights, shape `(S,)`, and k-hat; the weights must differ from one another."""
    # Where nearly all weights are zero the fit divides by zero, and k-hat is not a number.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        smoothed, k_hat = _psislw(log_weights, relative_efficiency)
    return np.asarray(smoothed, dtype=np.float64), float(k_hat)


def _psislw(log_weights: NDArray[np.float64], relative_efficiency: float) -> Any:
    if is_tree():
        array_stats = importlib.import_module("arviz_stats.base").array_stats
        # From 1.0 on the argument is the log likelihood that is left out, which is minus the log weight.
        return array_stats.psislw(-log_weights, r_eff=relative_efficiency)
    return arviz().psislw(log_weights, reff=relative_efficiency)


def r_hat(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank-normalised split R-hat of n quantities, shape `(n,)`, from draws of shape `(chains, draws, n)`."""
    return _each("rhat", values, method="rank")


def ess_bulk(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bulk effective sample size of n quantities, shape `(n,)`, from draws of shape `(chains, draws, n)`."""
    return _each("ess", values, method="bulk")


def ess_tail(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smaller of the effective sample sizes of the 5% and 95% quantiles, shape `(n,)`; draws as for `ess_bulk`."""
    return _each("ess", values, method="tail", prob=_TAIL)


def ess_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Effective sample size for the mean, without rank normalisation, shape `(n,)`; draws as for `ess_bulk`."""
    return _each("ess", values, method="mean")


def mcse_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Monte Carlo standard error of the mean of n quantities, shape `(n,)`; draws as for `ess_bulk`."""
    return _each("mcse", values, method="mean")


def _each(function: str, values: NDArray[np.float64], **settings: Any) -> NDArray[np.float64]:
    # Both lines take one quantity's `(chains, draws)`; for more at once they want different containers.
    measure = getattr(arviz(), function)
    chains_first = np.moveaxis(values, 2, 0)
    # A chain that never moves has variance 0, which R-hat divides by: infinite, as it should be.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.array([float(measure(np.ascontiguousarray(one), **settings)) for one in chains_first])

"""Probabilistic programming for Bayesian reward modelling.

Declare a `RewardModel` (prior x reward function x preference likelihood), `fit` it with any inference engine, and use
the `Posterior`: beliefs about the rewards of candidates, predictions of feedback, decisions by `select`.

Example:
    >>> import bayesrm as brm, numpy as np
    >>> features = np.random.default_rng(0).normal(size=(6, 2))
    >>> data = brm.Comparisons.from_arrays(features, candidates=[[0, 1], [2, 3], [4, 5]], outcome=[0, 1, 0])
    >>> model = brm.RewardModel(reward=brm.rewards.Linear(), likelihood=brm.likelihoods.BradleyTerry())
    >>> posterior = brm.fit(model, data, inference=brm.Laplace(structure="full"), seed=0)
    >>> belief = posterior.predict(candidates=[features])
    >>> brm.select(belief, rule=brm.selection.LowerConfidenceBound(k=1.0)).shape
    torch.Size([1])
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (
        alignment,
        backend,
        beliefs,
        data,
        diagnostics,
        engines,
        errors,
        likelihoods,
        priors,
        programs,
        rewards,
        selection,
    )
    from .backend import dist, ops, plate, sample
    from .beliefs import RewardBelief
    from .data import Comparisons, Conversations, Corrections, Demonstrations, Trajectories
    from .engines import (
        AVRIL,
        MAP,
        NUTS,
        SVI,
        Ensemble,
        Enumeration,
        ImportanceSampling,
        Laplace,
        Posterior,
        ResponsePosterior,
        Training,
        fit,
    )
    from .errors import BayesRMError
    from .programs import GoodnessPosterior, InverseRL, LanguageFeedback, RewardModel
    from .selection import select
    from .token_beliefs import TokenBelief

__all__ = [
    "AVRIL",
    "MAP",
    "NUTS",
    "SVI",
    "BayesRMError",
    "Comparisons",
    "Conversations",
    "Corrections",
    "Demonstrations",
    "Ensemble",
    "Enumeration",
    "GoodnessPosterior",
    "ImportanceSampling",
    "InverseRL",
    "LanguageFeedback",
    "Laplace",
    "Posterior",
    "ResponsePosterior",
    "RewardBelief",
    "RewardModel",
    "TokenBelief",
    "Training",
    "Trajectories",
    "alignment",
    "backend",
    "beliefs",
    "data",
    "diagnostics",
    "dist",
    "engines",
    "errors",
    "fit",
    "likelihoods",
    "ops",
    "plate",
    "priors",
    "programs",
    "rewards",
    "sample",
    "select",
    "selection",
]

#: Where the names live that are not modules themselves.
_HOMES = {
    "backend": ("dist", "ops", "plate", "sample"),
    "beliefs": ("RewardBelief",),
    "data": ("Comparisons", "Conversations", "Corrections", "Demonstrations", "Trajectories"),
    "engines": (
        "AVRIL",
        "MAP",
        "NUTS",
        "SVI",
        "Ensemble",
        "Enumeration",
        "ImportanceSampling",
        "Laplace",
        "Posterior",
        "ResponsePosterior",
        "Training",
        "fit",
    ),
    "errors": ("BayesRMError",),
    "programs": ("GoodnessPosterior", "InverseRL", "LanguageFeedback", "RewardModel"),
    "selection": ("select",),
    "token_beliefs": ("TokenBelief",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Imported on first use, so that the command line answers `--help` without waiting for torch.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            return importlib.import_module(f".{name}", __name__)
        value = getattr(importlib.import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

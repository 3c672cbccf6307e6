"""What an inference engine is, and `fit`."""

import dataclasses
from typing import Any, Protocol, overload, runtime_checkable

from ..data import Comparisons
from ..errors import ArgumentError, DataError, EngineError
from ..programs import GoodnessPosterior, RewardModel, ScoredCandidates
from ._digest import feedback_digest
from ._gaussian_process import bound
from .enumeration import Enumeration
from .importance import ImportanceSampling
from .laplace import Laplace
from .posterior import Posterior
from .response_posterior import ResponsePosterior


@runtime_checkable
class Engine(Protocol):
    """Settings of an inference method; `fit` turns a program and data into a posterior.

    An engine that cannot serve a program says so before work starts, by an `EngineError` that names engines that can.
    """

    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> Posterior:
        """The posterior of `program` given `data`; the same seed gives the same posterior."""
        ...


@overload
def fit(
    model: GoodnessPosterior,
    data: ScoredCandidates,
    *,
    inference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> ResponsePosterior: ...


@overload
def fit(
    model: RewardModel,
    data: Comparisons,
    *,
    inference: Engine | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Posterior: ...


def fit(
    model: RewardModel | GoodnessPosterior,
    data: Comparisons | ScoredCandidates,
    *,
    inference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Posterior | ResponsePosterior:
    """The posterior of a declared model given data.

    Args:
        model: The program: a `RewardModel`, or a `GoodnessPosterior` over responses.
        data: What it explains: feedback, or candidates of each prompt.
        inference: The engine, by default `Laplace()`, and `ImportanceSampling()` for responses that were drawn; or the
            name of one with its default settings, see `engines.available`.
        seed: Seed of everything random in the fit. No global random state is touched.
        progress: Whether to show progress.

    Raises:
        ArgumentError: The model or the engine is of the wrong type.
        DataError: The data are of a type the model does not explain, or empty.
        LikelihoodError: The likelihood does not fit the feedback.
        EngineError: The engine cannot serve the program.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> round(fit(model, data).report.log_evidence, 2)
        -2.43
    """
    if not isinstance(model, RewardModel | GoodnessPosterior):
        raise ArgumentError(f"`model` is a {type(model).__name__}; it must be a program such as RewardModel")
    if isinstance(inference, str):
        from .registry import make

        inference = make(inference)
    if inference is None:
        inference = Laplace() if isinstance(model, RewardModel) else _engine_for_responses(data)
    engine: Any = inference
    if isinstance(engine, type) or not isinstance(engine, Engine):
        hint = "; call it to make settings, for instance Laplace()" if isinstance(engine, type) else ""
        raise ArgumentError(f"`inference` is {engine!r}, not an engine with a `fit` method{hint}")
    if not isinstance(data, model.data_type):
        hint = "; read it with Comparisons.load(...)" if isinstance(data, list | str) else ""
        raise DataError(
            f"`data` is a {type(data).__name__}; {type(model).__name__} explains {model.data_type.__name__}{hint}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"`seed` is {seed!r}; it is a non-negative integer")
    if isinstance(model, GoodnessPosterior):
        if not isinstance(engine, ImportanceSampling | Enumeration):
            raise EngineError(
                f"{type(engine).__name__} cannot serve a posterior over responses; use ImportanceSampling() for "
                "candidates that were drawn, Enumeration() for all there are"
            )
        assert isinstance(data, ScoredCandidates)
        return engine.fit(model, data, seed=seed, progress=progress)
    assert isinstance(data, Comparisons)
    if len(data) == 0:
        raise DataError("the data hold no rows of feedback")
    program, encoded = bound(model, data, engine, seed=seed, progress=progress)
    posterior: Posterior = engine.fit(program, encoded, seed=seed, progress=progress)
    # The posterior of selected rows is not that of the data: importance ratios towards all rows would be wrong.
    unselected = (posterior.report.training or {}).get("unselected")
    digest = None if unselected else feedback_digest(data)
    posterior.report = dataclasses.replace(posterior.report, data_digest=digest)
    return posterior


def _engine_for_responses(data: Any) -> Any:
    return Enumeration() if isinstance(data, ScoredCandidates) and data.exhaustive else ImportanceSampling()

"""What an inference engine is, and `fit`."""

import dataclasses
from typing import Any, Protocol, overload, runtime_checkable

from ..data import Comparisons, Corrections, Demonstrations, Trajectories
from ..errors import ArgumentError, DataError, EngineError
from ..programs import GoodnessPosterior, InverseRL, LanguageFeedback, RewardModel, ScoredCandidates
from ._digest import feedback_digest
from ._gaussian_process import bound
from .avril import AVRIL
from .enumeration import Enumeration
from .importance import ImportanceSampling
from .laplace import Laplace
from .map import MAP
from .nuts import NUTS
from .posterior import Posterior
from .response_posterior import ResponsePosterior
from .trajectory_posterior import TrajectoryPosterior


@runtime_checkable
class Engine(Protocol):
    """Settings of an inference method; `fit` turns a program and data into a posterior.

    An engine that cannot serve a program says so before work starts, by an `EngineError` that names engines that can.
    Its class may have an attribute `programs`, the types of programs that it serves; by default reward models alone.
    """

    def fit(self, program: Any, data: Any, *, seed: int, progress: bool) -> Any:
        """The posterior of `program` given `data`; the same seed gives the same posterior."""
        ...


@runtime_checkable
class Program(Protocol):
    """A declared probabilistic program: what `fit` takes.

    Type checkers take any object with a `data_type`; `fit` looks at the engine's `programs` too.
    """

    @property
    def data_type(self) -> Any:
        """Type of data that the program explains, or several in a tuple."""
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
    model: InverseRL,
    data: Trajectories,
    *,
    inference: Engine | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TrajectoryPosterior: ...


@overload
def fit(
    model: RewardModel | InverseRL | LanguageFeedback,
    data: Comparisons | Corrections | Demonstrations,
    *,
    inference: Engine | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Posterior: ...


def fit(
    model: Program,
    data: Comparisons | Corrections | Demonstrations | Trajectories | ScoredCandidates,
    *,
    inference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """The posterior of a declared model given data.

    Args:
        model: The program: a `RewardModel`, `InverseRL`, `LanguageFeedback`, or a `GoodnessPosterior` over responses.
        data: What it explains: feedback, demonstrations, trajectories, or candidates of each prompt.
        inference: The engine, by default `Laplace()` for reward models, `AVRIL()` for `InverseRL` (of text with a
            `constraint_weight` of 0.1), `MAP()` for `LanguageFeedback` and `ImportanceSampling()` for responses that
            were drawn; or the name of one with its default settings, see `engines.available`.
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
    if isinstance(model, type) or not isinstance(model, Program):
        raise ArgumentError(f"`model` is {_kind(model)}; it must be a program such as RewardModel")
    if isinstance(inference, str):
        from .registry import make

        inference = make(inference)
    if inference is None:
        inference = _default_engine(model, data)
    engine: Any = inference
    if isinstance(engine, type) or not isinstance(engine, Engine):
        hint = "; call it to make settings, for instance Laplace()" if isinstance(engine, type) else ""
        raise ArgumentError(f"`inference` is {engine!r}, not an engine with a `fit` method{hint}")
    accepted = model.data_type if isinstance(model.data_type, tuple) else (model.data_type,)
    if not isinstance(data, accepted):
        hint = "; read it with Comparisons.load(...)" if isinstance(data, list | str) else ""
        names = " or ".join(kind.__name__ for kind in accepted)
        raise DataError(f"`data` is {_kind(data)}; {type(model).__name__} explains {names}{hint}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"`seed` is {seed!r}; it is a non-negative integer")
    if not isinstance(model, programs_of(engine)):
        raise EngineError(f"{type(engine).__name__} cannot serve {_kind(model)}; use {_engines_for(model)}")
    if isinstance(model, GoodnessPosterior):
        responses: ResponsePosterior = engine.fit(model, data, seed=seed, progress=progress)
        return responses
    if len(data) == 0:
        raise DataError("the data hold no rows")
    if not isinstance(model, RewardModel):
        return engine.fit(model, data, seed=seed, progress=progress)
    assert isinstance(data, Comparisons)
    program, encoded = bound(model, data, engine, seed=seed, progress=progress)
    posterior: Posterior = engine.fit(program, encoded, seed=seed, progress=progress)
    # The posterior of selected rows is not that of the data: importance ratios towards all rows would be wrong.
    unselected = (posterior.report.training or {}).get("unselected")
    digest = None if unselected else feedback_digest(data)
    posterior.report = dataclasses.replace(posterior.report, data_digest=digest)
    return posterior


def programs_of(engine: Engine | type) -> tuple[type, ...]:
    """Types of programs that an engine (or its class) serves: its attribute `programs`, reward models by default."""
    return tuple(getattr(engine, "programs", (RewardModel,)))


def _default_engine(model: Any, data: Any) -> Engine:
    if isinstance(model, GoodnessPosterior):
        exhaustive = isinstance(data, ScoredCandidates) and data.exhaustive
        return Enumeration() if exhaustive else ImportanceSampling()
    if isinstance(model, InverseRL):
        # On text, the published weight leaves the posterior without entropy.
        return AVRIL() if isinstance(data, Trajectories) else AVRIL(constraint_weight=0.1)
    for engine in (Laplace, MAP):
        if isinstance(model, programs_of(engine)):
            return engine()
    raise ArgumentError(f"`inference` is missing, and no engine of this package serves {type(model).__name__}")


def _engines_for(model: Any) -> str:
    """Calls of the built-in engines that serve a program."""
    from .registry import BUILT_IN, available

    ours = [registered.load() for registered in available() if registered.distribution == BUILT_IN]
    if isinstance(model, InverseRL) and not model.has_dynamics:
        ours = [e for e in ours if e is not NUTS]
    return ", ".join(f"{e.__name__}()" for e in ours if isinstance(model, programs_of(e)))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"

"""Restricts Gaussian-process rewards to the training items before an engine starts, the lengthscale tuned if asked."""

import dataclasses
import math
import warnings

import numpy as np
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..data import Comparisons
from ..errors import ConvergenceWarning, DataError, EngineError
from ..programs import RewardModel
from ..rewards import PairwiseHead, PairwisePreference
from ..rewards.gaussian_process import TUNED, GaussianProcess, KernelHead
from ._density import FeedbackDensity
from ._pairwise import bound_pairs
from .laplace import Laplace

_GIB = 2**30
#: Log lengthscales are searched this far from that of the median distance.
_REACH = 4.0
#: Log precisions are searched this far from the declared one.
_AMPLITUDE_REACH = 8.0


def bound(
    program: RewardModel, data: Comparisons, engine: object, *, seed: int, progress: bool
) -> tuple[RewardModel, Comparisons]:
    """The program as a linear model on the training items, and the data with its features; others as they are.

    Args:
        program: Any program.
        data: The feedback.
        engine: Its `memory_gib` and `prior_precision` count, where it has them.
        seed: Seed of the fits that tune the lengthscale.
        progress: Whether to show progress.

    Raises:
        DataError: No row counts, or a feature is not finite.
        EngineError: The covariance of the items does not fit into memory, or a process that was restricted to other
            items is fitted again.
        LikelihoodError: The likelihood does not fit the feedback.
    """
    reward = program.reward
    if isinstance(reward, PairwisePreference | PairwiseHead):
        return bound_pairs(program, data, progress=progress)
    if not isinstance(reward, GaussianProcess | KernelHead):
        return program, data
    groups = data.groups()
    counted = [g.items[g.weight > 0].reshape(-1) for g in groups]
    if not sum(map(len, counted)):
        raise DataError("every row has weight 0; there is no feedback to learn from")
    used = torch.unique(torch.cat(counted))
    if isinstance(reward, KernelHead):
        _check_items(reward, data, used)
        return program, data
    _check_memory(len(used), getattr(engine, "memory_gib", 8.0))
    # Refuses feedback that the likelihood does not fit before the long work of encoding texts.
    FeedbackDensity(program, groups)
    data = data.with_features(np.asarray(program.encode(data, progress=progress)))
    features = torch.as_tensor(np.asarray(data.features)).double()
    center, spread = program.standardisation(features, groups)
    if reward.lengthscale == TUNED:
        return _tuned(program, data, engine, features[used], center, spread, seed=seed, progress=progress), data
    head = reward.bind(features[used], center, spread)
    return dataclasses.replace(program, reward=head), data


def _check_items(head: KernelHead, data: Comparisons, used: Tensor) -> None:
    strange = int(head.left_open(data)[used].sum())
    if strange:
        raise EngineError(
            f"this process was restricted to the items of another fit, and {strange} of these {len(used)} items are "
            "not among them; fit the declared process, `program.reward.process`"
        )


def _check_memory(items: int, memory_gib: float) -> None:
    # The covariance, the copy that is factorised, the factor, and the features phi of the items.
    needed = 4.0 * 8.0 * items**2
    if needed > memory_gib * _GIB:
        raise EngineError(
            f"a Gaussian process on {items} items needs about {needed / _GIB:.2g} GiB for their covariances, above "
            f"`memory_gib={memory_gib}`; use fewer items, raise `memory_gib`, or use a Linear or MLP reward"
        )


def _tuned(
    program: RewardModel,
    data: Comparisons,
    engine: object,
    features: Tensor,
    center: Tensor,
    spread: Tensor,
    *,
    seed: int,
    progress: bool,
) -> RewardModel:
    """The program at the lengthscale with the largest evidence (Laplace), the amplitude tuned with it if asked.

    Rasmussen and Williams, "Gaussian processes for machine learning" (2006), section 5.5.
    """
    from scipy.optimize import minimize

    process = program.reward
    assert isinstance(process, GaussianProcess)
    median = dataclasses.replace(process, lengthscale=None).bind(features, center, spread).lengthscale
    # An engine that corrects another leaves the prior to that one.
    inner = getattr(engine, "proposal", engine)
    laplace = Laplace(memory_gib=getattr(inner, "memory_gib", 8.0))
    amplitude = getattr(inner, "prior_precision", "given") == "marginal_likelihood"

    def at(point: np.ndarray) -> RewardModel:
        head = process.bind(features, center, spread, lengthscale=median * math.exp(point[0]))
        prior = program.prior.scaled(math.exp(point[1])) if amplitude else program.prior
        return dataclasses.replace(program, reward=head, prior=prior)

    with tqdm(desc="lengthscale", unit="fit", disable=not progress) as bar:

        def negative(point: np.ndarray) -> float:
            bar.update()
            found = laplace.fit(at(point), data, seed=seed, progress=False).report.log_evidence
            assert found is not None
            return -found

        bounds = [(-_REACH, _REACH)] + [(-_AMPLITUDE_REACH, _AMPLITUDE_REACH)] * amplitude
        start = np.zeros(len(bounds))
        simplex = np.concatenate([start[None], start + 0.8 * np.eye(len(start))])
        result = minimize(
            negative, start, method="Nelder-Mead", bounds=bounds,
            options={"initial_simplex": simplex, "xatol": 1e-2, "fatol": 1e-2, "maxfev": 200},
        )  # fmt: skip
    if abs(result.x[0]) > _REACH - 0.1:
        end = "shorter" if result.x[0] < 0 else "longer"
        warnings.warn(
            f"the marginal likelihood still grows as the lengthscale gets {end}; stopped at e^{result.x[0]:+.0f} times "
            "the median distance of the items",
            ConvergenceWarning,
            stacklevel=4,
        )
    return at(result.x)

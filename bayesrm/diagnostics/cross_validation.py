"""Cross-validation over prompts: how well does an engine predict feedback on prompts that its fit has not seen?"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from .._typing import Tensor
from ..data import Comparisons
from ..engines import FitReport, fit
from ..engines._digest import feedback_digest
from ..engines._settings import check_positive
from ..engines.prediction import FeedbackPrediction, GroupPrediction
from ..errors import ArgumentError
from ..programs import RewardModel
from ..rewards import FeatureExtractor
from .loo import LeaveOut


@dataclasses.dataclass(frozen=True, eq=False)
class CrossValidation:
    """Feedback on every prompt, predicted by a fit to the prompts of the other folds.

    Attributes:
        elpd: Sum of `pointwise`, in nats.
        se: Its standard error over prompts, sqrt(n var(pointwise)), with n - 1 in the variance.
        pointwise: For each prompt the sum of its rows' log predictive probabilities, rows weighted, shape `(n,)`.
        units: Which prompts they are, as the data number them, shape `(n,)`.
        weight: Summed weight of the rows of each, shape `(n,)`.
        by: What is left out, prompts.
        prediction: The held-out predictions of all rows, for `score`, `check_calibration` and the like.
        fold: Fold of each row, shape `(rows,)`.
        reports: Report of each fold's fit, with the prior precision that it tuned for instance.
        data_digest: Digest of the feedback.
    """

    elpd: float
    se: float
    pointwise: Float[Tensor, " n"]
    units: NDArray[np.int64]
    weight: Float[Tensor, " n"]
    by: LeaveOut
    prediction: FeedbackPrediction
    fold: Int64[np.ndarray, " rows"]
    reports: tuple[FitReport, ...]
    data_digest: str

    def __str__(self) -> str:
        return (
            f"elpd {self.elpd:.1f} +- {self.se:.1f} over {len(self.units)} prompts in {len(self.reports)} folds, "
            f"{self.prediction.nll:.4f} nats a row"
        )


def cross_validate(
    program: RewardModel,
    data: Comparisons,
    *,
    inference: Any = None,
    num_folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> CrossValidation:
    """Fits the program once a fold and predicts the prompts of that fold, which the fit has not seen.

    It asks what a user of the fitted posterior gets, so that it compares engines, priors and heads; `loo` is about
    the exact posterior of a model and needs no refits but fails when a prompt moves the posterior far (many features
    for the rows). Each row is predicted on its own; `loo` scores all rows about a prompt jointly.

    A prior precision by cross-validation, where features outnumber rows and the marginal likelihood shrinks too much::

        models = {p: dataclasses.replace(model, prior=brm.priors.Gaussian(p)) for p in (10.0, 100.0, 1000.0)}
        results = {f"{p:g}": cross_validate(m, data) for p, m in models.items()}
        print(diagnostics.compare(results))

    Args:
        program: The program.
        data: The feedback. Its texts are encoded once where the reward has a feature extractor.
        inference: The engine, as in `bayesrm.fit`; a prior precision that it tunes is tuned in every fold anew.
        num_folds: Number of folds, at most as many as there are prompts. The same seed gives the same folds.
        seed: Seed of the folds and of every fit.
        progress: Show progress of the fits.

    Raises:
        ArgumentError: An argument is of no use; there are fewer prompts that count than folds, or fewer than two folds.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> pairs = np.arange(40).reshape(20, 2)
        >>> data = brm.Comparisons.from_arrays(rng.normal(size=(40, 2)), candidates=pairs, outcome=[0, 1] * 10)
        >>> result = cross_validate(brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry()), data)
        >>> len(result.pointwise), len(result.reports), result.elpd < 0
        (20, 5, True)
    """
    if not isinstance(program, RewardModel) or not isinstance(data, Comparisons):
        raise ArgumentError(
            f"`program` and `data` are of types {type(program).__name__} and {type(data).__name__}; give a RewardModel "
            "and Comparisons"
        )
    check_positive("num_folds", num_folds)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"`seed` is {seed!r}; it is a whole number from 0")
    prompt, weight_of_row = np.asarray(data.prompt_of_row), np.zeros(len(data))
    for group in data.groups():
        weight_of_row[group.rows.numpy()] = group.weight.numpy()
    counted = weight_of_row > 0
    prompts = np.unique(prompt[counted])
    if len(prompts) < 2:
        raise ArgumentError(f"the rows that count are about {len(prompts)} prompt; leaving some out needs at least 2")
    if not 2 <= num_folds <= len(prompts):
        raise ArgumentError(
            f"`num_folds` is {num_folds}; with feedback on {len(prompts)} prompts it lies between 2 and {len(prompts)}"
        )
    extractor = getattr(program.reward, "features", None)
    digest = feedback_digest(data)
    if isinstance(extractor, FeatureExtractor) and data.features is None:
        data = data.with_features(extractor.extract_items(data, progress=progress))
    # Prompts whose rows all have weight 0 are predicted with the first fold, and count nowhere.
    fold_of_prompt = np.zeros(data.num_prompts, dtype=np.int64)
    fold_of_prompt[prompts] = np.random.default_rng(seed).permutation(len(prompts)) % num_folds
    fold = fold_of_prompt[prompt]
    parts, reports = [], []
    for k in range(num_folds):
        posterior = fit(program, data.select(fold != k), inference=inference, seed=seed, progress=progress)
        parts.append(posterior.predict_feedback(data.select(fold == k)))
        reports.append(posterior.report)
    prediction = _in_place(parts, [np.flatnonzero(fold == k) for k in range(num_folds)])
    units, place = np.unique(prompt[counted], return_inverse=True)
    summed = torch.zeros(2, len(units), dtype=torch.float64)
    rows = torch.stack([prediction.weight * prediction.log_prob, prediction.weight])
    summed.index_add_(1, torch.from_numpy(place), rows[:, torch.from_numpy(counted)].double())
    pointwise, weight = summed
    return CrossValidation(
        elpd=float(pointwise.sum()),
        se=math.sqrt(len(units) * float(pointwise.var())),
        pointwise=pointwise,
        units=units,
        weight=weight,
        by=LeaveOut.PROMPT,
        prediction=prediction,
        fold=fold,
        reports=tuple(reports),
        data_digest=digest,
    )


def _in_place(parts: Sequence[FeedbackPrediction], rows: Sequence[NDArray[np.int64]]) -> FeedbackPrediction:
    """One prediction of all rows, from predictions of the given rows each."""
    total = sum(len(index) for index in rows)
    log_prob, weight = parts[0].log_prob.new_empty(total), parts[0].weight.new_empty(total)
    groups: list[GroupPrediction] = []
    for part, index in zip(parts, rows, strict=True):
        where = torch.from_numpy(index)
        log_prob[where], weight[where] = part.log_prob, part.weight
        groups += [dataclasses.replace(group, rows=where[group.rows]) for group in part.groups]
    return FeedbackPrediction(log_prob, tuple(groups), weight)

"""How well the actions of demonstrations, and preferences between trajectories, were predicted."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import Trajectories
from ..engines import FeedbackPrediction, TrajectoryPosterior
from .bootstrap import Estimate, bootstrap


def action_probabilities(posterior: TrajectoryPosterior, data: Trajectories) -> NDArray[np.float64]:
    """Probability of each action at each step, shape `(M, A)`."""
    distinct, places = np.unique(data.states, axis=0, return_inverse=True)
    found: NDArray[np.float64] = posterior.policy(distinct).double().numpy()[places.reshape(-1)]
    return found


def log_probabilities(posterior: TrajectoryPosterior, data: Trajectories) -> NDArray[np.float64]:
    """Log probability of the action of each step, shape `(M,)`; minus infinity where it has no probability left."""
    chosen = action_probabilities(posterior, data)[np.arange(len(data.actions)), data.actions]
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.log(chosen)
    return found


def action_scores(posterior: TrajectoryPosterior, data: Trajectories, *, seed: int = 0) -> dict[str, Estimate]:
    """Accuracy and negative log likelihood of the actions of demonstrations, in nats a step.

    Each step counts the same; intervals are over what is independent of each other, see `Trajectories.clusters`, and
    NaN where that is one thing alone. Empty without demonstrations.
    """
    steps = np.flatnonzero(data.demonstrated[data.owners])
    if not len(steps):
        return {}
    probs, taken = action_probabilities(posterior, data)[steps], data.actions[steps]
    losses = -log_probabilities(posterior, data)[steps]
    likeliest = probs >= probs.max(1, keepdims=True) - 1e-12
    # A tie is right by the share of the action that was taken.
    right = likeliest[np.arange(len(steps)), taken] / likeliest.sum(1)
    clusters = data.clusters[data.owners[steps]]

    def estimate(values: NDArray[np.float64]) -> Estimate:
        if len(np.unique(clusters)) < 2:
            return Estimate(float(values.mean()), np.nan, np.nan)
        return bootstrap(lambda rows: float(values[rows].mean()), clusters, seed=seed)

    return {"accuracy": estimate(right), "nll": estimate(losses)}


def without_ties(prediction: FeedbackPrediction) -> FeedbackPrediction:
    """The same with weight 0 where both are equally likely for certain: of trajectories that visit the same states.

    Whether the likelier one was preferred is no question there; by the order of the data it would always be the first.
    """
    return dataclasses.replace(prediction, weight=torch.where(prediction.correct == 0.5, 0.0, prediction.weight))

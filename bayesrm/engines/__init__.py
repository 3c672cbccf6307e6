"""Inference engines: each turns a declared program and data into a posterior."""

from ._curvature import CurvatureKind
from ._gaussian_fit import PriorPrecision
from ._tangent import Coordinates
from .base import Engine, fit
from .gaussian_posterior import GaussianPosterior
from .laplace import Laplace, PrecisionGroups, Structure
from .map import MAP
from .posterior import Posterior
from .prediction import FeedbackPrediction, GroupPrediction
from .report import FitReport
from .training import Training, TrainingReport
from .training_settings import training_settings

__all__ = [
    "MAP",
    "Coordinates",
    "CurvatureKind",
    "Engine",
    "FeedbackPrediction",
    "FitReport",
    "GaussianPosterior",
    "GroupPrediction",
    "Laplace",
    "Posterior",
    "PrecisionGroups",
    "PriorPrecision",
    "Structure",
    "Training",
    "TrainingReport",
    "fit",
    "training_settings",
]

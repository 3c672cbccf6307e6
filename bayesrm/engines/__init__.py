"""Inference engines: each turns a declared program and data into a posterior."""

from ._curvature import CurvatureKind
from ._gaussian_fit import PriorPrecision
from ._tangent import Coordinates
from .base import Engine, fit
from .gaussian_posterior import GaussianPosterior
from .laplace import Laplace, Structure
from .map import MAP
from .posterior import FitReport, Posterior
from .prediction import FeedbackPrediction, GroupPrediction

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
    "PriorPrecision",
    "Structure",
    "fit",
]

"""Inference engines: each turns a declared program and data into a posterior."""

from ._curvature import CurvatureKind
from ._density import FeedbackDensity
from ._gaussian_fit import PriorPrecision
from ._schema import FeedbackSchema
from ._tangent import Coordinates
from .avril import AVRIL, NextValue
from .base import Engine, Program, fit
from .draws import JointDraws
from .draws_posterior import DrawsPosterior
from .ensemble import Ensemble, Randomisation
from .enumeration import Enumeration
from .gaussian_posterior import GaussianPosterior
from .importance import ImportanceSampling
from .laplace import Laplace, PrecisionGroups, Structure
from .map import MAP
from .network_posterior import NetworkDraws, NetworkPosterior
from .nuts import NUTS, ChainMethod, MassMatrix, SamplerBackend
from .posterior import Posterior
from .prediction import FeedbackPrediction, GroupPrediction
from .registry import RegisteredEngine, available, load
from .report import FitReport
from .response_posterior import ResponsePosterior, Target, response_posterior
from .sample_selection import SampleSelection, SelectedSamples, select_samples
from .svi import SVI, GuideFamily
from .token_posterior import TokenPosterior
from .training import Training, TrainingReport
from .training_settings import training_settings
from .trajectory_posterior import TrajectoryPosterior

__all__ = [
    "AVRIL",
    "MAP",
    "NUTS",
    "SVI",
    "ChainMethod",
    "Coordinates",
    "CurvatureKind",
    "DrawsPosterior",
    "Engine",
    "Ensemble",
    "Enumeration",
    "FeedbackDensity",
    "FeedbackPrediction",
    "FeedbackSchema",
    "FitReport",
    "GaussianPosterior",
    "GroupPrediction",
    "GuideFamily",
    "ImportanceSampling",
    "JointDraws",
    "Laplace",
    "MassMatrix",
    "NetworkDraws",
    "NetworkPosterior",
    "NextValue",
    "Posterior",
    "PrecisionGroups",
    "PriorPrecision",
    "Program",
    "Randomisation",
    "RegisteredEngine",
    "ResponsePosterior",
    "SampleSelection",
    "SamplerBackend",
    "SelectedSamples",
    "Structure",
    "Target",
    "TokenPosterior",
    "Training",
    "TrainingReport",
    "TrajectoryPosterior",
    "available",
    "fit",
    "load",
    "response_posterior",
    "select_samples",
    "training_settings",
]

"""Inference engines: each turns a declared program and data into a posterior."""

from ._curvature import CurvatureKind
from ._density import FeedbackDensity
from ._gaussian_fit import PriorPrecision
from ._schema import FeedbackSchema
from ._tangent import Coordinates
from .base import Engine, fit
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
from .training import Training, TrainingReport
from .training_settings import training_settings

__all__ = [
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
    "Posterior",
    "PrecisionGroups",
    "PriorPrecision",
    "Randomisation",
    "RegisteredEngine",
    "ResponsePosterior",
    "SampleSelection",
    "SamplerBackend",
    "SelectedSamples",
    "Structure",
    "Target",
    "Training",
    "TrainingReport",
    "available",
    "fit",
    "load",
    "response_posterior",
    "select_samples",
    "training_settings",
]

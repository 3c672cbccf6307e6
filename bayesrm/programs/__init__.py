"""The probabilistic programs."""

from ._rewrites import Rewrites
from .candidates import ScoredCandidates
from .goodness import ExponentialTilt, Goodness, LogisticGoodness
from .goodness_posterior import GoodnessPosterior
from .inverse_rl import InverseRL, Steps
from .language_feedback import LanguageFeedback
from .reward_model import RewardModel, Simulation
from .tabular_mdp import TabularMDP

__all__ = [
    "ExponentialTilt",
    "Goodness",
    "GoodnessPosterior",
    "InverseRL",
    "LanguageFeedback",
    "LogisticGoodness",
    "RewardModel",
    "Rewrites",
    "ScoredCandidates",
    "Simulation",
    "Steps",
    "TabularMDP",
]

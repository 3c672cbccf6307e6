"""The probabilistic programs."""

from .candidates import ScoredCandidates
from .goodness import ExponentialTilt, Goodness, LogisticGoodness
from .goodness_posterior import GoodnessPosterior
from .reward_model import RewardModel, Simulation

__all__ = [
    "ExponentialTilt",
    "Goodness",
    "GoodnessPosterior",
    "LogisticGoodness",
    "RewardModel",
    "ScoredCandidates",
    "Simulation",
]

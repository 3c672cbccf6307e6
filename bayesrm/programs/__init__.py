"""The probabilistic programs."""

from .reward_model import RewardModel, Simulation

__all__ = ["RewardModel", "Simulation"]

"""Alignment as inference: targets over responses, projections that move a policy towards them, and trainers.

A `Method` is a target, a projection onto it and a proposal; `align` runs its rounds on a language model.
"""

from ..rewards._token_log_probs import TokenLogProbs
from ..rewards._tokens import TokenSequences
from . import games, multi_turn, projections, rollouts, targets, utilities
from ._align import align
from ._generation import GeneratedResponse
from ._policy_lora import PolicyLoRA
from ._report import AlignmentReport
from ._scoring import Preferences, Reward
from ._token_rewards import PredictsTokens
from ._weights import Snapshot
from .method import Method
from .monitor import Budget, RoundReport
from .named import available_methods, load_method
from .policy import Policy
from .turn_reward import TurnReward

__all__ = [
    "AlignmentReport",
    "Budget",
    "GeneratedResponse",
    "Method",
    "Policy",
    "PolicyLoRA",
    "PredictsTokens",
    "Preferences",
    "Reward",
    "RoundReport",
    "Snapshot",
    "TokenLogProbs",
    "TokenSequences",
    "TurnReward",
    "align",
    "available_methods",
    "games",
    "load_method",
    "multi_turn",
    "projections",
    "rollouts",
    "targets",
    "utilities",
]

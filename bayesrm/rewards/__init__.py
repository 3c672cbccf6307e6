"""Reward functions: heads on frozen features, and the extractor that makes features of texts."""

from ._corrector_scores import ScoreRule, Scoring
from ._kernels import Kernel
from ._preference_belief import PreferenceBelief
from ._projected import ProjectedHead
from .corrector import Corrector
from .corrector_network import CorrectorNetwork
from .corrector_scorer import CorrectorScorer
from .features import FeatureExtractor, Pooling, TextInput
from .gaussian_process import GaussianProcess, KernelHead
from .heads import Head
from .jacobians import per_sample_jacobian
from .linear import Linear
from .lora import LoRA
from .lora_network import LoRANetwork
from .mlp import MLP, Activation
from .pairwise_preference import PairwiseHead, PairwisePreference
from .state_reward import StateReward
from .tangent import Tangent, TangentFeatures
from .text_head import text_head
from .token_head import TokenRewardHead, TokenScorer, TokenScores
from .token_reward import StateValues, TokenReward
from .token_reward_network import TokenRewardNetwork, TokenSteps

__all__ = [
    "MLP",
    "Activation",
    "Corrector",
    "CorrectorNetwork",
    "CorrectorScorer",
    "FeatureExtractor",
    "GaussianProcess",
    "Head",
    "Kernel",
    "KernelHead",
    "Linear",
    "LoRA",
    "LoRANetwork",
    "PairwiseHead",
    "PairwisePreference",
    "Pooling",
    "PreferenceBelief",
    "ProjectedHead",
    "ScoreRule",
    "Scoring",
    "StateReward",
    "StateValues",
    "Tangent",
    "TangentFeatures",
    "TextInput",
    "TokenReward",
    "TokenRewardHead",
    "TokenRewardNetwork",
    "TokenScorer",
    "TokenScores",
    "TokenSteps",
    "per_sample_jacobian",
    "text_head",
]

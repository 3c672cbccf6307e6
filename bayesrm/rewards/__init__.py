"""Reward functions: heads on frozen features, and the extractor that makes features of texts."""

from ._kernels import Kernel
from ._preference_belief import PreferenceBelief
from ._projected import ProjectedHead
from .features import FeatureExtractor, Pooling, TextInput
from .gaussian_process import GaussianProcess, KernelHead
from .heads import Head
from .jacobians import per_sample_jacobian
from .linear import Linear
from .lora import LoRA
from .lora_network import LoRANetwork
from .mlp import MLP, Activation
from .pairwise_preference import PairwiseHead, PairwisePreference
from .tangent import Tangent, TangentFeatures
from .text_head import text_head

__all__ = [
    "MLP",
    "Activation",
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
    "Tangent",
    "TangentFeatures",
    "TextInput",
    "per_sample_jacobian",
    "text_head",
]

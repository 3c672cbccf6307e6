"""Reward functions: heads on frozen features, and the extractor that makes features of texts."""

from .features import FeatureExtractor, Pooling, TextInput
from .heads import Head
from .linear import Linear
from .mlp import MLP, Activation
from .text_head import text_head

__all__ = ["MLP", "Activation", "FeatureExtractor", "Head", "Linear", "Pooling", "TextInput", "text_head"]

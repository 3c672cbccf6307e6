"""Projections: losses that move a policy towards a target distribution.

A projection is called with the policy's log-probabilities of the candidates, shape `(B, n)`, which require gradients,
and the `ResponsePosterior` of the target on the same candidates; it returns a loss for each prompt, shape `(B,)`, whose
gradient is to be descended. `PathConsistency` and `TokenPolicyGradient` take those of tokens instead. None needs a
language model.
"""

from ._pairs import Pairs
from ._projection import Projection
from .best_and_worst import BestAndWorst
from .distributional_policy_gradient import DistributionalPolicyGradient
from .forward_kl import ForwardKL
from .jeffreys import Jeffreys, MovingAnchorJeffreys
from .linear_listwise import LinearListwise
from .listwise_cross_entropy import ListwiseCrossEntropy
from .noise_contrastive import NoiseContrastive
from .pairwise_logistic import Labels, PairwiseLogistic
from .path_consistency import PathConsistency, TokenPaths
from .policy_gradient import PolicyGradient
from .reverse_kl import ReverseKL
from .squared_log_ratio import Margin, SquaredLogRatio
from .token_policy_gradient import Baseline, RewardedTokens, TokenPolicyGradient

__all__ = [
    "Baseline",
    "BestAndWorst",
    "DistributionalPolicyGradient",
    "ForwardKL",
    "Jeffreys",
    "Labels",
    "LinearListwise",
    "ListwiseCrossEntropy",
    "Margin",
    "MovingAnchorJeffreys",
    "NoiseContrastive",
    "Pairs",
    "PairwiseLogistic",
    "PathConsistency",
    "PolicyGradient",
    "Projection",
    "ReverseKL",
    "RewardedTokens",
    "SquaredLogRatio",
    "TokenPaths",
    "TokenPolicyGradient",
]

"""Preference likelihoods: from the rewards of the candidates of one comparison to a distribution over the feedback.

| feedback | likelihoods |
|---|---|
| choice between two | `BradleyTerry`, `Thurstone`; with ties `Davidson`, `RaoKupper` |
| choice among many, ranking | `PlackettLuce` |
| rating | `Ordinal` |
| approval | `Approval` |
| any, as wrappers | `LabelNoise`, `RaterReliability`, `LengthBias` |

A likelihood of your own is a function of the rewards and a `Comparison`, see `Likelihood`.
"""

from .approval import Approval
from .base import Likelihood, outcome, register
from .bradley_terry import BradleyTerry
from .davidson import Davidson
from .label_noise import LabelNoise
from .length_bias import LengthBias
from .ordinal import Ordinal
from .plackett_luce import PlackettLuce
from .rao_kupper import RaoKupper
from .rater_reliability import RaterReliability
from .thurstone import Thurstone

__all__ = [
    "Approval",
    "BradleyTerry",
    "Davidson",
    "LabelNoise",
    "LengthBias",
    "Likelihood",
    "Ordinal",
    "PlackettLuce",
    "RaoKupper",
    "RaterReliability",
    "Thurstone",
    "outcome",
    "register",
]

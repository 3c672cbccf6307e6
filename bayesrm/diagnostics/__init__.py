"""Is the posterior calibrated, and where does it guess? Functions of arrays and predictions; intervals over prompts."""

from .bootstrap import Estimate, bootstrap
from .calibration import Reliability, Scores, brier_score, reliability, score, top_label
from .ood import auroc, ood_auroc

__all__ = [
    "Estimate",
    "Reliability",
    "Scores",
    "auroc",
    "bootstrap",
    "brier_score",
    "ood_auroc",
    "reliability",
    "score",
    "top_label",
]

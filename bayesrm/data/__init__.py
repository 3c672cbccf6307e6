"""Feedback data: comparisons of responses and their siblings, readers for the field's formats, and rendering."""

from .comparisons import Comparisons
from .conversations import Conversations
from .corrections import Corrections
from .demonstrations import Demonstrations
from .examples import QualityPrompt, load_quality_rankings, quality_comparisons
from .groups import Comparison, FeedbackGroup
from .rendering import Shortened, render, shorten
from .trajectories import Trajectories

__all__ = [
    "Comparison",
    "Comparisons",
    "Conversations",
    "Corrections",
    "Demonstrations",
    "FeedbackGroup",
    "QualityPrompt",
    "Shortened",
    "Trajectories",
    "load_quality_rankings",
    "quality_comparisons",
    "render",
    "shorten",
]

"""Is the posterior right, calibrated, and where does it guess? Functions of arrays and predictions, figures on top.

Intervals are over prompts: rows of one prompt are not independent.
"""

from ..engines.psis import PSIS, k_hat_threshold, pareto_smooth
from ._best_of_n_result import BestOfNCurve, CurveDifference
from ._label_raters import RaterAudit
from ._plot_over_optimisation import plot_over_optimisation
from ._report import report
from ._rewardbench import (
    RewardBench,
    RewardBenchComparison,
    RewardBenchResult,
    RewardBenchSection,
    RiskCoverage,
    SubsetDifference,
    SubsetScore,
    compare_rewardbench,
    compare_rewardbench_models,
    evaluate_rewardbench,
    rewardbench_scores,
    risk_coverage,
)
from ._subset_curve import subset_curve
from .bootstrap import Estimate, bootstrap
from .brier import BrierDecomposition, brier_decomposition, brier_score
from .calibration import CalibrationCheck, check_calibration
from .convergence import Convergence, convergence, of_chains
from .coverage import Coverage, coverage
from .credit import Credit, credit, credit_html, credit_table, save_credit_html
from .cross_validation import CrossValidation, cross_validate
from .events import Events, predicted_events, randomised_pit, top_label
from .feedback_statistics import (
    STATISTICS,
    Feedback,
    Statistic,
    agreement_by_annotator,
    approval_rate,
    first_place_entropy,
    first_position_rate,
    intransitive_triads,
    longest_wins_rate,
    predicted_best_rate,
    rater_agreement,
    rating_levels,
    tie_rate,
    tie_rate_by_difference,
)
from .label_audit import LabelAudit, audit_labels
from .loo import LeaveOneOut, LeaveOut, loo
from .model_comparison import Ranked, Ranking, compare
from .ood import auroc, ood_auroc
from .over_optimisation import best_of_n_curve
from .plots import (
    ecdf_band,
    plot_chain_ranks,
    plot_coverage,
    plot_ecdf_difference,
    plot_familiarity,
    plot_pit,
    plot_predictive_check,
    plot_ranks,
    plot_reliability,
    plot_trace,
)
from .predictive_checks import PredictiveCheck, all_predictive_checks, predictive_check
from .reliability import Reliability, reliability
from .sbc import SBC, simulation_based_calibration
from .scores import Scores, score, score_by_kind

__all__ = [
    "PSIS",
    "SBC",
    "STATISTICS",
    "BestOfNCurve",
    "BrierDecomposition",
    "CalibrationCheck",
    "Convergence",
    "Coverage",
    "Credit",
    "CrossValidation",
    "CurveDifference",
    "Estimate",
    "Events",
    "Feedback",
    "LabelAudit",
    "LeaveOneOut",
    "LeaveOut",
    "PredictiveCheck",
    "Ranked",
    "Ranking",
    "RaterAudit",
    "Reliability",
    "RewardBench",
    "RewardBenchComparison",
    "RewardBenchResult",
    "RewardBenchSection",
    "RiskCoverage",
    "Scores",
    "Statistic",
    "SubsetDifference",
    "SubsetScore",
    "agreement_by_annotator",
    "all_predictive_checks",
    "approval_rate",
    "audit_labels",
    "auroc",
    "best_of_n_curve",
    "bootstrap",
    "brier_decomposition",
    "brier_score",
    "check_calibration",
    "compare",
    "compare_rewardbench",
    "compare_rewardbench_models",
    "convergence",
    "coverage",
    "credit",
    "credit_html",
    "credit_table",
    "cross_validate",
    "ecdf_band",
    "evaluate_rewardbench",
    "first_place_entropy",
    "first_position_rate",
    "intransitive_triads",
    "k_hat_threshold",
    "longest_wins_rate",
    "loo",
    "of_chains",
    "ood_auroc",
    "pareto_smooth",
    "plot_chain_ranks",
    "plot_coverage",
    "plot_ecdf_difference",
    "plot_familiarity",
    "plot_over_optimisation",
    "plot_pit",
    "plot_predictive_check",
    "plot_ranks",
    "plot_reliability",
    "plot_trace",
    "predicted_best_rate",
    "predicted_events",
    "predictive_check",
    "randomised_pit",
    "rater_agreement",
    "rating_levels",
    "reliability",
    "report",
    "rewardbench_scores",
    "risk_coverage",
    "save_credit_html",
    "score",
    "score_by_kind",
    "simulation_based_calibration",
    "subset_curve",
    "tie_rate",
    "tie_rate_by_difference",
    "top_label",
]

"""Target distributions over responses: tilts of a reference policy.

A target is anything with `log_density(candidates)`, log pi*(y | x) up to a constant for each prompt; so is
`bayesrm.GoodnessPosterior`, the goodness-conditioned posterior and the optimum of RLHF.
"""

from ...engines.response_posterior import Target
from .best_of_n import BestOfN
from .chi_squared import ChiSquaredPessimism
from .mirror_descent import MirrorDescent, Opponent, Payoff

__all__ = ["BestOfN", "ChiSquaredPessimism", "MirrorDescent", "Opponent", "Payoff", "Target"]

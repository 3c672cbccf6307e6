"""What stands for an uncertain reward in an alignment method, by name."""

import enum

from ..beliefs import expected
from ..errors import ArgumentError
from ..programs.goodness_posterior import MARGINAL
from ..selection import LowerConfidenceBound, RiskAverse, Thompson
from .targets._utility import Utility


class UtilityName(enum.StrEnum):
    """What stands for an uncertain reward."""

    MEAN = "mean"
    """The expected reward: uncertainty counts for nothing."""
    LOWER_BOUND = "lower_bound"
    """`mean - strength * std` of the deviation from the candidates' mean (Yang et al., 2402.13210); 1 by default."""
    RISK_AVERSE = "risk_averse"
    """`-b log E exp(-r / b)` with `strength` as b, in units of reward (Hahami et al., 2606.09073); 1 by default."""
    MARGINAL = "marginal"
    """The reward is integrated out, as Bayes' rule has it: *optimistic*. For a `GoodnessPosterior`; no strength."""
    THOMPSON = "thompson"
    """A joint draw of the rewards of the candidates at hand, with `strength` as its seed; 0 by default (Thompson 1933).

    The same response gets another draw among other candidates: rounds do not share one reward function.
    """


#: What counts the uncertainty of the deviation from the candidates' mean.
_BY_DEVIATION = (UtilityName.LOWER_BOUND, UtilityName.RISK_AVERSE, UtilityName.MARGINAL)


def make_utility(
    name: str = "mean", strength: float | None = None, *, num_candidates: int | None = None
) -> Utility | str:
    """The utility of a `GoodnessPosterior` with this name, one of `UtilityName`.

    Args:
        name: One of `UtilityName`.
        strength: Of the penalty; its meaning and default are told there. `None` for the default.
        num_candidates: Candidates of each prompt, so that a utility is refused that does nothing to as few.

    Raises:
        ArgumentError: The name is unknown, or the strength is not one that it takes; or there are 2 candidates, whose
            deviations from their mean are equally uncertain, so that a penalty on it takes as much from both.

    Example:
        >>> make_utility("lower_bound", 2.0)
        LowerConfidenceBound(k=2.0, spread='deviation')
        >>> make_utility("marginal")
        'marginal'
    """
    known = [str(member.value) for member in UtilityName]
    if name not in known:
        raise ArgumentError(f"`utility` is {name!r}; it is one of {known}")
    if num_candidates == 2 and name in _BY_DEVIATION:
        raise ArgumentError(
            f"`utility` is {name!r}, and `num_candidates` is 2: both deviate from their mean with the same "
            "uncertainty, so that it would change nothing; take at least 3 candidates, or 'mean' or 'thompson'"
        )
    if name in (UtilityName.MEAN, UtilityName.MARGINAL):
        if strength is not None:
            raise ArgumentError(f"`strength` is {strength}, and the utility {name!r} takes none; leave it out")
        return expected if name == UtilityName.MEAN else MARGINAL
    if name == UtilityName.THOMPSON:
        seed = 0.0 if strength is None else strength
        if seed < 0.0 or not float(seed).is_integer():
            raise ArgumentError(f"`strength` is {strength}; for 'thompson' it is a seed, a whole number of at least 0")
        return Thompson(seed=int(seed))
    strength = 1.0 if strength is None else strength
    return LowerConfidenceBound(k=strength) if name == UtilityName.LOWER_BOUND else RiskAverse(b=strength)


def make_scores(name: str = "mean", strength: float | None = None, *, num_candidates: int | None = None) -> Utility:
    """The same for targets that depend on the reward by a score alone, such as `targets.BestOfN`.

    Raises:
        ArgumentError: As `make_utility`; or the name is `"marginal"`, which is no score.

    Example:
        >>> make_scores("risk_averse", 0.5)
        RiskAverse(b=0.5, spread='deviation')
    """
    utility = make_utility(name, strength, num_candidates=num_candidates)
    if isinstance(utility, str):
        raise ArgumentError(
            f"`utility` is {name!r}, which integrates the reward out of a goodness; this target takes scores: use one "
            "of ['mean', 'lower_bound', 'risk_averse', 'thompson']"
        )
    return utility

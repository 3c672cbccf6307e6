"""Posterior predictive checks: does feedback drawn from the posterior look like the feedback that was given?"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..backend import seeded
from ..data import Comparisons
from ..engines.posterior import Posterior
from ..errors import ArgumentError
from .feedback_statistics import STATISTICS, Feedback, Statistic

#: Replicates drawn under one hold of torch's generator.
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class PredictiveCheck:
    """A statistic of the feedback beside its values on feedback drawn from the posterior.

    Attributes:
        name: The statistic.
        labels: Name of each of its numbers.
        observed: Its values on the data, shape `(numbers,)`.
        replicated: Its values on each replicate, shape `(S, numbers)`; NaN where a replicate leaves it undefined.
    """

    name: str
    labels: tuple[str, ...]
    observed: NDArray[np.float64]
    replicated: NDArray[np.float64]

    @property
    def p_greater(self) -> NDArray[np.float64]:
        """Chance of a replicated value at least as large as the observed one, shape `(numbers,)`."""
        return self._share(self.replicated >= self.observed - 1e-12)

    @property
    def p_less(self) -> NDArray[np.float64]:
        """Chance of a replicated value at most as large, shape `(numbers,)`."""
        return self._share(self.replicated <= self.observed + 1e-12)

    @property
    def p_value(self) -> NDArray[np.float64]:
        """Two-sided posterior predictive p-value, shape `(numbers,)`.

        On the data of the fit it is conservative, since the posterior has seen them (Meng 1994; Bayarri & Berger 2000);
        on held-out prompts it is not.
        """
        p: NDArray[np.float64] = np.minimum(1.0, 2 * np.minimum(self.p_greater, self.p_less))
        return p

    def _share(self, extreme: NDArray[np.bool_]) -> NDArray[np.float64]:
        known = ~np.isnan(self.replicated)
        # The observed value counts as one of the replicates, which keeps the p-value valid for any number of them.
        share: NDArray[np.float64] = (1 + (extreme & known).sum(0)) / (1 + known.sum(0))
        return np.where(np.isnan(self.observed), np.nan, share)

    def __str__(self) -> str:
        lines = []
        for i, label in enumerate(self.labels):
            values = self.replicated[:, i][~np.isnan(self.replicated[:, i])]
            low, high = np.quantile(values, [0.05, 0.95]) if len(values) else (np.nan, np.nan)
            name = self.name if label == self.name else f"{self.name}, {label}"
            lines.append(
                f"{name}: {self.observed[i]:.3g}, replicated {low:.3g} to {high:.3g} (90%), p = {self.p_value[i]:.2g}"
            )
        return "\n".join(lines)


def predictive_check(
    posterior: Posterior, data: Comparisons, statistic: Statistic, *, num_samples: int = 500, seed: int = 0
) -> PredictiveCheck:
    """Compares a statistic of `data` with its distribution under the posterior predictive (Rubin 1984; Gelman 1996).

    Each replicate answers the same comparisons, by the same annotators, with one joint draw of rewards and latents.

    Args:
        posterior: The posterior; draws of an approximate one are taken as they are.
        data: Comparisons with outcomes, those of the fit or held-out ones.
        statistic: One of this module's, or any function of `Feedback`.
        num_samples: Number of replicates.
        seed: Seed.

    Raises:
        ArgumentError: The data cannot support the statistic, or leave it undefined.

    Example:
        >>> import bayesrm as brm
        >>> from bayesrm.diagnostics import tie_rate
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> design = brm.Comparisons.from_arrays(x, candidates=np.arange(60).reshape(30, 2), outcome=[0] * 30)
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.Davidson())
        >>> data = model.simulate(design, seed=0).data
        >>> bool(predictive_check(brm.fit(model, data), data, tie_rate, num_samples=50).p_value[0] > 0.05)
        True
    """
    return _checks(posterior, data, [statistic], num_samples, seed)[0]


def all_predictive_checks(
    posterior: Posterior, data: Comparisons, *, num_samples: int = 500, seed: int = 0
) -> list[PredictiveCheck]:
    """Every check of `STATISTICS` that the data can support and the posterior could fail, on the same replicates.

    Among many numbers some p-values are small by chance: about one in twenty below 0.05.

    Args:
        posterior: The posterior.
        data: Comparisons with outcomes.
        num_samples: Number of replicates.
        seed: Seed.
    """
    given = Feedback.of(data, np.zeros(data.num_items))
    supported = []
    for statistic in STATISTICS:
        try:
            numbers = _named(statistic, given).values()
        except ArgumentError:
            continue
        if not all(np.isnan(number) for number in numbers):
            supported.append(statistic)
    checks = _checks(posterior, data, supported, num_samples, seed) if supported else []
    return [c for c in checks if not ((c.replicated == c.observed) | np.isnan(c.replicated)).all()]


def _checks(
    posterior: Posterior, data: Comparisons, statistics: Sequence[Statistic], num_samples: int, seed: int
) -> list[PredictiveCheck]:
    draws = posterior.draw(data, num_samples=num_samples, seed=seed)
    density = posterior._density_of(data)
    given = Feedback.of(data, draws.rewards.mean(0).numpy())
    observed = [_named(statistic, given) for statistic in statistics]
    for statistic, numbers in zip(statistics, observed, strict=True):
        if all(np.isnan(number) for number in numbers.values()):
            raise ArgumentError(f"the answers of `data` leave {_name(statistic)} undefined; choose another statistic")
    size = len(draws.rewards)
    replicated = [np.full((size, len(numbers)), np.nan) for numbers in observed]
    for start in range(0, size, _BLOCK):
        block = range(start, min(start + _BLOCK, size))
        with torch.no_grad(), seeded(int(np.random.SeedSequence((seed, start)).generate_state(1)[0])):
            answers = []
            for s in block:
                distributions, _ = density.distributions(density.gather(draws.rewards[s]), draws.latents[s])
                answers.append([d.sample().long() for d in distributions])
        for s, outcomes in zip(block, answers, strict=True):
            feedback = given.with_outcomes(outcomes)
            for statistic, numbers, table in zip(statistics, observed, replicated, strict=True):
                found = _named(statistic, feedback)
                if found.keys() != numbers.keys():
                    raise ArgumentError(
                        f"`statistic` {_name(statistic)} names {sorted(found)} on a replicate and {sorted(numbers)} on "
                        "the data; its names may depend on the comparisons alone"
                    )
                table[s] = [found[label] for label in numbers]
    return [
        PredictiveCheck(_name(statistic), tuple(numbers), np.array(list(numbers.values()), dtype=np.float64), table)
        for statistic, numbers, table in zip(statistics, observed, replicated, strict=True)
    ]


def _name(statistic: Statistic) -> str:
    inner = statistic.func if isinstance(statistic, functools.partial) else statistic
    return str(getattr(inner, "__name__", type(inner).__name__)).replace("_", " ")


def _named(statistic: Statistic, feedback: Feedback) -> dict[str, float]:
    found = statistic(feedback)
    return dict(found) if isinstance(found, Mapping) else {_name(statistic): float(found)}

"""Importance sampling: the draws of an approximation, reweighted to the posterior itself."""

import dataclasses
import math
import time
from typing import Any

import torch

from .._typing import Tensor
from ..data import Comparisons
from ..errors import ArgumentError, EngineError
from ..programs import RewardModel
from ._settings import check_positive
from .draws_posterior import DrawsPosterior
from .gaussian_posterior import GaussianPosterior
from .laplace import Laplace
from .psis import k_hat_threshold, pareto_smooth


@dataclasses.dataclass(frozen=True)
class ImportanceSampling:
    """Corrects any posterior that can be sampled and evaluated, by Pareto-smoothed importance sampling.

    Draws of the proposal get weights p(feedback, theta) / q(theta), whose largest are smoothed by a generalised Pareto
    distribution (Vehtari et al. 2024, 1507.02646). Its shape k-hat says whether the weights can be trusted: above
    `max_k_hat` the fit is refused, because the corrected posterior would be made of a few draws. Otherwise draws are
    resampled in proportion to their weights (systematic resampling), so that every use of the posterior is corrected.

    The target is the posterior of the model that the proposal describes: for heads that are not linear Laplace's
    posterior is that of the linearised head, and `SVI`'s that of the head itself.

    Attributes:
        proposal: The engine whose posterior is corrected, `Laplace` or `SVI`.
        num_samples: Draws of the proposal.
        degrees_of_freedom: Draw from a Student t distribution with the proposal's centre and scale instead of a normal
            one, so that posterior tails that are heavier than normal are covered; for a normal proposal.
        max_k_hat: Refuse above this; by default the threshold of the source, `min(1 - 1 / log10(num_samples), 0.7)`.

    Raises:
        ArgumentError: A setting is not one of the known values.
        EngineError: When fitting: k-hat is too large, or the proposal cannot be evaluated.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> posterior = brm.fit(model, data, inference=ImportanceSampling(brm.Laplace()))
        >>> posterior.report.diagnostics["k_hat"] < 0.7
        True
    """

    proposal: Any = dataclasses.field(default_factory=Laplace)
    num_samples: int = 4000
    degrees_of_freedom: float | None = None
    max_k_hat: float | None = None

    def __post_init__(self) -> None:
        check_positive("num_samples", self.num_samples)
        if isinstance(self.proposal, type) or not callable(getattr(self.proposal, "fit", None)):
            raise ArgumentError(f"`proposal` is {self.proposal!r}; it is an engine such as Laplace()")
        if self.degrees_of_freedom is not None and not 0.0 < self.degrees_of_freedom < math.inf:
            raise ArgumentError(f"`degrees_of_freedom` is {self.degrees_of_freedom}; it is a positive number")
        if self.max_k_hat is not None and not self.max_k_hat > 0.0:
            raise ArgumentError(f"`max_k_hat` is {self.max_k_hat}; it is a positive number")

    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> DrawsPosterior:
        """The corrected posterior, see `bayesrm.fit`."""
        begin = time.perf_counter()
        proposal = self.proposal.fit(program, data, seed=seed, progress=progress)
        generator = torch.Generator().manual_seed(seed)
        x, log_ratio = self._weighted(proposal, data, generator)
        smoothed = pareto_smooth(log_ratio)
        limit = k_hat_threshold(len(log_ratio)) if self.max_k_hat is None else self.max_k_hat
        if not smoothed.k_hat <= limit:
            raise EngineError(
                f"the importance weights have k-hat {smoothed.k_hat:.2f}, above {limit:.2f}: the proposal misses too "
                f"much of the posterior ({x.shape[1]} dimensions, {smoothed.ess:.0f} effective of {len(x)} draws) "
                "for a correction to be trusted; use NUTS, another proposal (Laplace(), SVI(guide='full_rank')), "
                "or heavier tails by `degrees_of_freedom`"
            )
        kept = _systematic(smoothed.log_weights.exp(), generator)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings["proposal"] = proposal.report.engine
        report = dataclasses.replace(
            proposal.report,
            engine={"name": "ImportanceSampling", "settings": settings},
            diagnostics={
                **proposal.report.diagnostics,
                "k_hat": smoothed.k_hat,
                "ess": smoothed.ess,
                "distinct_draws": len(torch.unique(kept)),
            },
            seconds=time.perf_counter() - begin,
        )
        size = proposal._whitening.size
        return DrawsPosterior(
            proposal.program, proposal.schema, report, proposal._expansion, proposal._whitening,
            x[kept, :size].contiguous(), x[kept, size:].contiguous(),
        )  # fmt: skip

    def _weighted(self, proposal: Any, data: Comparisons, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws of (z, latents), shape `(S, R + Q)`, with their log importance ratios, shape `(S,)`."""
        if isinstance(proposal, DrawsPosterior) and proposal.log_ratio is not None:
            if self.degrees_of_freedom is not None:
                raise EngineError("`degrees_of_freedom` is for normal proposals; this one keeps draws of its own")
            return torch.cat([proposal.z, proposal.unconstrained_latents], dim=1), proposal.log_ratio
        if not isinstance(proposal, GaussianPosterior) or proposal.factor is None or not proposal._whitening.size:
            raise EngineError(
                f"the posterior of {type(self.proposal).__name__} cannot be evaluated at its draws; use Laplace "
                "(structures full, sketch, last_layer; diag for heads) or SVI"
            )
        x, log = proposal.coordinate_draws(
            self.num_samples, generator, degrees_of_freedom=self.degrees_of_freedom
        )  # fmt: skip
        size = proposal._whitening.size
        features, _ = proposal._encoded(data)
        rewards = proposal.rewards_at(features, x[:, :size])
        with torch.no_grad():
            return x, proposal._density_of(data).log_joints(rewards, x[:, size:]) + log["log_prior"] - log["log_q"]


def _systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of as many draws as there are weights, each drawn in proportion to its weight (Kitagawa 1996)."""
    count = len(weights)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    ladder = (torch.arange(count, dtype=torch.float64) + offset) / count
    return torch.searchsorted(weights.cumsum(0) / weights.sum(), ladder).clamp_max(count - 1)

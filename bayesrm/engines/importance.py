"""Importance sampling: the draws of an approximation, reweighted to the posterior itself."""

import dataclasses
import math
import time
import warnings
from typing import Any, overload

import torch

from .._typing import Tensor
from ..data import Comparisons
from ..errors import ArgumentError, EngineError, ParetoWarning
from ..programs import GoodnessPosterior, RewardModel, ScoredCandidates
from ..rewards import LoRA
from ._settings import check_positive, check_real
from ._tangent import Whitening
from .draws_posterior import DrawsPosterior, WeightedDraws, rewards_of
from .ensemble import Ensemble
from .gaussian_posterior import GaussianPosterior
from .laplace import Laplace
from .map import MAP
from .nuts import NUTS
from .psis import MIN_DRAWS, k_hat_threshold, pareto_smooth
from .response_posterior import ResponsePosterior, response_posterior
from .svi import SVI

#: Most dimensions in which Student t draws come near the middle of a normal posterior often enough.
_FEW_DIMENSIONS = 20
#: Their degrees of freedom.
_HEAVY_TAILS = 5.0


@dataclasses.dataclass(frozen=True)
class ImportanceSampling:
    """Corrects any posterior that can be sampled and evaluated, by Pareto-smoothed importance sampling.

    Draws of the proposal get weights p(feedback, theta) / q(theta), whose largest are smoothed by a generalised Pareto
    distribution (Vehtari et al. 2024, 1507.02646). Its shape k-hat says whether the weights can be trusted: above
    `max_k_hat` the fit is refused, because the corrected posterior would be made of a few draws. Otherwise draws are
    resampled in proportion to their weights (systematic resampling), so that every use of the posterior is corrected.

    The mean weight is an unbiased estimate of the evidence, which takes the place of Laplace's in the report. Where
    rows are few beside the parameters the two differ, and by more the vaguer the prior: Laplace's prefers priors that
    are too tight (Kuss & Rasmussen 2005), so compare prior precisions by this one, or on held-out prompts.

    The target is the posterior of the declared head, also where Laplace's proposal linearises it; of a LoRA reward that
    of its tangent.

    On a `GoodnessPosterior` the draws are the candidates, with their proposal's log-probabilities, and the result is a
    `ResponsePosterior`. Its weights are smoothed for prompts with at least 25 candidates; a k-hat above the threshold
    gives a warning, above a given `max_k_hat` an error.

    Attributes:
        proposal: The engine whose posterior is corrected, `Laplace` or `SVI`.
        num_samples: Draws of the proposal.
        degrees_of_freedom: Draw from a Student t distribution with the proposal's centre and scale instead of a normal
            one, so that posterior tails that are heavier than normal are covered; for a normal proposal. By default 5
            in up to 20 dimensions, where normal draws miss tails that k-hat does not see, and normal draws beyond,
            where t draws lie too far out. A large number, 1e6, is a normal proposal.
        max_k_hat: Refuse above this; by default the threshold of the source, `min(1 - 1 / log10(num_samples), 0.7)`.

    Raises:
        ArgumentError: A setting is not one of the known values.
        EngineError: When fitting: k-hat is too large, or the proposal cannot be evaluated.

    Warns:
        ParetoWarning: The importance weights of candidates have too heavy a tail.

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

    #: Programs that the engine serves.
    programs = (RewardModel, GoodnessPosterior)

    def __post_init__(self) -> None:
        check_positive("num_samples", self.num_samples)
        if self.num_samples < MIN_DRAWS:
            raise ArgumentError(f"`num_samples` is {self.num_samples}; weights are judged from {MIN_DRAWS} draws on")
        if isinstance(self.proposal, type) or not callable(getattr(self.proposal, "fit", None)):
            raise ArgumentError(f"`proposal` is {self.proposal!r}; it is an engine such as Laplace()")
        for name in ("degrees_of_freedom", "max_k_hat"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name))

    @overload
    def fit(
        self, program: GoodnessPosterior, data: ScoredCandidates, *, seed: int, progress: bool
    ) -> ResponsePosterior: ...

    @overload
    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> DrawsPosterior: ...

    def fit(self, program: Any, data: Any, *, seed: int, progress: bool) -> DrawsPosterior | ResponsePosterior:
        """The corrected posterior, or that of responses, see `bayesrm.fit`."""
        if isinstance(program, GoodnessPosterior):
            return self._of_responses(program, data)
        begin = time.perf_counter()
        engine = self._proposal(program)
        approximate = engine.proposal if isinstance(engine, Laplace) else engine.fit
        proposal = approximate(program, data, seed=seed, progress=progress)
        generator = torch.Generator().manual_seed(seed)
        whitening, x, log_ratio = self._weighted(proposal, data, generator)
        smoothed = pareto_smooth(log_ratio)
        limit = k_hat_threshold(len(log_ratio)) if self.max_k_hat is None else self.max_k_hat
        if not smoothed.k_hat <= limit:
            raise EngineError(
                f"the importance weights have k-hat {smoothed.k_hat:.2f}, above {limit:.2f}: the proposal misses too "
                f"much of the posterior ({x.shape[1]} dimensions, {smoothed.ess:.0f} effective of {len(x)} draws) "
                "for a correction to be trusted; use NUTS, more draws by `num_samples`, or heavier tails by "
                "`degrees_of_freedom`"
            )
        kept = _systematic(smoothed.log_weights.exp(), generator)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings["proposal"] = proposal.report.engine
        report = dataclasses.replace(
            proposal.report,
            engine={"name": "ImportanceSampling", "settings": settings},
            # In the units of the log joint the weights average to the evidence; Laplace's own is biased.
            log_evidence=float(torch.logsumexp(log_ratio, 0)) - math.log(len(log_ratio)),
            diagnostics={
                **proposal.report.diagnostics,
                "k_hat": smoothed.k_hat,
                "ess": smoothed.ess,
                "distinct_draws": len(torch.unique(kept)),
            },
            seconds=time.perf_counter() - begin,
        )
        size = whitening.size
        return DrawsPosterior(
            proposal.program, proposal.schema, report, proposal._expansion, whitening,
            x[kept, :size].contiguous(), x[kept, size:].contiguous(),
            resampled_from=WeightedDraws(x[:, :size].contiguous(), x[:, size:].contiguous(), log_ratio),
        )  # fmt: skip

    def _of_responses(self, program: GoodnessPosterior, data: ScoredCandidates) -> ResponsePosterior:
        if data.exhaustive:
            raise EngineError(
                "the candidates carry no `proposal`, the log-probabilities under the distribution that drew them; "
                "give it, or use Enumeration() if they are all the responses there are"
            )
        posterior = response_posterior(program, data)
        judged = ~torch.isnan(posterior.k_hat)
        limits = torch.tensor([k_hat_threshold(max(MIN_DRAWS, n)) for n in data.mask.sum(1).tolist()])
        if self.max_k_hat is not None:
            limits = torch.full_like(limits, self.max_k_hat)
        bad = torch.nonzero(judged & (posterior.k_hat > limits.to(posterior.k_hat)))[:, 0]
        if not len(bad):
            return posterior
        message = (
            f"the importance weights of {len(bad)} of {len(judged)} prompts have too heavy a tail, the first prompt "
            f"{int(bad[0])} (k-hat {float(posterior.k_hat[bad[0]]):.2f}): draw more candidates, or draw them from a "
            "proposal nearer to the posterior"
        )
        if self.max_k_hat is not None:
            raise EngineError(message)
        warnings.warn(message, ParetoWarning, stacklevel=4)
        return posterior

    def _proposal(self, program: RewardModel) -> Any:
        """The engine to fit, refused before it starts where its posterior could not be corrected."""
        proposal = self.proposal
        if isinstance(proposal, NUTS | Ensemble | MAP | ImportanceSampling):
            raise EngineError(
                f"the posterior of {type(proposal).__name__} has no density to evaluate; use Laplace(...) or SVI(...)"
            )
        if isinstance(proposal, SVI):
            if isinstance(program.reward, LoRA):
                raise EngineError(
                    "SVI on LoRA weights cannot be corrected; use Laplace(...), or its tangent's SVI(...)"
                )
            if not program.head.is_linear:
                if self.degrees_of_freedom is not None:
                    raise EngineError("`degrees_of_freedom` is for Laplace(...) and for heads that are linear")
                return dataclasses.replace(proposal, num_samples=self.num_samples)
        return proposal

    def _weighted(
        self, proposal: Any, data: Comparisons, generator: torch.Generator
    ) -> tuple[Whitening, Tensor, Tensor]:
        """Coordinates, draws of (z, latents) in them, shape `(S, R + Q)`, and log importance ratios, shape `(S,)`."""
        if isinstance(proposal, DrawsPosterior) and proposal.log_ratio is not None:
            x = torch.cat([proposal.z, proposal.unconstrained_latents], dim=1)
            return proposal._whitening, x, proposal.log_ratio
        if not isinstance(proposal, GaussianPosterior) or proposal.factor is None or not proposal._whitening.size:
            raise EngineError(
                f"the posterior of {type(self.proposal).__name__} cannot be evaluated at its draws; use Laplace "
                "(structures full, sketch, last_layer; diag for heads) or SVI"
            )
        whitening = proposal._whitening
        tails = self.degrees_of_freedom
        if tails is None and len(proposal.mode) <= _FEW_DIMENSIONS:
            tails = _HEAVY_TAILS
        x, log = proposal.coordinate_draws(self.num_samples, generator, degrees_of_freedom=tails)
        z, latents = x[:, : whitening.size], x[:, whitening.size :]
        if not proposal.program.head.is_linear and whitening.basis is not None:
            # The head itself sees directions that its linearisation does not: they are drawn from their prior.
            noise = torch.randn(len(z), len(whitening.scale), generator=generator, dtype=torch.float64)
            z = z @ whitening.basis.T + noise - (noise @ whitening.basis) @ whitening.basis.T
            whitening = dataclasses.replace(whitening, basis=None)
        features, _ = proposal._encoded(data)
        density = proposal._density_of(data)
        with torch.no_grad():
            rewards = rewards_of(proposal._expansion, whitening, features, z)
            log_joint = torch.cat(
                [density.log_joints(r, u) for r, u in zip(rewards.split(512), latents.split(512), strict=True)]
            )
        return whitening, torch.cat([z, latents], dim=1), log_joint + log["log_prior"] - log["log_q"]


def _systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of as many draws as there are weights, each drawn in proportion to its weight (Kitagawa 1996)."""
    count = len(weights)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    ladder = (torch.arange(count, dtype=torch.float64) + offset) / count
    return torch.searchsorted(weights.cumsum(0) / weights.sum(), ladder).clamp_max(count - 1)

"""Stochastic variational inference: the normal approximation that is closest in KL(q || p)."""

import copy
import dataclasses
import enum
import time
import warnings
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from .._typing import Tensor
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError, ConvergenceWarning, EngineError
from ..programs import RewardModel
from ..rewards import LoRA
from ._guides import Guide, make_guide
from ._problem import Problem, make_problem
from ._settings import check_choice, check_positive, check_real, check_training, settings_of
from ._tangent import Coordinates
from .posterior import Posterior
from .training import Training

#: The bound of a linear head counts as settled when by its gradient it is at most this many nats below its top.
_SETTLED = 0.5
#: That of another head, when this share of the steps again, and so many at least, raise it by at most so many nats:
#: small steps rise slowly, so that several times as much may be left.
_MORE_STEPS, _MIN_MORE, _MAX_RISE = 0.25, 50, 0.1
#: Parts of the draws by which the noise of that gradient is judged.
_PARTS = 8
#: Draws that the final bound is estimated from.
_BOUND_DRAWS = 512
#: Columns of a low-rank guide by default.
_RANK = 10
#: Draws that posteriors made of draws keep by default.
_HEAD_DRAWS, _LORA_DRAWS = 1000, 32


class GuideFamily(enum.StrEnum):
    """Family of normal distributions over (parameters, unconstrained latents)."""

    FULL_RANK = "full_rank"
    """Any covariance."""
    LOW_RANK = "low_rank"
    """A diagonal plus a product of `rank` columns: for many parameters."""
    MEAN_FIELD = "mean_field"
    """A diagonal over the parameters. Cheap; too narrow wherever the data leave parameters correlated."""


@dataclasses.dataclass(frozen=True)
class SVI:
    """The normal distribution q over (parameters, unconstrained latents) that maximises E_q[log p - log q].

    Gradients by reparametrised draws, the density of q held fixed ("sticking the landing", Roeder et al. 2017,
    1703.09194), so that their noise vanishes as q nears the posterior; Adam with a step that falls to zero. For linear
    heads q starts at Laplace's approximation. A head that is not linear keeps draws of q, since the rewards they give
    are not normal; its fit has `converged` when a quarter of the steps again (at least 50), from where it ended and
    with full step sizes, hardly raise the bound (0.1 nats): that finds a run that was too short, not a better mode far
    away. `LoRA` rewards get a mean-field posterior on the weights themselves, in the manner of BLoB (Wang et al. 2024,
    2406.11675), trained by `transformers.Trainer`. Its standard deviations start at a tenth of the prior's and need
    some hundred steps to grow where the data say nothing; a short run is too certain: it warns, has not `converged`,
    and shows it in `mean_scale` and `growth_gain` of `report.diagnostics`.

    Attributes:
        guide: A `GuideFamily`; by default `"full_rank"` for heads and `"mean_field"`, the only one, for LoRA rewards.
        num_steps: Steps of the optimiser (of LoRA rewards: see `training`).
        learning_rate: Its first step size, in units of the prior standard deviation; of Laplace's posterior for
            `full_rank` of a linear head.
        num_particles: Draws a step.
        batch_size: Rows a step, drawn from every kind of feedback in proportion and scaled up; all of them by default.
        rank: Columns of `low_rank`.
        num_samples: Draws that the posterior of a head that is not linear (1,000 by default) or of LoRA weights (32)
            keeps.
        training: How LoRA weights are trained.
        memory_gib: Refuse to start work that needs more memory than this.

    Raises:
        ArgumentError: A setting is not one of the known values.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> posterior = brm.fit(model, data, inference=SVI(num_steps=200))
        >>> round(posterior.report.diagnostics["elbo"], 1)
        -2.4
    """

    guide: str | None = None
    num_steps: int = 1000
    learning_rate: float = 0.02
    num_particles: int = 8
    batch_size: int | None = None
    rank: int = _RANK
    num_samples: int | None = None
    training: Training = dataclasses.field(default_factory=Training)
    memory_gib: float = 8.0

    def __post_init__(self) -> None:
        if self.guide is not None:
            check_choice("guide", self.guide, GuideFamily)
        for name in ("num_steps", "num_particles", "rank"):
            check_positive(name, getattr(self, name))
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_real("learning_rate", self.learning_rate)
        check_real("memory_gib", self.memory_gib)
        check_training(self.training)
        if self.guide != "low_rank" and self.rank != _RANK:
            raise ArgumentError(f"`rank` is of guide='low_rank', and `guide` is {self.guide!r}")

    def fit(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> Posterior:
        """The closest normal posterior, see `bayesrm.fit`."""
        begin = time.perf_counter()
        if isinstance(program.reward, LoRA):
            return self._fit_lora(program, data, seed=seed, progress=progress)
        if self.num_samples is not None and program.head.is_linear:
            raise EngineError(
                "`num_samples` is for heads that are not linear and for LoRA rewards, whose posteriors are made of "
                "draws; this one is a normal distribution, and `posterior.draw(num_samples=...)` says how many"
            )
        family = self.guide or "full_rank"
        problem = make_problem(
            program, data, seed=seed, progress=progress, memory_gib=self.memory_gib,
            copies=self.num_particles, square_matrices=6 if family == "full_rank" else 0,
            # A diagonal means something in the parameters, nothing in a basis of their row space.
            coordinates=Coordinates.PRIMAL if family == "mean_field" else Coordinates.AUTO,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        guide = make_guide(family, problem, self.rank, generator)
        missing = self._optimise(problem, guide, self.num_steps, generator, progress)
        if missing is not None:
            raise EngineError(
                f"the variational bound is not finite after {missing} steps; lower `learning_rate`, now "
                f"{self.learning_rate}"
            )
        if program.head.is_linear:
            settled = self._near_top(problem, guide, generator)
        else:
            settled = self._rises_no_more(problem, guide, seed, progress)
        bound, error = _bound(problem, guide, generator)
        report = dataclasses.replace(
            problem.report(self, settings_of(self), data, seed),
            converged=settled,
            gradient_norm=float("nan"),
            iterations=self.num_steps,
            diagnostics={"elbo": bound, "elbo_std_error": error},
        )
        if program.head.is_linear:
            mean, factor = guide.precision_factor()
            report = dataclasses.replace(report, seconds=time.perf_counter() - begin)
            return problem.gaussian_posterior(report, mean, factor)
        with torch.no_grad():
            x, log_q = guide.draw(self.num_samples or _HEAD_DRAWS, generator)
            log_ratio = torch.cat([problem.log_joints(part) for part in x.split(64)]) - log_q
        report = dataclasses.replace(report, seconds=time.perf_counter() - begin)
        return problem.posterior_of_draws(report, x, log_ratio=log_ratio)

    def _fit_lora(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> Posterior:
        from ._lora_svi import fit_mean_field

        if self.guide not in (None, "mean_field"):
            raise EngineError(
                f"`guide='{self.guide}'` is for heads; the weights of a LoRA reward get SVI(guide='mean_field'), and "
                "its tangent, the program of a Laplace posterior, any guide"
            )
        default = SVI()
        for name in ("num_steps", "learning_rate", "num_particles", "batch_size", "rank"):
            if getattr(self, name) != getattr(default, name):
                raise EngineError(f"`{name}` is for heads; a LoRA reward is trained as `training` says")
        begin = time.perf_counter()
        posterior = fit_mean_field(
            program, data, self.training, num_samples=self.num_samples or _LORA_DRAWS, seed=seed, progress=progress
        )  # fmt: skip
        posterior.report = dataclasses.replace(
            posterior.report,
            engine={"name": "SVI", "settings": settings_of(self)},
            seconds=time.perf_counter() - begin,
        )
        return posterior

    def _loss(self, problem: Problem, guide: Guide, num_draws: int, generator: torch.Generator) -> Tensor:
        """Minus the bound, not finite where the step before has led out of the family."""
        try:
            x, log_q = guide.draw(num_draws, generator, stop_density=True)
        except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]
            return torch.tensor(float("nan"), dtype=torch.float64)
        return (log_q - problem.log_joints(x)).mean()

    def _optimise(
        self, problem: Problem, guide: Guide, num_steps: int, generator: torch.Generator, progress: bool
    ) -> int | None:
        """Maximises the bound; returns the number of steps after which it was not finite, if it ever was not."""
        optimiser = torch.optim.Adam(
            [
                {"params": [parameter], "lr": self.learning_rate * size}
                for parameter, size in zip(guide.parameters, guide.step_sizes, strict=True)
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
        batches = _batches(problem.density.groups, self.batch_size, generator)
        whole = problem.density
        try:
            for step in tqdm(range(num_steps), unit="step", disable=not progress):
                problem.density = whole if self.batch_size is None else whole.of_groups(next(batches))
                optimiser.zero_grad()
                loss = self._loss(problem, guide, self.num_particles, generator)
                if not bool(torch.isfinite(loss)):
                    return step
                loss.backward()
                optimiser.step()
                schedule.step()
        finally:
            problem.density = whole
        return None

    def _near_top(self, problem: Problem, guide: Guide, generator: torch.Generator) -> bool:
        """Whether the bound is near its top, judged by its gradient: steps that fall to zero prove nothing.

        In coordinates whitened by the prior a log-concave posterior curves by at least one, so that the bound is at
        most half the squared gradient below its top; the noise of the estimated gradient is taken off.
        """
        draws = max(8, _BOUND_DRAWS // _PARTS)
        gradients = []
        for _ in range(_PARTS):
            loss = self._loss(problem, guide, draws, generator)
            found = torch.autograd.grad(loss, list(guide.parameters))
            gradients.append(torch.cat([g.reshape(-1) for g in found]))
        every = torch.stack(gradients)
        below = 0.5 * float((every.mean(0).square() - every.var(0) / _PARTS).sum())
        if below > _SETTLED:
            self._warn(f"by its gradient the bound may still rise by about {below:.2g} nats")
        return below <= _SETTLED

    def _rises_no_more(self, problem: Problem, guide: Guide, seed: int, progress: bool) -> bool:
        """Whether more steps hardly raise the bound: the posterior of a head that is not linear is not log-concave.

        The steps are taken by a copy, with first step sizes and generators of its own: neither the guide nor the draws
        that follow depend on them. Both bounds are estimated from the same noise.
        """
        further, more = copy.deepcopy(guide), max(_MIN_MORE, round(_MORE_STEPS * self.num_steps))
        # Another stream than that of the fit.
        failed = self._optimise(problem, further, more, torch.Generator().manual_seed(seed + 1), progress)
        if failed is not None:
            self._warn(f"after {failed} more the bound is not finite")
            return False
        after, before = (
            _bound_draws(problem, g, torch.Generator().manual_seed(seed + 2)) for g in (further, guide)
        )  # fmt: skip
        rise = float((after - before).mean())
        if rise > _MAX_RISE:
            self._warn(f"{more} more raise the bound by {rise:.2g} nats")
        return rise <= _MAX_RISE

    def _warn(self, reason: str) -> None:
        warnings.warn(
            f"SVI stopped after {self.num_steps} steps, while {reason}; raise `num_steps` or `learning_rate`",
            ConvergenceWarning,
            stacklevel=5,
        )


def _bound_draws(problem: Problem, guide: Guide, generator: torch.Generator) -> Tensor:
    """Draws whose mean is the evidence lower bound, shape `(_BOUND_DRAWS,)`."""
    with torch.no_grad():
        x, log_q = guide.draw(_BOUND_DRAWS, generator)
        return torch.cat([problem.log_joints(part) for part in x.split(64)]) - log_q


def _bound(problem: Problem, guide: Guide, generator: torch.Generator) -> tuple[float, float]:
    """The evidence lower bound with its standard error."""
    values = _bound_draws(problem, guide, generator)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _batches(
    groups: Sequence[FeedbackGroup], batch_size: int | None, generator: torch.Generator
) -> Iterator[list[FeedbackGroup]]:
    """Random rows of every group, in proportion to its size, their weights scaled up to stand for the whole group."""
    total = sum(len(g.items) for g in groups)
    shares = [min(len(g.items), max(1, round((batch_size or total) * len(g.items) / total))) for g in groups]
    while True:
        orders = [torch.randperm(len(g.items), generator=generator) for g in groups]
        for step in range(max(1, min(len(g.items) // n for g, n in zip(groups, shares, strict=True)))):
            yield [
                _rows(g, order[step * n : (step + 1) * n]) for g, order, n in zip(groups, orders, shares, strict=True)
            ]


def _rows(group: FeedbackGroup, index: Tensor) -> FeedbackGroup:
    part = group.map_arrays(lambda a: a[index])
    comparison = dataclasses.replace(part.comparison, num_rows=len(index))
    return dataclasses.replace(part, comparison=comparison, weight=part.weight * (len(group.items) / len(index)))

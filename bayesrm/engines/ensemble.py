"""Ensembles: many modes of randomly perturbed posteriors, whose disagreement is the uncertainty."""

import dataclasses
import enum
import math
import time
import warnings

import torch

from .._typing import Tensor
from ..data import Comparisons, Corrections
from ..errors import ArgumentError, ConvergenceWarning, EngineError
from ..programs import LanguageFeedback, RewardModel
from ..rewards import LoRA, ProjectedHead
from ._batched_lbfgs import minimise
from ._bootstrap_units import bootstrap_units
from ._curvature import FLAT, CurvatureKind, curvature
from ._problem import Problem, make_problem
from ._settings import check_choice, check_positive, check_real, check_training, settings_of
from ._tangent import Coordinates
from .posterior import Posterior
from .training import Training


class Randomisation(enum.StrEnum):
    """What differs between the members."""

    BOTH = "both"
    """Anchors and weights. For many prompts the members are then spread like the posterior."""
    ANCHORED = "anchored"
    """Each member's prior is centred at a draw of the prior (Osband et al. 2018, 1806.03335; Pearce et al. 2020,
    1810.05546). Without noise of the data it is too narrow where these inform."""
    BOOTSTRAP = "bootstrap"
    """Each prompt's rows get an exponential random weight (Rubin 1981; Newton & Raftery 1994); where there are fewer
    than 20 prompts, as in a tournament among items, each row. Without anchors the members agree wherever no data are:
    what was never seen looks certain."""


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Modes of `num_members` randomly perturbed copies of the posterior, as equally likely draws.

    Members of heads are found together, by one L-BFGS whose evaluations are shared; linear heads in coordinates
    whitened by their common curvature. Members of a `LoRA` reward, and of a corrector, are adapters on one backbone,
    trained one after another. Likelihood latents are part of every member; their priors are moved by a normal shift
    with the covariance that the prior's curvature implies, which for a normal prior is the same as an anchor.

    Attributes:
        num_members: Number of members.
        randomisation: A `Randomisation`.
        gradient_tolerance: Gradient norm of a head's mode, in units of the common posterior's standard deviation for
            linear heads and of the prior's for others.
        max_iterations: Most iterations for heads.
        training: How LoRA weights and correctors are trained. No gradient of all the data is taken where that ends:
            `report.converged` says that no member stopped before its planned steps, and no more.
        memory_gib: Refuse to start work on heads that needs more memory than this.

    Raises:
        ArgumentError: A setting is not one of the known values.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> len(brm.fit(model, data, inference=Ensemble(num_members=5)))
        5
    """

    num_members: int = 20
    randomisation: str = "both"
    gradient_tolerance: float = 1e-4
    max_iterations: int = 1000
    training: Training = dataclasses.field(default_factory=Training)
    memory_gib: float = 8.0

    #: Programs that the engine serves.
    programs = (RewardModel, LanguageFeedback)

    def __post_init__(self) -> None:
        check_positive("num_members", self.num_members)
        if self.num_members < 2:
            raise ArgumentError(f"`num_members` is {self.num_members}; disagreement needs at least 2")
        check_choice("randomisation", self.randomisation, Randomisation)
        for name in ("gradient_tolerance", "memory_gib"):
            check_real(name, getattr(self, name))
        check_positive("max_iterations", self.max_iterations)
        check_training(self.training)

    @property
    def anchored(self) -> bool:
        """Whether priors are perturbed."""
        return self.randomisation in ("both", "anchored")

    @property
    def bootstrap(self) -> bool:
        """Whether data are reweighted."""
        return self.randomisation in ("both", "bootstrap")

    def fit(
        self,
        program: RewardModel | LanguageFeedback,
        data: Comparisons | Corrections,
        *,
        seed: int,
        progress: bool,
    ) -> Posterior:
        """The members, see `bayesrm.fit`."""
        if isinstance(program, LanguageFeedback):
            from ._language_feedback import fit_members

            return fit_members(self, program, data, seed=seed, progress=progress)
        assert isinstance(data, Comparisons)
        begin = time.perf_counter()
        if isinstance(program.reward, LoRA):
            return self._fit_lora(program, data, seed=seed, progress=progress)
        problem = make_problem(
            program, data, seed=seed, progress=progress, memory_gib=self.memory_gib,
            find_mode=program.head.is_linear, copies=self.num_members,
            # Members without anchors have nothing outside the row space, where a posterior has its prior.
            coordinates=Coordinates.AUTO if self.anchored else Coordinates.PRIMAL,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        center, root = _conditioning(problem)
        anchors, shifts = self._anchors(problem, generator)
        weights = self._weights(problem, data, generator)
        size = problem.size

        def objective(y: Tensor, members: Tensor) -> Tensor:
            x = center + (y if root is None else y @ root.T)
            z, latents = x[:, :size], x[:, size:]
            given = None if weights is None else [w[members] for w in weights]
            fit = problem.density.log_joints(problem.rewards(z), latents, given)
            if shifts is not None:
                moved = latents - shifts[members]
                fit = fit + problem.density.log_priors(moved) - problem.density.log_priors(latents)
            return 0.5 * (z - anchors[members]).square().sum(1) - fit

        start = torch.zeros(self.num_members, problem.dimension, dtype=torch.float64)
        if not program.head.is_linear:
            start[:, :size] = 0.1 * torch.randn(self.num_members, size, generator=generator, dtype=torch.float64)
        found = minimise(objective, start, tolerance=self.gradient_tolerance, max_iterations=self.max_iterations)
        missed = int((found.gradient_norm > self.gradient_tolerance).sum())
        if missed:
            warnings.warn(
                f"{missed} of {self.num_members} members stopped after {found.iterations} iterations at a gradient "
                f"norm up to {float(found.gradient_norm.max()):.1e}, above {self.gradient_tolerance:.0e}; "
                "raise `max_iterations` or `gradient_tolerance`",
                ConvergenceWarning,
                stacklevel=3,
            )
        report = dataclasses.replace(
            problem.report(self, settings_of(self), data, seed),
            converged=missed == 0,
            gradient_norm=float(found.gradient_norm.max()),
            iterations=found.iterations,
            seconds=time.perf_counter() - begin,
        )
        if not bool(torch.isfinite(found.x).all()):
            raise EngineError(
                "a member has no mode: its parameters or latents ran off to infinity; give the latents priors with "
                "lighter tails"
            )
        head = program.head
        if isinstance(head, ProjectedHead) and not self.anchored:
            problem.program = dataclasses.replace(program, reward=head.without_rest())
            problem.expansion = dataclasses.replace(problem.expansion, program=problem.program)
        x = center + (found.x if root is None else found.x @ root.T)
        return problem.posterior_of_draws(report, x)

    def _fit_lora(self, program: RewardModel, data: Comparisons, *, seed: int, progress: bool) -> Posterior:
        from ._lora_ensemble import fit_members

        begin = time.perf_counter()
        posterior = fit_members(
            program, data, self.training, num_members=self.num_members, anchored=self.anchored,
            bootstrap=self.bootstrap, seed=seed, progress=progress,
        )  # fmt: skip
        posterior.report = dataclasses.replace(
            posterior.report,
            engine={"name": "Ensemble", "settings": settings_of(self)},
            seconds=time.perf_counter() - begin,
        )
        return posterior

    def _anchors(self, problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Each member's prior mean of z, shape `(M, R)`, and how far its latents' prior is moved, `(M, Q)`."""
        size, q = problem.size, problem.density.num_latents
        noise = torch.randn(self.num_members, size + q, generator=generator, dtype=torch.float64)
        if not self.anchored:
            return torch.zeros_like(noise[:, :size]), None
        if not q:
            return noise, None
        center, _ = _conditioning(problem)
        with torch.no_grad():
            rewards = problem.rewards(center[None, :size])[0]
        prior = curvature(
            problem.density, problem.density.gather(rewards), center[size:], CurvatureKind.AUTO, seed=0
        ).prior  # fmt: skip
        values, vectors = torch.linalg.eigh(prior)
        # Directions in which the prior is flat or curves the other way there have no width to move it by.
        root = vectors * torch.where(values > FLAT, values.clamp_min(FLAT).rsqrt(), 0.0)
        return noise[:, :size], noise[:, size:] @ root.T

    def _weights(self, problem: Problem, data: Comparisons, generator: torch.Generator) -> list[Tensor] | None:
        """Weights of the rows of each group for each member, each of shape `(M, rows)`."""
        if not self.bootstrap:
            return None
        units = torch.as_tensor(bootstrap_units(data))
        uniform = torch.rand(self.num_members, int(units.max()) + 1, generator=generator, dtype=torch.float64)
        factors = -torch.log(uniform.clamp_min(math.exp(-50.0)))
        return [g.weight * factors[:, units[g.rows]] for g in problem.density.groups]


def _conditioning(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """A centre and a matrix with x = centre + matrix y, in which the posterior is near the standard normal."""
    if problem.mode is None:
        zeros = torch.zeros(problem.size, dtype=torch.float64)
        return torch.cat([zeros, problem.density.initial_latents]), None
    precision = problem.precision()
    if precision is None:
        return problem.mode, None
    return problem.mode, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))

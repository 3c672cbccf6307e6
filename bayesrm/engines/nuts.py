"""The no-U-turn sampler: exact up to Monte Carlo error, and the judge of every approximation."""

import dataclasses
import enum
import time
import warnings
from typing import Any

import torch

from .._typing import Tensor
from ..data import Comparisons, Demonstrations, Trajectories
from ..errors import ArgumentError, ConvergenceWarning, EngineError
from ..programs import InverseRL, RewardModel
from ..rewards import LoRA
from ._chains import chain_summary
from ._problem import Problem, make_problem
from ._settings import check_choice, check_positive, check_real
from .draws_posterior import DrawsPosterior
from .trajectory_posterior import TrajectoryPosterior


class MassMatrix(enum.StrEnum):
    """The metric of the sampler's kinetic energy."""

    AUTO = "auto"
    """`laplace` for rewards that are linear in their parameters, else `diagonal`."""
    LAPLACE = "laplace"
    """The posterior covariance by Laplace's approximation, dense and kept fixed: found in no time and nearly ideal."""
    DIAGONAL = "diagonal"
    """Adapted during warm-up (Stan's default)."""
    DENSE = "dense"
    """Adapted during warm-up."""


class SamplerBackend(enum.StrEnum):
    """The library that samples."""

    NUMPYRO = "numpyro"
    """Compiled by JAX."""
    PYRO = "pyro"
    """Without JAX, slow: for likelihoods that only torch can run, and as a check."""


class ChainMethod(enum.StrEnum):
    """How several chains are run under NumPyro."""

    SEQUENTIAL = "sequential"
    """One after another: best on few cores, where a chain need not wait for the longest trajectory of the others."""
    VECTORIZED = "vectorized"
    """All at once: best where arithmetic is cheap beside the overhead of a step, as on an accelerator."""


@dataclasses.dataclass(frozen=True)
class NUTS:
    """Markov chains over (parameters, likelihood latents) by the no-U-turn sampler (Hoffman & Gelman 2014, 1111.4246).

    Works in coordinates whitened by the prior; for linear heads and tangents in the row space of the comparisons where
    it is smaller, and then the complement keeps the prior exactly. The density is the declared program's, latents in
    unconstrained space with the log Jacobian; that it is the same under JAX and torch is checked before sampling. A
    density is compiled once for all data of one shape.

    Of an `InverseRL` whose dynamics are known it samples the rewards of all states: the exact posterior of what `AVRIL`
    approximates, as a `TrajectoryPosterior`.

    Attributes:
        num_chains: Chains, each from a start of its own: twice as spread as Laplace's approximation for linear heads,
            else uniform in (-2, 2) (Stan's default). Equal results from spread starts are the evidence of convergence.
        num_warmup: Steps of each chain that adapt the sampler and are thrown away.
        num_samples: Draws kept from each chain.
        target_accept: Mean acceptance probability that the step size is adapted to; raise it where chains diverge.
        max_tree_depth: A trajectory has at most `2^max_tree_depth` steps.
        mass_matrix: A `MassMatrix`.
        chain_method: A `ChainMethod`.
        backend: A `SamplerBackend`.
        memory_gib: Refuse to start work that needs more memory than this.

    Raises:
        ArgumentError: A setting is not one of the known values.

    Example:
        >>> import bayesrm as brm, numpy as np
        >>> data = brm.Comparisons.from_arrays(np.eye(2), candidates=[[0, 1]] * 3, outcome=[0, 0, 1])
        >>> model = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())
        >>> posterior = brm.fit(model, data, inference=NUTS(num_chains=2, num_warmup=300, num_samples=500))
        >>> len(posterior), posterior.report.diagnostics["divergences"]
        (1000, 0)
    """

    num_chains: int = 4
    num_warmup: int = 500
    num_samples: int = 500
    target_accept: float = 0.8
    max_tree_depth: int = 10
    mass_matrix: str = "auto"
    chain_method: str = "sequential"
    backend: str = "numpyro"
    memory_gib: float = 8.0

    #: Programs that the engine serves; `InverseRL` where the dynamics are known.
    programs = (RewardModel, InverseRL)

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_warmup", "num_samples", "max_tree_depth"):
            check_positive(name, getattr(self, name))
        check_choice("mass_matrix", self.mass_matrix, MassMatrix)
        check_choice("backend", self.backend, SamplerBackend)
        check_choice("chain_method", self.chain_method, ChainMethod)
        check_real("target_accept", self.target_accept)
        if not self.target_accept < 1.0:
            raise ArgumentError(f"`target_accept` is {self.target_accept}; it is a probability between 0 and 1")
        check_real("memory_gib", self.memory_gib)

    def fit(
        self,
        program: RewardModel | InverseRL,
        data: Comparisons | Demonstrations | Trajectories,
        *,
        seed: int,
        progress: bool,
    ) -> DrawsPosterior | TrajectoryPosterior:
        """The posterior as draws, see `bayesrm.fit`."""
        if isinstance(program, InverseRL):
            from ._exact_irl import fit_known

            if not isinstance(data, Trajectories):
                raise EngineError("NUTS samples the rewards of states with known dynamics alone; fit text with AVRIL()")
            return fit_known(self, program, data, seed=seed, progress=progress)
        assert isinstance(data, Comparisons)
        begin = time.perf_counter()
        if isinstance(program.reward, LoRA):
            raise EngineError(
                "NUTS cannot sample the weights of a LoRA reward; fit it with Laplace(...) and sample its tangent, "
                "`bayesrm.fit(posterior.program, data, inference=NUTS())`, or use SVI(...) or Ensemble(...)"
            )
        linear = program.head.is_linear
        problem = make_problem(
            program, data, seed=seed, progress=progress, memory_gib=self.memory_gib, find_mode=linear,
            square_matrices=3 if self.mass_matrix == "dense" else 0,
        )  # fmt: skip
        precision = problem.precision()
        covariance = None
        if self.mass_matrix == "laplace" or (self.mass_matrix == "auto" and linear):
            if precision is None:
                raise EngineError(
                    "`mass_matrix='laplace'` needs a head that is linear in its parameters and a positive definite "
                    "curvature at the mode; use mass_matrix='diagonal'"
                )
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        starts = self._starts(problem, precision, seed)
        if self.backend == "pyro":
            from ._pyro_chains import run_chains as run_pyro

            x, stats = run_pyro(self, problem, starts, covariance, seed=seed, progress=progress)
        else:
            from ._numpyro_chains import run_chains

            x, stats = run_chains(self, problem, starts, covariance, seed=seed, progress=progress)
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = chain_summary(x, stats, self.num_chains, 2**self.max_tree_depth - 1)
        _warn(found)
        report = dataclasses.replace(
            problem.report(self, settings, data, seed),
            converged=not found["problems"],
            gradient_norm=0.0 if problem.mode is None else problem.gradient_norm,
            iterations=self.num_chains * (self.num_warmup + self.num_samples),
            diagnostics=found,
            seconds=time.perf_counter() - begin,
        )
        return problem.posterior_of_draws(report, x, num_chains=self.num_chains, sample_stats=stats)

    def _starts(self, problem: Problem, precision: Tensor | None, seed: int) -> Tensor:
        """A start for each chain, shape `(num_chains, R + Q)`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_chains, problem.dimension)
        if problem.mode is not None and precision is not None:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            factor = torch.linalg.cholesky(precision)
            spread: Tensor = torch.linalg.solve_triangular(factor.T, noise.T, upper=True).T
            return problem.mode + 2.0 * spread
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        starts = 4.0 * uniform - 2.0
        starts[:, problem.size :] += problem.density.initial_latents
        return starts


def _warn(found: dict[str, Any]) -> None:
    if found["problems"]:
        warnings.warn("NUTS: " + "; ".join(found["problems"]), ConvergenceWarning, stacklevel=4)

"""The exact posterior of inverse reinforcement learning with known dynamics, by the no-U-turn sampler."""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from .._typing import Array, Tensor
from ..backend import convert
from ..data import Trajectories
from ..data.groups import FeedbackGroup
from ..errors import ConvergenceWarning, DataError, EngineError
from ..programs import InverseRL
from ..rewards import StateReward
from ._chains import chain_summary
from ._density import FeedbackDensity, LatentSite
from ._jax_density import double_precision
from ._numpyro_chains import _STATISTICS, _compile
from ._settings import settings_of
from ._state_rewards import DrawnRewards
from ._trajectory_digest import trajectory_digest
from ._trajectory_draws import prior_latents
from .report import FitReport
from .trajectory_posterior import TrajectoryPosterior

if TYPE_CHECKING:
    from .nuts import NUTS

#: Kernels that are kept: compiling one takes longer than running it.
_KEPT = 8
_COMPILED: dict[Any, tuple[Any, Any]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class KnownDensity:
    """The log joint that `InverseRL.with_dynamics` declares, at x = (rewards in prior deviations, latents).

    Attributes:
        program: The program.
        size: Number of rewards.
        sites: Latents of the likelihood of preferences.
        templates: The groups of preferences, of which only what is no array is used.
    """

    program: InverseRL
    size: int
    sites: tuple[LatentSite, ...]
    templates: tuple[FeedbackGroup, ...]

    def __call__(self, x: Array, tree: tuple[Any, ...]) -> Array:
        """The log joint; `tree` holds counts, visits and the arrays of the groups."""
        from numpyro.infer.util import potential_energy

        counts, visits, arrays = tree
        queue = iter(arrays)
        groups = [g.map_arrays(lambda _: next(queue)) for g in self.templates]
        given = {"reward": x[: self.size] * self.program.reward_precision**-0.5}
        for s in self.sites:
            own = x[self.size + s.start : self.size + s.stop]
            given[s.name] = own.reshape(s.unconstrained_shape)
        energy: Array = potential_energy(self.program.with_dynamics, (counts, visits, groups), {}, given)
        return -energy


def fit_known(
    engine: "NUTS", program: InverseRL, data: Trajectories, *, seed: int, progress: bool
) -> TrajectoryPosterior:
    """The posterior of the rewards of all states as draws; see `NUTS`.

    Raises:
        EngineError: The dynamics are not known, or a setting is for other programs.
        DataError: The data hold neither demonstrations nor preferences, or do not fit the program.
    """
    begin = time.perf_counter()
    reward = program.reward
    if not isinstance(reward, StateReward) or reward.dynamics is None or reward.num_states is None:
        raise EngineError(
            "NUTS needs the dynamics: give `StateReward(num_states=..., dynamics=TabularMDP(...))`, or fit with AVRIL()"
        )
    if program.discount >= 1.0:
        raise EngineError("`discount` is 1; soft values need one below 1, where the entropy of the policy stays finite")
    if engine.backend != "numpyro" or engine.mass_matrix == "laplace" or engine.chain_method != "sequential":
        raise EngineError(
            "inverse reinforcement learning is sampled with backend='numpyro', chain_method='sequential' and an "
            "adapted mass_matrix ('diagonal' or 'dense')"
        )
    reward.check(data)
    if not data.demonstrated.any() and not len(data.preferences):
        raise DataError("the trajectories hold neither demonstrations nor preferences; there is nothing to learn from")
    counts, visits = tables(data, reward.num_states, reward.num_actions)
    groups = data.groups()
    density = FeedbackDensity(program.feedback_model, groups) if groups else None
    width = reward.num_actions if reward.by_action else 1
    known = KnownDensity(
        program, reward.num_states * width, tuple(density.sites) if density else (),
        tuple(g.map_arrays(lambda a: a[:1]) for g in groups),
    )  # fmt: skip
    start = torch.zeros(0, dtype=torch.float64) if density is None else density.initial_latents
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(engine.num_chains, known.size + len(start), generator=generator, dtype=torch.float64)
    starts = 4.0 * spread - 2.0
    starts[:, known.size :] += start
    x, stats = _run(engine, known, density, starts, (counts, visits, groups), seed)
    found = chain_summary(x, stats, engine.num_chains, 2**engine.max_tree_depth - 1)
    if found["problems"]:
        warnings.warn("NUTS: " + "; ".join(found["problems"]), ConvergenceWarning, stacklevel=5)
    report = FitReport(
        engine={"name": "NUTS", "settings": settings_of(engine)},
        seed=seed,
        seconds=time.perf_counter() - begin,
        num_rows=len(data.actions),
        num_items=len(np.unique(data.states)),
        num_prompts=len(data),
        num_parameters=known.size,
        num_coordinates=x.shape[1],
        converged=not found["problems"],
        gradient_norm=0.0,
        iterations=engine.num_chains * (engine.num_warmup + engine.num_samples),
        prior_precision=program.reward_precision,
        diagnostics=found,
        data_digest=trajectory_digest(data),
    )
    values = (x[:, : known.size] * program.reward_precision**-0.5).reshape(len(x), reward.num_states, width)
    # Demonstrations say nothing of what judges preferences.
    latents = prior_latents(program, len(x), seed) if density is None else density.constrain(x[:, known.size :])
    return TrajectoryPosterior(program, report, DrawnRewards(program, values, engine.num_chains, stats), latents)


def tables(data: Trajectories, num_states: int, num_actions: int) -> tuple[Tensor, Tensor]:
    """How often demonstrations took each action in each state, `(S, A)`, and each trajectory did, `(N, S, A)`."""
    visits = torch.zeros(len(data), num_states, num_actions, dtype=torch.float64)
    place = tuple(torch.as_tensor(index) for index in (data.owners, data.states, data.actions))
    visits.index_put_(place, visits.new_ones(()), accumulate=True)
    counts = visits[torch.as_tensor(data.demonstrated)].sum(0)
    # Sums of rewards are of interest to preferences alone.
    return counts, visits if len(data.preferences) else visits[:0]


def _run(
    engine: "NUTS",
    known: KnownDensity,
    feedback: FeedbackDensity | None,
    starts: Tensor,
    data: tuple[Tensor, Tensor, Sequence[FeedbackGroup]],
    seed: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of x, shape `(chains * draws, D)`, chain after chain, with what was recorded for each."""
    with double_precision():
        import jax

        like = jax.numpy.zeros(0)
        leaves: list[Array] = []

        def collect(array: Tensor) -> Tensor:
            leaves.append(convert(array, like))
            return array

        for g in data[2]:
            g.map_arrays(collect)
        tree = (convert(data[0], like), convert(data[1], like), leaves)
        _check_agreement(known, feedback, starts[0], data, tree)
        total = engine.num_warmup + engine.num_samples
        key = (
            *(known.program, tuple(data[0].shape), tuple(data[1].shape), tuple(g.label for g in known.templates)),
            *(g.comparison.num_rows for g in known.templates),
            *(engine.num_warmup, total, engine.target_accept, engine.max_tree_depth, engine.mass_matrix),
        )
        kernel = _COMPILED.get(key) if _hashable(key) else None
        if kernel is None:
            kernel = _compile(engine, known, False, total, False)
            if _hashable(key):
                if len(_COMPILED) >= _KEPT:
                    _COMPILED.pop(next(iter(_COMPILED)))
                _COMPILED[key] = kernel
        begin, advance = kernel
        draws, records = [], []
        for random, initial in zip(jax.random.split(jax.random.PRNGKey(seed), len(starts)), starts, strict=True):
            state = begin(random, convert(initial, like), None, tree)
            _, (x, record) = advance(state, tree)
            draws.append(np.asarray(x)[engine.num_warmup :])
            records.append(np.asarray(record)[engine.num_warmup :])
    x, record = (torch.from_numpy(np.concatenate(parts)) for parts in (draws, records))
    found = dict(zip(_STATISTICS, record.T.contiguous(), strict=True))
    return x, found | {"diverging": found["diverging"].bool(), "num_steps": found["num_steps"].long()}


def _check_agreement(
    known: KnownDensity,
    feedback: FeedbackDensity | None,
    x: Tensor,
    data: tuple[Tensor, Tensor, Sequence[FeedbackGroup]],
    tree: tuple[Any, ...],
) -> None:
    """Raises `EngineError` unless the log joint under JAX is that of Pyro's trace of the program."""
    reward = x[: known.size] * known.program.reward_precision**-0.5
    given = {"reward": reward}
    jacobian = 0.0
    for s in known.sites:
        assert feedback is not None
        own = x[known.size + s.start : known.size + s.stop].reshape(s.unconstrained_shape)
        given[s.name] = s.transform(own)
        jacobian += float(s.transform.log_abs_det_jacobian(own, given[s.name]).sum())
    conditioned = pyro.poutine.condition(known.program.with_dynamics, data=given)
    with torch.no_grad():
        expected = float(pyro.poutine.trace(conditioned).get_trace(*data).log_prob_sum()) + jacobian
    try:
        found = float(known(convert(x, tree[0]), tree))
    except (TypeError, AttributeError) as error:
        raise EngineError(
            f"the program runs under torch only ({type(error).__name__}: {str(error).splitlines()[0]}); write the "
            "likelihood with `bayesrm.ops` and `dist` alone"
        ) from error
    if not abs(found - expected) <= 1e-8 * (1.0 + abs(expected)):
        raise EngineError(
            f"the log joint is {found!r} under NumPyro and {expected!r} under Pyro at the same point; write the "
            "likelihood with `bayesrm.ops` and `dist` alone"
        )


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True

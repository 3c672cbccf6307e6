"""The log joint of a program in JAX, compiled once for all data sets of one shape."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._typing import Array, Tensor
from ..backend import Recorder, convert
from ..data.groups import FeedbackGroup
from ..errors import EngineError
from ..programs import RewardModel
from ._density import LatentSite
from ._problem import Problem

#: Compiled densities that are kept.
_KEPT = 32


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Makes JAX compute in float64 inside the block, in this thread alone."""
    try:
        import jax
        import numpyro  # noqa: F401
    except ImportError as error:
        raise EngineError(
            "this engine runs under NumPyro, which is not installed: `pip install 'bayesrm[jax]'`; or use Laplace, "
            "SVI, Ensemble, or NUTS(backend='pyro')"
        ) from error
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What a density depends on besides its structure: the arguments of its compiled form.

    Attributes:
        groups: Arrays of the groups, in the order of `FeedbackGroup.map_arrays`.
        features: Features of a head that is not linear, shape `(items, D)`, else `None`.
        design: Derivative of rewards in z for a linear head, shape `(items, R)`, else `None`.
        offset: Its rewards at z = 0, shape `(items,)`, else `None`.
        scale: Prior standard deviation of the parameters of a head that is not linear, shape `(P,)`, else `None`.
    """

    groups: list[Array]
    features: Array | None
    design: Array | None
    offset: Array | None
    scale: Array | None

    def tree(self) -> tuple[Any, ...]:
        """As a tree that JAX takes."""
        return (self.groups, self.features, self.design, self.offset, self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class JaxDensity:
    """log p(feedback, latents | rewards(z)) + log N(z; 0, I), a pure function of x = (z, latents) and arrays.

    Attributes:
        program: The reward model, of which likelihood and head are used.
        templates: The groups, of which only what is no array is used.
        sites: Latents of the likelihood.
        size: Number of coordinates R.
        shapes: Shapes of the parameters of a head that is not linear.
    """

    program: RewardModel
    templates: tuple[FeedbackGroup, ...]
    sites: tuple[LatentSite, ...]
    size: int
    shapes: Mapping[str, tuple[int, ...]] | None

    def __call__(self, x: Array, tree: tuple[Any, ...]) -> Array:
        """The log joint at x, shape `(R + Q,)`; `tree` is `Arrays.tree()`."""
        import jax.numpy as jnp

        arrays, features, design, offset, scale = tree
        z = x[: self.size]
        if self.shapes is None:
            rewards = offset + design @ z
        else:
            assert scale is not None
            rewards = self.program.head.apply(_split(z * scale, self.shapes), features)
        queue = iter(arrays)
        groups = [g.map_arrays(lambda _: next(queue)) for g in self.templates]
        given, transforms = {}, self._transforms(x, groups)
        for s in self.sites:
            given[s.name] = transforms[s.name](
                x[self.size + s.start : self.size + s.stop].reshape(s.unconstrained_shape)
            )
        recorder = Recorder(given)
        with recorder:
            distributions = self.program.feedback([rewards[g.items] for g in groups], [g.comparison for g in groups])
        total = -0.5 * jnp.sum(z**2) - 0.5 * self.size * np.log(2 * np.pi)
        for d, g in zip(distributions, groups, strict=True):
            # A masked row may have probability zero, and 0 * -inf is not 0.
            total += jnp.sum(jnp.where(g.weight == 0, 0.0, g.weight * d.log_prob(g.outcome)))
        for s in self.sites:
            fn, value = recorder.sites[s.name]
            u = x[self.size + s.start : self.size + s.stop].reshape(s.unconstrained_shape)
            total += jnp.sum(fn.log_prob(value)) + jnp.sum(transforms[s.name].log_abs_det_jacobian(u, value))
        return total

    def _transforms(self, x: Array, groups: Sequence[FeedbackGroup]) -> dict[str, Any]:
        """The map from unconstrained to constrained space of each latent."""
        if not self.sites:
            return {}
        import jax.numpy as jnp
        from numpyro.distributions import biject_to

        finder = _Finder(x)
        with finder:
            self.program.feedback([jnp.zeros(g.items.shape, x.dtype) for g in groups], [g.comparison for g in groups])
        return {name: biject_to(fn.support) for name, (fn, _) in finder.sites.items()}


class _Finder(Recorder):
    """Gives every site some value of its support, so that the sites can be listed."""

    def __init__(self, like: Array) -> None:
        super().__init__({})
        self._like = like

    def missing(self, name: str, fn: Any) -> Array:
        import jax.numpy as jnp
        from numpyro.distributions import biject_to

        transform = biject_to(fn.support)
        shape = transform.inverse_shape(tuple(fn.batch_shape) + tuple(fn.event_shape))
        return transform(jnp.zeros(shape, self._like.dtype))


def _split(vector: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    parts, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape))
        parts[name] = vector[start:stop].reshape(shape)
        start = stop
    return parts


def arrays_of(problem: Problem) -> Arrays:
    """The arrays of a problem as float64 JAX arrays; call inside `double_precision`."""
    import jax.numpy as jnp

    like = jnp.zeros(0)
    leaves: list[Array] = []

    def collect(array: Tensor) -> Tensor:
        leaves.append(convert(array, like))
        return array

    for g in problem.density.groups:
        g.map_arrays(collect)
    linear = problem.design is not None
    return Arrays(
        leaves,
        None if linear else convert(problem.features, like),
        convert(problem.design, like) if linear else None,
        convert(problem.offset, like) if linear else None,
        None if linear else convert(problem.whitening.scale, like),
    )


_LOCK = threading.Lock()
_COMPILED: dict[Any, tuple[JaxDensity, dict[Any, Any]]] = {}


def density_of(problem: Problem) -> tuple[JaxDensity, dict[Any, Any]]:
    """The density of a problem's structure, and a place to keep what was compiled for it.

    Both are the same objects for every data set of that structure.

    Raises:
        EngineError: Under JAX the program has another density than under torch.
    """
    key = _structure(problem)
    with _LOCK:
        found = _COMPILED.get(key)
    if found is None:
        found = _make(problem), {}
        _check(found[0], problem)
        with _LOCK:
            if len(_COMPILED) >= _KEPT:
                _COMPILED.pop(next(iter(_COMPILED)))
            _COMPILED[key] = found
    return found


def _make(problem: Problem) -> JaxDensity:
    # Arrays of the templates are never read: a row of each keeps the data themselves from living as long as the cache.
    templates = tuple(g.map_arrays(lambda a: a[:1]) for g in problem.density.groups)
    head = problem.program.head
    shapes = None if problem.design is not None else head.parameter_shapes(problem.raw.shape[1])
    program = problem.program
    if shapes is None:
        from ..rewards import Linear

        # A tangent holds its network; of a linear head only the design is needed.
        program = dataclasses.replace(program, reward=Linear())
    return JaxDensity(program, templates, tuple(problem.density.sites), problem.size, shapes)


def _structure(problem: Problem) -> Any:
    head = "linear" if problem.design is not None else problem.program.head
    groups = []
    for g in problem.density.groups:
        c = g.comparison
        static = (c.kind, c.num_rows, c.num_candidates, c.depth, c.num_levels, c.num_annotators)
        groups.append((static, c.annotator is not None, c.margin is not None, c.lengths is not None))
    likelihood: Any = problem.program.likelihood
    if isinstance(likelihood, Mapping):
        likelihood = tuple(sorted(likelihood.items(), key=lambda item: item[0]))
    key = (head, likelihood, tuple(groups), tuple(problem.raw.shape), problem.size)
    try:
        hash(key)
    except TypeError:
        # A likelihood that cannot be compared is compiled anew for each fit.
        return object()
    return key


def _check(density: JaxDensity, problem: Problem) -> None:
    """Compares the log joint at two points with that under torch."""
    import jax

    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(2, problem.dimension, generator=generator, dtype=torch.float64)
    x[:, problem.size :] += problem.density.initial_latents
    with torch.no_grad():
        expected = problem.log_joints(x)
    like = jax.numpy.zeros(0)
    tree = arrays_of(problem).tree()
    evaluate = jax.jit(density.__call__)
    for row, value in zip(x, expected.tolist(), strict=True):
        found = float(evaluate(convert(row, like), tree))
        if not abs(found - value) <= 1e-8 * (1.0 + abs(value)):
            raise EngineError(
                f"the log joint is {found!r} under NumPyro and {value!r} under Pyro at the same point; write the "
                "likelihood with `bayesrm.ops` and `dist` alone, or use NUTS(backend='pyro')"
            )

"""One vocabulary for torch/Pyro and JAX/NumPyro: `ops`, `dist`, `sample`, `plate`, `scale`.

A likelihood or a head written with these names runs under both backends. The backend follows the arrays: `ops` looks at
its arguments, and `dist`, `sample` and `plate`, which may see none, look at a context variable that `following` sets
for the duration of a program. Context variables are local to a thread (and to an asyncio task), so two programs may run
under two backends at the same time; nothing global is switched and no random state is touched.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import pyro
import pyro.distributions
import torch

from ._typing import Array
from .errors import ArgumentError, LikelihoodError

__all__ = ["Backend", "Random", "active", "convert", "dist", "following", "ops", "plate", "sample", "scale"]

Axis = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where a program runs: the library, and the dtype and device given to constants.

    Attributes:
        name: `"torch"` or `"jax"`.
        dtype: Floating dtype of numbers that enter a program as Python floats.
        device: Torch device of such numbers (`None` under JAX).
    """

    name: str
    dtype: Any
    device: torch.device | None = None


_ACTIVE: ContextVar[Backend | None] = ContextVar("bayesrm_backend", default=None)
# Values of the sample sites drawn so far by the likelihood that is being called, see `shared_latents`.
_SHARED: ContextVar[tuple[str, dict[str, Any]] | None] = ContextVar("bayesrm_shared_latents", default=None)
_RECORDER: ContextVar["Recorder | None"] = ContextVar("bayesrm_recorder", default=None)


def active() -> Backend:
    """The backend of the running program; torch with its default dtype outside any program."""
    return _ACTIVE.get() or Backend("torch", torch.get_default_dtype(), torch.device("cpu"))


def _name_of(*values: Any) -> str | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return "torch"
        if type(value).__module__.partition(".")[0] in ("jax", "jaxlib"):
            return "jax"
        if isinstance(value, list | tuple):
            inner = _name_of(*value)
            if inner is not None:
                return inner
    return None


@contextlib.contextmanager
def following(array: Array) -> Iterator[Backend]:
    """Makes the library, dtype and device of `array` those of `dist`, `sample` and `plate` inside the block.

    Example:
        >>> import torch
        >>> with following(torch.zeros(2, dtype=torch.float64)):
        ...     dist.Normal(0.0, 1.0).loc.dtype
        torch.float64
    """
    name = _name_of(array)
    if name is None:
        raise ArgumentError(f"`array` is a {type(array).__name__}; a torch or JAX array is needed to choose a backend")
    backend = Backend(name, array.dtype, array.device if name == "torch" else None)
    token = _ACTIVE.set(backend)
    try:
        yield backend
    finally:
        _ACTIVE.reset(token)


def convert(value: Array, like: Array) -> Array:
    """`value` as an array of the library (and, if floating, the dtype and device) of `like`."""
    if _name_of(like) == "torch":
        # A Python float goes straight to the dtype of `like`: by way of float32 it would lose half of its digits.
        dtype = like.dtype if isinstance(value, float) else None
        tensor = torch.as_tensor(value, dtype=dtype, device=like.device)
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor
    jnp = importlib.import_module("jax.numpy")
    array = jnp.asarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
    return array.astype(like.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _jnp() -> Any:
    return importlib.import_module("jax.numpy")


class _Ops:
    """Array functions with one spelling for both libraries; reductions take `axis`, never `dim`.

    Anything a likelihood or head of the field needs and that differs between the libraries is here; arithmetic,
    comparison, indexing and `@` are the arrays' own.
    """

    @staticmethod
    def _elementwise(name: str, x: Array) -> Array:
        return getattr(torch if _name_of(x) == "torch" else _jnp(), name)(x)

    def exp(self, x: Array) -> Array:
        """Exponential."""
        return self._elementwise("exp", x)

    def expm1(self, x: Array) -> Array:
        """`exp(x) - 1` without cancellation."""
        return self._elementwise("expm1", x)

    def log(self, x: Array) -> Array:
        """Natural logarithm."""
        return self._elementwise("log", x)

    def log1p(self, x: Array) -> Array:
        """`log(1 + x)` without cancellation."""
        return self._elementwise("log1p", x)

    def sqrt(self, x: Array) -> Array:
        """Square root."""
        return self._elementwise("sqrt", x)

    def abs(self, x: Array) -> Array:
        """Absolute value."""
        return self._elementwise("abs", x)

    def tanh(self, x: Array) -> Array:
        """Hyperbolic tangent."""
        return self._elementwise("tanh", x)

    def relu(self, x: Array) -> Array:
        """`max(x, 0)`."""
        return torch.relu(x) if _name_of(x) == "torch" else importlib.import_module("jax.nn").relu(x)

    def gelu(self, x: Array) -> Array:
        """Gaussian error linear unit (exact, not the tanh approximation)."""
        if _name_of(x) == "torch":
            return torch.nn.functional.gelu(x)
        return importlib.import_module("jax.nn").gelu(x, approximate=False)

    def sigmoid(self, x: Array) -> Array:
        """Logistic function."""
        return torch.sigmoid(x) if _name_of(x) == "torch" else importlib.import_module("jax.nn").sigmoid(x)

    def softplus(self, x: Array) -> Array:
        """`log(1 + exp(x))`."""
        return -self.log_sigmoid(-x)

    def log_sigmoid(self, x: Array) -> Array:
        """`log(sigmoid(x))`, finite for any finite x."""
        if _name_of(x) == "torch":
            return torch.nn.functional.logsigmoid(x)
        return importlib.import_module("jax.nn").log_sigmoid(x)

    def log_ndtr(self, x: Array) -> Array:
        """Logarithm of the standard normal distribution function, finite far in the tail."""
        if _name_of(x) == "torch":
            return torch.special.log_ndtr(x)
        return importlib.import_module("jax.scipy.special").log_ndtr(x)

    def logaddexp(self, x: Array, y: Array) -> Array:
        """`log(exp(x) + exp(y))`."""
        if _name_of(x, y) == "torch":
            # Where x and y are far apart, the second derivative of torch.logaddexp is inf / inf; not so logsumexp's.
            return torch.logsumexp(torch.stack(torch.broadcast_tensors(x, y)), dim=0)
        return _jnp().logaddexp(x, y)

    def logsumexp(self, x: Array, axis: Axis = -1) -> Array:
        """`log(sum(exp(x)))` over `axis`."""
        if _name_of(x) == "torch":
            return torch.logsumexp(x, dim=axis)
        return importlib.import_module("jax.scipy.special").logsumexp(x, axis=axis)

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        """`x - logsumexp(x)` over `axis`."""
        if _name_of(x) == "torch":
            return torch.log_softmax(x, dim=axis)
        return importlib.import_module("jax.nn").log_softmax(x, axis=axis)

    def sum(self, x: Array, axis: Axis | None = None) -> Array:
        """Sum over `axis` (over everything when `None`)."""
        return x.sum() if axis is None else x.sum(axis)

    def cumsum(self, x: Array, axis: int) -> Array:
        """Cumulative sum along `axis`."""
        return x.cumsum(axis)

    def stack(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Joins arrays along a new axis."""
        return torch.stack(list(arrays), dim=axis) if _name_of(*arrays) == "torch" else _jnp().stack(arrays, axis=axis)

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array:
        """Joins arrays along an existing axis."""
        if _name_of(*arrays) == "torch":
            return torch.cat(list(arrays), dim=axis)
        return _jnp().concatenate(arrays, axis=axis)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Elementwise choice between `x` and `y`."""
        return torch.where(condition, x, y) if _name_of(condition) == "torch" else _jnp().where(condition, x, y)

    def clip(self, x: Array, low: float | None = None, high: float | None = None) -> Array:
        """Limits the values of `x`."""
        return torch.clamp(x, low, high) if _name_of(x) == "torch" else _jnp().clip(x, low, high)

    def flip(self, x: Array, axis: int) -> Array:
        """Reverses the order along `axis`."""
        return torch.flip(x, dims=(axis,)) if _name_of(x) == "torch" else _jnp().flip(x, axis=axis)

    def argsort(self, x: Array, axis: int = -1) -> Array:
        """Indices that sort `x` in ascending order along `axis`."""
        return torch.argsort(x, dim=axis) if _name_of(x) == "torch" else _jnp().argsort(x, axis=axis)

    def take_along_axis(self, x: Array, indices: Array, axis: int) -> Array:
        """Values of `x` at `indices` along `axis`; the other axes broadcast."""
        if indices.ndim > x.ndim:
            x = x[(None,) * (indices.ndim - x.ndim)]
        if _name_of(x) == "torch":
            return torch.take_along_dim(x, indices, dim=axis)
        return _jnp().take_along_axis(x, indices, axis=axis)

    def asarray(self, value: Any, like: Array) -> Array:
        """`value` as an array of the library, dtype (if floating) and device of `like`."""
        return convert(value, like)


ops = _Ops()


class _Distributions:
    """The distributions of the active backend; Python numbers become arrays of the program's dtype and device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return _constructor(name)


class _Bernoulli(pyro.distributions.Bernoulli):  # type: ignore[misc]
    """Torch's scores floating answers alone; feedback is integer, as NumPyro takes it."""

    def log_prob(self, value: Any) -> Any:
        return super().log_prob(value.to(self.logits.dtype))


class _Categorical(pyro.distributions.Categorical):  # type: ignore[misc]
    """Of two outcomes the log odds alone count: no digits are lost where one is nearly certain."""

    def log_prob(self, value: Any) -> Any:
        if self._num_events != 2:
            return super().log_prob(value)
        odds = self.logits[..., 0] - self.logits[..., 1]
        return torch.nn.functional.logsigmoid(torch.where(value == 0, odds, -odds))


#: Distributions under Pyro that differ from Pyro's own.
_TORCH: dict[str, Any] = {"Bernoulli": _Bernoulli, "Categorical": _Categorical}


@functools.cache
def _numpyro_categorical() -> Any:
    """NumPyro's categorical distribution without its look-up, whose derivative is a slow scatter on a CPU."""
    jax, jnp = importlib.import_module("jax"), _jnp()
    base = importlib.import_module("numpyro.distributions").CategoricalLogits

    class Categorical(base):  # type: ignore[misc, valid-type]
        def log_prob(self, value: Any) -> Any:
            if self.logits.shape[-1] == 2:
                odds = self.logits[..., 0] - self.logits[..., 1]
                s = jnp.where(value == 0, odds, -odds)
                # jax.nn.log_sigmoid is the same, with a derivative that takes twice as many exponentials.
                return jnp.minimum(s, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(s)))
            chosen = jnp.arange(self.logits.shape[-1]) == jnp.asarray(value)[..., None]
            return jnp.where(chosen, jax.nn.log_softmax(self.logits), 0.0).sum(-1)

    return Categorical


@functools.cache
def _constructor(name: str) -> Callable[..., Any]:
    def construct(*args: Any, **kwargs: Any) -> Any:
        backend = active()
        values = [*args, *kwargs.values()]
        if _RECORDER.get() is not None:
            # Engines evaluate a program thousands of times; it has been validated when it was first run.
            kwargs.setdefault("validate_args", False)
        if (_name_of(*values) or backend.name) == "jax":
            if name == "Categorical" and not args and "logits" in kwargs:
                return _numpyro_categorical()(**kwargs)
            return getattr(importlib.import_module("numpyro.distributions"), name)(*args, **kwargs)
        like = next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)
        dtype, device = (backend.dtype, backend.device) if like is None else (like.dtype, like.device)
        constructor = _TORCH.get(name) or getattr(pyro.distributions, name)
        constraints = getattr(constructor, "arg_constraints", {})
        names = _parameter_names(constructor)
        positional = [_number(v, constraints.get(p), dtype, device) for p, v in zip(names, args, strict=False)]
        named = {k: _number(v, constraints.get(k), dtype, device) for k, v in kwargs.items()}
        return constructor(*positional, *args[len(names) :], **named)

    construct.__name__ = name
    return construct


@functools.cache
def _parameter_names(constructor: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(constructor).parameters)


def _number(v: Any, constraint: Any, dtype: Any, device: torch.device | None) -> Any:
    # Whole numbers too, where the parameter is a real one: `Normal(0, 1)` must not bring in another dtype.
    real = constraint is not None and not constraint.is_discrete
    if isinstance(v, float) or (real and isinstance(v, int) and not isinstance(v, bool)):
        return torch.tensor(v, dtype=dtype, device=device)
    return v


dist = _Distributions()


class Recorder:
    """Runs a program with some of its sites given, without Pyro's or NumPyro's handler stack.

    Both libraries keep one handler stack for the whole process, so two threads cannot run programs at once, and each
    statement costs tens of microseconds. Engines therefore evaluate programs under a `Recorder`, which lives in a
    context variable; that the result equals the trace of the same program under the library's own handlers is tested.

    Attributes:
        given: Values of latent sites, by name.
        sites: Distribution and value of each unobserved site, in order of declaration.
    """

    def __init__(self, given: Mapping[str, Array]) -> None:
        self.given = given
        self.sites: dict[str, tuple[Any, Array]] = {}
        self._plates: list[int] = []

    def __enter__(self) -> "Recorder":
        self._token = _RECORDER.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _RECORDER.reset(self._token)

    @contextlib.contextmanager
    def plate(self, size: int) -> Iterator[None]:
        """Counterpart of `plate`."""
        self._plates.append(size)
        try:
            yield
        finally:
            self._plates.pop()

    def sample(self, name: str, fn: Any) -> Array:
        """Counterpart of `sample` for an unobserved site: a given value, or the value that `missing` supplies."""
        if name in self.sites:
            raise LikelihoodError(
                f"site `{name}` is declared twice; each `sample` statement of a program needs its own name"
            )
        shape = torch.broadcast_shapes(tuple(reversed(self._plates)), tuple(fn.batch_shape))
        fn = fn if tuple(fn.batch_shape) == shape else fn.expand(shape)
        value = self.given[name] if name in self.given else self.missing(name, fn)
        self.sites[name] = (fn, value)
        return value

    def missing(self, name: str, fn: Any) -> Array:
        """Value of a site that is not given; subclasses decide."""
        raise LikelihoodError(f"site `{name}` is not among the known latents {sorted(self.given)}")


class PriorRecorder(Recorder):
    """A recorder that draws the sites it is not given from their priors, with torch's generator."""

    def missing(self, name: str, fn: Any) -> Array:
        """A draw of the site's prior."""
        return fn.sample()


def sample(name: str, fn: Any, *, obs: Array | None = None) -> Array:
    """Declares a random variable, like `pyro.sample` and `numpyro.sample`.

    Inside a likelihood, the second declaration of a name returns the first one's value: a likelihood is called once for
    each group of rows, and its latents are shared by all of them.

    Args:
        name: Name of the site.
        fn: Its distribution (from `dist` or `likelihoods.outcome`).
        obs: Observed value, if any.
    """
    shared = _SHARED.get() if obs is None else None
    if shared is not None:
        prefix, values = shared
        name = prefix + name
        if name in values:
            return values[name]
    recorder = _RECORDER.get()
    if recorder is not None:
        value = recorder.sample(name, fn) if obs is None else obs
    elif isinstance(fn, torch.distributions.Distribution):
        value = pyro.sample(name, fn, obs=obs)
    else:
        value = importlib.import_module("numpyro").sample(name, fn, obs=obs)
    if shared is not None:
        shared[1][name] = value
    return value


@contextlib.contextmanager
def shared_latents(values: dict[str, Any], prefix: str = "") -> Iterator[None]:
    """Inside the block `sample` keeps latents in `values` under `prefix + name`, and draws each only once."""
    token = _SHARED.set((prefix, values))
    try:
        yield
    finally:
        _SHARED.reset(token)


def plate(name: str, size: int) -> Any:
    """A context of `size` conditionally independent sites along the next free axis from the right."""
    recorder = _RECORDER.get()
    if recorder is not None:
        return recorder.plate(size)
    shared = _SHARED.get()
    if shared is not None:
        prefix, values = shared
        name = prefix + name
        if f"plate {name}" in values:
            # A likelihood is called for each group of rows; its latents and their plate exist since the first call.
            return contextlib.nullcontext()
        values[f"plate {name}"] = size
    return importlib.import_module("numpyro").plate(name, size) if active().name == "jax" else pyro.plate(name, size)


@contextlib.contextmanager
def scale(factor: Array) -> Iterator[None]:
    """A context that multiplies log probabilities by `factor` (an array broadcasts over the plate); 0 masks."""
    # Pyro refuses a scale of 0, and 0 * -inf would be NaN: a masked row is masked, under both libraries.
    kept = factor > 0
    positive = ops.where(kept, factor, 0.0 * factor + 1.0)
    handlers = importlib.import_module("numpyro").handlers if active().name == "jax" else pyro.poutine
    with handlers.mask(mask=kept), handlers.scale(scale=positive):
        yield


_SEEDING = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block torch's generator starts from `seed`; afterwards it is as before. One thread at a time.

    For the few places that must draw from a distribution object, which knows no generator argument.
    """
    with (
        _SEEDING,
        torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []),
    ):
        torch.manual_seed(seed)
        yield


class Random:
    """Random numbers of the active backend for a hand-written sampler, see `likelihoods.outcome`.

    Under Pyro the numbers come from torch's generator, under NumPyro from the key of the sample statement.
    """

    def __init__(self, like: Array, shape: tuple[int, ...], key: Any = None) -> None:
        self._like = like
        self._key = key
        self.shape = shape

    def _next(self) -> Any:
        self._key, key = importlib.import_module("jax.random").split(self._key)
        return key

    def uniform(self, shape: tuple[int, ...] = ()) -> Array:
        """Uniform numbers in (0, 1) of shape `sample_shape + shape`."""
        full = (*self.shape, *shape)
        if self._key is None:
            tiny = torch.finfo(self._like.dtype).tiny
            return torch.rand(full, dtype=self._like.dtype, device=self._like.device).clamp_min(tiny)
        dtype = self._like.dtype
        random = importlib.import_module("jax.random")
        return random.uniform(self._next(), full, dtype=dtype, minval=_jnp().finfo(dtype).tiny)

    def gumbel(self, shape: tuple[int, ...] = ()) -> Array:
        """Standard Gumbel numbers of shape `sample_shape + shape`."""
        return -ops.log(-ops.log(self.uniform(shape)))

    def draw(self, distribution: Any) -> Array:
        """One draw of `distribution` for every element of the sample shape."""
        if self._key is None:
            return distribution.sample(self.shape)
        return distribution.sample(self._next(), self.shape)

"""What a preference likelihood is, how to write a distribution by hand, and the registry for saving likelihoods."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyro.distributions
import torch

from .._typing import Array
from ..backend import Random
from ..data.groups import Comparison
from ..errors import ArgumentError, LikelihoodError


@runtime_checkable
class Likelihood(Protocol):
    """A callable from the rewards of the candidates of each row to a distribution over the feedback.

    It is called outside the plate of rows, once for each group of rows of one kind and shape, so that latents it
    declares with `bayesrm.sample` (a tie width, raters' reliabilities, a length coefficient) are shared by all rows.

    Args:
        rewards: Rewards of the candidates, shape `(rows, K)`.
        comparison: Kind of feedback, annotators, margins, lengths: everything but the outcome.

    Returns:
        A distribution with batch shape `(rows,)` over the outcome as `FeedbackGroup` codes it.

    Example:
        A likelihood in which ties are a constant share of the answers:

        >>> import bayesrm as brm
        >>> from bayesrm.backend import dist, ops, sample
        >>> def constant_ties(rewards, comparison):
        ...     share = sample("tie_share", dist.Beta(1.0, 4.0))
        ...     win = ops.log_sigmoid(rewards[:, 0] - rewards[:, 1])
        ...     lose = ops.log_sigmoid(rewards[:, 1] - rewards[:, 0])
        ...     decided = ops.log1p(-share)
        ...     tie = ops.log(share) + 0.0 * win
        ...     return dist.Categorical(logits=ops.stack([decided + win, decided + lose, tie], axis=-1))
    """

    def __call__(self, rewards: Array, comparison: Comparison) -> Any:
        """The distribution of the feedback of each row, given the rewards of its candidates."""
        ...


class _TorchOutcome(pyro.distributions.TorchDistribution):  # type: ignore[misc]
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch reads it as a class attribute)

    def __init__(self, log_prob: Any, sample: Any, support: Any, batch_shape: Any, event_dim: int, like: Any) -> None:
        self._log_prob, self._sample, self._support, self._like = log_prob, sample, support, like
        self.has_enumerate_support = support is not None
        event = tuple(support.shape[1:]) if support is not None else (torch.Size([1]) * event_dim)
        super().__init__(torch.Size(batch_shape), torch.Size(event), validate_args=False)

    @property
    def support(self) -> Any:
        base = torch.distributions.constraints.nonnegative_integer
        return torch.distributions.constraints.independent(base, len(self.event_shape))

    def log_prob(self, value: Array) -> Array:
        return self._log_prob(value)

    def sample(self, sample_shape: Any = ()) -> Array:
        with torch.no_grad():
            return self._sample(Random(self._like, tuple(sample_shape)))

    def enumerate_support(self, expand: bool = True) -> Array:
        if self._support is None:
            raise NotImplementedError("this distribution has too many outcomes to enumerate")
        shape = (-1, *(1,) * len(self.batch_shape), *self.event_shape)
        values = self._support.reshape(shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


@functools.cache
def _jax_outcome() -> type:
    """The NumPyro counterpart of `_TorchOutcome`; made on first use because NumPyro is optional."""
    npd = importlib.import_module("numpyro.distributions")
    jnp = importlib.import_module("jax.numpy")

    class JaxOutcome(npd.Distribution):  # type: ignore[misc, name-defined]
        pytree_data_fields = ()

        def __init__(
            self, log_prob: Any, sample: Any, support: Any, batch_shape: Any, event_dim: int, like: Any
        ) -> None:
            self._log_prob, self._sample, self._support, self._like = log_prob, sample, support, like
            self.has_enumerate_support = support is not None
            event = tuple(support.shape[1:]) if support is not None else (1,) * event_dim
            super().__init__(tuple(batch_shape), event, validate_args=False)

        @property
        def support(self) -> Any:
            return npd.constraints.nonnegative_integer

        def log_prob(self, value: Array) -> Array:
            return self._log_prob(value)

        def sample(self, key: Any, sample_shape: Any = ()) -> Array:
            return self._sample(Random(self._like, tuple(sample_shape), key))

        def enumerate_support(self, expand: bool = True) -> Array:
            if self._support is None:
                raise NotImplementedError("this distribution has too many outcomes to enumerate")
            values = self._support.reshape((-1, *(1,) * len(self.batch_shape), *self.event_shape))
            shape = (values.shape[0], *self.batch_shape, *self.event_shape)
            return jnp.broadcast_to(values, shape) if expand else values

    return JaxOutcome


def outcome(
    *,
    log_prob: Callable[[Array], Array],
    sample: Callable[[Random], Array] | None = None,
    support: Array | None = None,
    batch_shape: tuple[int, ...],
    event_dim: int = 0,
    like: Array,
) -> Any:
    """A distribution over feedback, made of functions, for the active backend.

    For likelihoods whose distribution Pyro and NumPyro lack. Give `support` (few outcomes), `sample` (many), or both.

    Args:
        log_prob: Log probability of outcomes of shape `(..., rows)` or, with `event_dim=1`, `(..., rows, length)`.
        sample: Draws outcomes with the numbers of a `Random`, of shape `sample_shape + (rows,)` (plus the event). By
            default outcomes are drawn from `support` with their probabilities.
        support: All outcomes, shape `(outcomes,)` or `(outcomes, length)`, integer.
        batch_shape: `(rows,)`.
        event_dim: 0 for a single number, 1 for a vector such as a ranking.
        like: An array whose library, dtype and device the distribution shares, usually the rewards.

    Raises:
        ArgumentError: Neither `sample` nor `support` is given.

    Example:
        >>> import torch
        >>> d = outcome(log_prob=lambda y: torch.where(y == 1, 0.3, 0.7).log(), support=torch.arange(2),
        ...             batch_shape=(1,), like=torch.zeros(1))
        >>> d.log_prob(torch.tensor([1])).exp()
        tensor([0.3000])
    """
    if sample is None and support is None:
        raise ArgumentError(
            "give `sample`, `support`, or both: without them feedback can be neither drawn nor enumerated"
        )

    def from_support(random: Random) -> Array:
        values = _enumerated(support, batch_shape)
        log_probs = _stack([log_prob(v) for v in values])
        noise = random.gumbel(tuple(log_probs.shape))
        return support[(log_probs + noise).argmax(len(random.shape))]  # type: ignore[index]

    cls = _TorchOutcome if isinstance(like, torch.Tensor) else _jax_outcome()
    return cls(log_prob, sample or from_support, support, batch_shape, event_dim, like)


def _enumerated(support: Array, batch_shape: tuple[int, ...]) -> list[Array]:
    rows = tuple(batch_shape)
    if isinstance(support, torch.Tensor):
        return [v.expand(*rows, *v.shape) for v in support]
    jnp = importlib.import_module("jax.numpy")
    return [jnp.broadcast_to(v, (*rows, *v.shape)) for v in support]


def _stack(arrays: list[Array]) -> Array:
    return (
        torch.stack(arrays)
        if isinstance(arrays[0], torch.Tensor)
        else importlib.import_module("jax.numpy").stack(arrays)
    )


def outcomes_of(distribution: Any) -> Array | None:
    """All outcomes of `distribution`, shape `(outcomes,)` or `(outcomes, length)`; `None` when they are too many."""
    if not getattr(distribution, "has_enumerate_support", False):
        return None
    try:
        values = distribution.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values.reshape(values.shape[0], *distribution.event_shape)


@functools.lru_cache(maxsize=64)
def orderings(num_candidates: int, depth: int) -> tuple[tuple[int, ...], ...]:
    """All rankings of the best `depth` of `num_candidates`, in lexicographic order."""
    return tuple(itertools.permutations(range(num_candidates), depth))


def require_kind(name: str, comparison: Comparison, *kinds: str, hint: str) -> None:
    """Raises `LikelihoodError` when the feedback is not of a kind that likelihood `name` describes."""
    if comparison.kind not in kinds:
        raise LikelihoodError(
            f"{name} describes feedback of kind {' or '.join(kinds)}, not '{comparison.kind}'; {hint}"
        )


def require_pairs(name: str, comparison: Comparison) -> None:
    """Raises `LikelihoodError` unless rows are choices between two candidates."""
    require_kind(name, comparison, "choice", hint="see bayesrm.likelihoods for the others")
    if comparison.num_candidates != 2:
        raise LikelihoodError(
            f"{name} compares 2 candidates, these rows have {comparison.num_candidates}; "
            "use PlackettLuce for a choice among more"
        )


_REGISTRY: dict[str, Any] = {}
T = TypeVar("T")


def register(name: str) -> Callable[[T], T]:
    """Registers a likelihood class or function under `name`, so that a saved posterior can find it again.

    Example:
        >>> @register("always-first")
        ... def always_first(rewards, comparison):
        ...     return active().name
    """

    def decorate(likelihood: T) -> T:
        known = _REGISTRY.get(name)
        if known is not None and getattr(known, "__qualname__", "") != getattr(likelihood, "__qualname__", ""):
            raise ArgumentError(f"a likelihood named '{name}' is registered already: {known!r}")
        _REGISTRY[name] = likelihood
        return likelihood

    return decorate


def source_hash(likelihood: Any) -> str:
    """Digest of the source text of a likelihood (of its class for an instance); empty where no source can be read."""
    target = likelihood if inspect.isfunction(likelihood) or inspect.isclass(likelihood) else type(likelihood)
    try:
        return hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def to_config(likelihood: Any) -> dict[str, Any]:
    """Name, settings and source hash of a likelihood, as JSON values; nested for wrappers."""
    target = likelihood if inspect.isfunction(likelihood) else type(likelihood)
    name = next((n for n, known in _REGISTRY.items() if known is target), None)
    settings = {}
    if dataclasses.is_dataclass(likelihood):
        for field in dataclasses.fields(likelihood):
            value = getattr(likelihood, field.name)
            settings[field.name] = {"likelihood": to_config(value)} if callable(value) else value
    return {"name": name, "settings": settings, "source": source_hash(likelihood)}


def from_config(config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Rebuilds a likelihood from `to_config`, with the names of those whose source has changed since.

    Raises:
        LikelihoodError: The likelihood was not registered, or is not registered in this process.
    """
    name = config["name"]
    if name is None:
        raise LikelihoodError(
            "the likelihood was saved unregistered; pass it as `Posterior.from_pretrained(path, likelihood=...)`, or "
            "register it with `@likelihoods.register('name')` before saving"
        )
    if name not in _REGISTRY:
        raise LikelihoodError(
            f"no likelihood is registered as '{name}'; "
            "import the module that registers it, or pass it as `likelihood=...`"
        )
    target = _REGISTRY[name]
    changed = [name] if config["source"] != source_hash(target) else []
    if inspect.isfunction(target):
        return target, changed
    settings = {}
    for key, value in config["settings"].items():
        if isinstance(value, Mapping) and set(value) == {"likelihood"}:
            value, inner = from_config(value["likelihood"])
            changed += inner
        settings[key] = tuple(value) if isinstance(value, list) else value
    return target(**settings), changed

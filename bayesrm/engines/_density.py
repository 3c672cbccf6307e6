"""The density of feedback as a function of rewards and unconstrained latents, with its gradient.

Engines see a program through this object: parameters of the reward function enter only through the rewards.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.transforms import biject_to

from .._typing import Tensor
from ..backend import Recorder, convert
from ..data.groups import FeedbackGroup
from ..errors import LikelihoodError
from ..likelihoods.base import outcomes_of
from ..programs import RewardModel

#: Rewards of draws are evaluated for about this many numbers at once.
_TOGETHER = 2**22


@dataclasses.dataclass(frozen=True)
class LatentSite:
    """A latent of the likelihood: its name, shape, and place in the vector of unconstrained latents.

    Attributes:
        name: Site name.
        shape: Shape in constrained space.
        unconstrained_shape: Shape in unconstrained space.
        start: First position in the vector.
        stop: One past the last position.
        transform: Map from unconstrained to constrained space.
    """

    name: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    start: int
    stop: int
    transform: Any


class _Discoverer(Recorder):
    """Gives every site its prior mean, or the midpoint of its unconstrained space where it has none."""

    def missing(self, name: str, fn: Any) -> Tensor:
        if getattr(fn.support, "is_discrete", False):
            raise LikelihoodError(
                f"latent `{name}` is discrete; sum it out in the likelihood, or give it a continuous relaxation"
            )
        try:
            mean: Tensor = fn.mean
            if torch.isfinite(mean).all():
                return mean.detach()
        except NotImplementedError:
            pass
        transform = biject_to(fn.support)
        zeros = torch.zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape), dtype=torch.float64)
        value: Tensor = transform(zeros)
        return value


class FeedbackDensity:
    """log p(feedback, latents | rewards) of a program on given groups of rows, in float64 and unconstrained space.

    Attributes:
        program: The reward model.
        groups: The rows, on one device.
        sites: Latents of the likelihood.
        num_latents: Length Q of the vector of unconstrained latents.
        initial_latents: A starting point, shape `(Q,)`.
    """

    def __init__(self, program: RewardModel, groups: Sequence[FeedbackGroup]) -> None:
        self.program = program
        double = torch.zeros(0, dtype=torch.float64)
        self.groups = [g.map_arrays(lambda a: convert(a, double.to(a.device))) for g in groups]
        self._comparisons = [g.comparison for g in self.groups]
        device = self.groups[0].items.device
        zeros = [torch.zeros(g.items.shape, dtype=torch.float64, device=device) for g in self.groups]
        discoverer = _Discoverer({})
        with torch.no_grad(), discoverer:
            distributions = program.feedback(zeros, self._comparisons)
        self.sites: list[LatentSite] = []
        start = 0
        parts = []
        for name, (fn, value) in discoverer.sites.items():
            transform = biject_to(fn.support)
            unconstrained = transform.inv(value.double())
            stop = start + unconstrained.numel()
            shape, inner = tuple(value.shape), tuple(unconstrained.shape)
            self.sites.append(LatentSite(name, shape, inner, start, stop, transform))
            parts.append(unconstrained.reshape(-1))
            start = stop
        self.num_latents = start
        self.initial_latents = (
            torch.cat(parts).to(device) if parts else torch.zeros(0, dtype=torch.float64, device=device)
        )
        self.groups = [_legal(g, outcomes_of(d)) for g, d in zip(self.groups, distributions, strict=True)]
        self._tiled: dict[int, FeedbackDensity] = {1: self}
        self._vectorises = True
        self._check(distributions)

    def _check(self, distributions: Sequence[Any]) -> None:
        self._check_normalised()
        for group, distribution in zip(self.groups, distributions, strict=True):
            support = outcomes_of(distribution)
            counted = group.weight > 0
            if support is not None and support.dim() == 1:
                beyond = counted & ((group.outcome < support.min()) | (group.outcome > support.max()))
                if bool(beyond.any()):
                    row, outcome = int(group.rows[beyond][0]), int(group.outcome[beyond][0])
                    tie = group.comparison.kind == "choice" and outcome == group.comparison.num_candidates
                    what = "a tie" if tie else f"outcome {outcome}"
                    hint = "; use Davidson or RaoKupper, which give ties a probability" if tie else ""
                    raise LikelihoodError(
                        f"row {row} is {what}, which the likelihood gives no probability "
                        f"({int(beyond.sum())} such rows){hint}"
                    )
            with torch.no_grad():
                log_prob = distribution.log_prob(group.outcome)
            bad = counted & ~torch.isfinite(log_prob)
            if bool(bad.any()):
                raise LikelihoodError(
                    f"row {int(group.rows[bad][0])} has log probability {float(log_prob[bad][0])} at equal rewards; "
                    "the likelihood must give every observed answer a positive probability"
                )

    def _check_normalised(self) -> None:
        """Sums the probabilities of a few rows' outcomes at equal and at random rewards and latents."""
        generator = torch.Generator().manual_seed(0)
        groups = [_first_rows(g, 16) for g in self.groups]
        comparisons = [g.comparison for g in groups]
        for spread in (0.0, 1.0, 3.0):

            def noise(shape: tuple[int, ...], spread: float = spread) -> Tensor:
                draw: Tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
                return spread * draw.to(self.initial_latents.device)

            rewards = [noise(tuple(g.items.shape)) for g in groups]
            latents = self.initial_latents + 0.3 * noise((self.num_latents,))
            with torch.no_grad(), Recorder(self.constrain(latents)):
                distributions = self.program.feedback(rewards, comparisons)
            for group, distribution in zip(groups, distributions, strict=True):
                support = outcomes_of(distribution)
                if support is None:
                    continue
                with torch.no_grad():
                    total = torch.logsumexp(torch.stack([distribution.log_prob(_expand(v, group)) for v in support]), 0)
                worst = float(total[total.abs().argmax()].exp())
                if not abs(worst - 1.0) < 1e-6:
                    raise LikelihoodError(
                        f"the probabilities of the {len(support)} outcomes of a '{group.comparison.kind}' row sum to "
                        f"{worst:.6g}, not to 1; the likelihood must be normalised over the outcomes it enumerates"
                    )

    def tiled(self, times: int) -> "FeedbackDensity":
        """The same density for `times` copies of every row, one after another."""
        if times not in self._tiled:
            copy = object.__new__(FeedbackDensity)
            copy.__dict__.update(self.__dict__)
            copy.groups = [_tiled_group(g, times) for g in self.groups]
            copy._comparisons = [g.comparison for g in copy.groups]
            self._tiled[times] = copy
        return self._tiled[times]

    def of_groups(self, groups: Sequence[FeedbackGroup]) -> "FeedbackDensity":
        """The same density for other groups: rows of its own ones, so that nothing is checked again."""
        copy = object.__new__(FeedbackDensity)
        copy.__dict__.update(self.__dict__)
        copy.groups = list(groups)
        copy._comparisons = [g.comparison for g in copy.groups]
        copy._tiled = {1: copy}
        return copy

    def constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents in constrained space, by site; `latents` has shape `(..., Q)`."""
        batch = latents.shape[:-1]
        return {
            s.name: s.transform(latents[..., s.start : s.stop].reshape((*batch, *s.unconstrained_shape)))
            for s in self.sites
        }

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """Inverse of `constrain`, for one value of each site; shape `(Q,)`."""
        parts = [s.transform.inv(values[s.name].double()).reshape(-1) for s in self.sites]
        return torch.cat(parts) if parts else self.initial_latents.new_zeros(0)

    def distributions(self, rewards: Sequence[Tensor], latents: Tensor) -> tuple[list[Any], Tensor]:
        """Distribution of each group's feedback, and the log prior of the unconstrained latents (with Jacobian)."""
        given = self.constrain(latents)
        recorder = Recorder(given)
        with recorder:
            distributions = self.program.feedback(rewards, self._comparisons)
        log_prior = latents.new_zeros(())
        for site in self.sites:
            fn, value = recorder.sites[site.name]
            unconstrained = latents[site.start : site.stop].reshape(site.unconstrained_shape)
            jacobian = site.transform.log_abs_det_jacobian(unconstrained, value)
            log_prior = log_prior + fn.log_prob(value).sum() + jacobian.sum()
        return distributions, log_prior

    def gather(self, item_rewards: Tensor) -> list[Tensor]:
        """Rewards of the candidates of each group, shape `(rows, K)`, from rewards of the items."""
        return [item_rewards[g.items] for g in self.groups]

    def row_log_probs(self, rewards: Sequence[Tensor], latents: Tensor) -> list[Tensor]:
        """Unweighted log probability of each row's answer, one tensor `(rows,)` for each group."""
        distributions, _ = self.distributions(rewards, latents)
        return [d.log_prob(g.outcome) for d, g in zip(distributions, self.groups, strict=True)]

    def log_joint(self, rewards: Sequence[Tensor], latents: Tensor) -> Tensor:
        """sum(weight * log p(answer | rewards, latents)) + log p(latents), a scalar."""
        distributions, total = self.distributions(rewards, latents)
        for d, g in zip(distributions, self.groups, strict=True):
            total = total + _weighted(d.log_prob(g.outcome), g.weight).sum()
        return total

    def log_joints(self, item_rewards: Tensor, latents: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        """`log_joint` of many draws, shape `(S,)`, of item rewards `(S, items)` and latents `(S, Q)`.

        Draws without latents are rows of one large table. A likelihood is written for one value of its latents: draws
        with latents go through `torch.func.vmap`, or one by one where the likelihood branches on values.

        Args:
            item_rewards: Rewards of the items.
            latents: Unconstrained latents.
            weights: Weights of the rows of each group for each draw, `(S, rows)`, in place of the groups' own.
        """
        size = max(1, sum(g.items.numel() for g in self.groups))
        if weights is None:
            weights = [g.weight.expand(len(latents), -1) for g in self.groups]
        if self.num_latents:
            return self._log_joints_with_latents(item_rewards, latents, weights, max(1, _TOGETHER // size))
        totals = []
        for rewards, *given in zip(
            *(x.split(max(1, _TOGETHER // size)) for x in (item_rewards, *weights)), strict=True
        ):
            tiled = self.tiled(len(rewards)) if len(rewards) > 1 else self
            chosen = [rewards[:, g.items].flatten(0, 1) for g in self.groups]
            distributions, _ = tiled.distributions(chosen, rewards.new_zeros(0))
            total = rewards.new_zeros(len(rewards))
            for d, g, w in zip(distributions, tiled.groups, given, strict=True):
                total = total + _weighted(d.log_prob(g.outcome).reshape(w.shape), w).sum(1)
            totals.append(total)
        return torch.cat(totals)

    def log_priors(self, latents: Tensor) -> Tensor:
        """Log prior of unconstrained latents, with the log Jacobian, shape `(S,)`, for latents of shape `(S, Q)`."""
        few = self.of_groups([_first_rows(g, 1) for g in self.groups])
        zeros = [latents.new_zeros(g.items.shape) for g in few.groups]

        def one(u: Tensor) -> Tensor:
            return few.distributions(zeros, u)[1]

        if self._vectorises:
            try:
                return torch.func.vmap(one)(latents)
            except RuntimeError:
                self._vectorises = False
        return torch.stack([one(u) for u in latents])

    def _log_joints_with_latents(
        self, item_rewards: Tensor, latents: Tensor, weights: Sequence[Tensor], together: int
    ) -> Tensor:
        def one(rewards: Tensor, u: Tensor, *given: Tensor) -> Tensor:
            distributions, total = self.distributions(self.gather(rewards), u)
            for d, g, w in zip(distributions, self.groups, given, strict=True):
                total = total + _weighted(d.log_prob(g.outcome), w).sum()
            return total

        arguments = (item_rewards, latents, *weights)
        if len(latents) > 1 and self._vectorises:
            try:
                parts = zip(*(x.split(together) for x in arguments), strict=True)
                return torch.cat([torch.func.vmap(one)(*part) for part in parts])
            except RuntimeError:
                # What vmap cannot do; an error of the likelihood's own comes again below.
                self._vectorises = False
        return torch.stack([one(*draw) for draw in zip(*arguments, strict=True)])

    def value_and_gradient(self, item_rewards: Tensor, latents: Tensor) -> tuple[float, Tensor, Tensor]:
        """The log joint with its gradients in the items' rewards, shape `(items,)`, and the latents, shape `(Q,)`."""
        r = item_rewards.detach().requires_grad_(True)
        u = latents.detach().requires_grad_(True)
        value = self.log_joint(self.gather(r), u)
        g_r, g_u = torch.autograd.grad(value, [r, u], allow_unused=True)
        return (
            float(value.detach()),
            torch.zeros_like(r) if g_r is None else g_r,
            torch.zeros_like(u) if g_u is None else g_u,
        )

    def only_differences(self) -> bool:
        """Whether the feedback depends on differences of rewards inside each row alone (checked at a few points)."""
        generator = torch.Generator().manual_seed(0)
        u = self.initial_latents
        with torch.no_grad():
            for shift in (-3.0, 2.0):
                rewards = [
                    torch.randn(g.items.shape, generator=generator, dtype=torch.float64).to(u.device)
                    for g in self.groups
                ]
                here, there = self.row_log_probs(rewards, u), self.row_log_probs([r + shift for r in rewards], u)
                if any(not torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(here, there, strict=True)):
                    return False
        return True


def _weighted(log_prob: Tensor, weight: Tensor) -> Tensor:
    # A masked row may have probability zero, and 0 * -inf is not 0.
    return torch.where(weight == 0, torch.zeros_like(log_prob), weight * log_prob)


def _legal(group: FeedbackGroup, support: Tensor | None) -> FeedbackGroup:
    # A masked row may hold an answer outside the support, which a distribution may refuse to look up.
    if support is None or support.dim() != 1:
        return group
    masked = (group.weight == 0) & ((group.outcome < support.min()) | (group.outcome > support.max()))
    return dataclasses.replace(group, outcome=torch.where(masked, support.min().to(group.outcome.dtype), group.outcome))


def _expand(outcome: Tensor, group: FeedbackGroup) -> Tensor:
    return outcome.expand(group.comparison.num_rows, *outcome.shape)


def _tile(array: Tensor, times: int) -> Tensor:
    return array.repeat(times, *(1,) * (array.dim() - 1))


def _tiled_group(group: FeedbackGroup, times: int) -> FeedbackGroup:
    copies = group.map_arrays(lambda a: _tile(a, times))
    comparison = dataclasses.replace(copies.comparison, num_rows=group.comparison.num_rows * times)
    return dataclasses.replace(copies, comparison=comparison)


def _first_rows(group: FeedbackGroup, count: int) -> FeedbackGroup:
    part = group.map_arrays(lambda a: a[:count])
    comparison = dataclasses.replace(part.comparison, num_rows=min(count, group.comparison.num_rows))
    return dataclasses.replace(part, comparison=comparison)

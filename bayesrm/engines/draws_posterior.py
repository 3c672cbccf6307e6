"""Posteriors made of draws: those of Markov chains, of weighted draws made equal, and of the members of an ensemble."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from .._typing import Tensor
from ..beliefs import RewardBelief
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..programs import RewardModel
from ..rewards.heads import unflatten
from ..rewards.tangent import whole_prompts
from ._schema import FeedbackSchema
from ._tangent import Whitening
from .draws import JointDraws
from .gaussian_posterior import Expansion, coordinates_state, restore_coordinates
from .posterior import Posterior
from .report import FitReport

#: Rewards are computed for about this many numbers at once.
_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class WeightedDraws:
    """Draws of an approximation q, before they were resampled in proportion to their weights.

    Attributes:
        z: Draws of the coordinates, shape `(S, R)`.
        latents: Draws of the unconstrained latents, shape `(S, Q)`.
        log_ratio: log p(feedback, theta) - log q(theta) of each, shape `(S,)`.
    """

    z: Tensor
    latents: Tensor
    log_ratio: Tensor


_FIELDS = dataclasses.fields(WeightedDraws)


class DrawsPosterior(Posterior):
    """Equally weighted draws of whitened coordinates z and unconstrained latents, plus the prior outside their span.

    Attributes:
        z: Draws of the coordinates, shape `(S, R)`; chain after chain.
        unconstrained_latents: Draws of the latents, shape `(S, Q)`.
        sample_stats: What the sampler recorded for each draw, each of shape `(S,)`.
        log_ratio: log p(feedback, theta) - log q(theta) of each draw up to a constant, shape `(S,)`, when the draws
            come from an approximation q.
        resampled_from: The weighted draws that these were resampled from, where they were.
    """

    def __init__(
        self,
        program: RewardModel,
        schema: FeedbackSchema,
        report: FitReport,
        expansion: Expansion,
        whitening: Whitening,
        z: Tensor,
        latents: Tensor,
        *,
        num_chains: int = 1,
        sample_stats: Mapping[str, Tensor] | None = None,
        log_ratio: Tensor | None = None,
        resampled_from: WeightedDraws | None = None,
    ) -> None:
        self.program = program
        self.schema = schema
        self.report = report
        self.z = z
        self.unconstrained_latents = latents
        self._num_chains = num_chains
        self._default_draws = len(z)
        self.sample_stats = dict(sample_stats or {})
        self.log_ratio = log_ratio
        self.resampled_from = resampled_from
        self._expansion = expansion
        self._whitening = whitening

    @property
    def num_chains(self) -> int:
        """Number of Markov chains."""
        return self._num_chains

    def __len__(self) -> int:
        return len(self.z)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Draws of the parameters of the reward function by site, the prior's mean outside the coordinates."""
        shapes = self.program.head.parameter_shapes(self._num_features())
        theta = torch.stack([self._whitening.to_parameters(z) for z in self.z])
        sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
        parts = theta.split(sizes, dim=1)
        return {site: p.reshape(len(p), *shapes[site]) for site, p in zip(shapes, parts, strict=True)}

    def _num_features(self) -> int:
        return len(self._expansion.feature_center)

    def _chosen(self, num_samples: int) -> Tensor:
        """Indices of at most `num_samples` draws, spread evenly over every chain."""
        length = len(self.z) // self.num_chains
        kept = min(length, max(1, num_samples // self.num_chains))
        within = torch.linspace(0, length - 1, kept).round().long()
        return (torch.arange(self.num_chains)[:, None] * length + within).reshape(-1)

    def _item_draws(self, features: Tensor, chosen: Tensor, outside: Tensor | None, noise_seed: int) -> Tensor:
        """Draws of the rewards of items, shape `(draws, items)`.

        What lies outside the coordinates is drawn with the same noise for all the items given: right for items of one
        prompt, and for each row of comparisons; items of different prompts would get a correlation through `outside`.
        """
        rewards = rewards_of(self._expansion, self._whitening, features, self.z[chosen])
        generator = torch.Generator().manual_seed(noise_seed)
        if self.program.head.is_linear and self._whitening.basis is not None:
            complement = self._whitening.complement(self._expansion.jacobian(features))
            assert complement is not None
            rewards += _noise(len(chosen), complement.shape[1], generator) @ complement.T
        if outside is not None:
            rewards += _noise(len(chosen), outside.shape[1], generator) @ outside.T
        return rewards

    def _belief(self, features: Tensor, sizes: Sequence[int], outside: Tensor | None) -> RewardBelief:
        chosen = torch.arange(len(self.z))
        most = max(sizes)
        draws = features.new_zeros(len(chosen), len(sizes), most)
        mask = torch.zeros(len(sizes), most, dtype=torch.bool)
        start = prompt = 0
        for run in whole_prompts(sizes, max(1, _CHUNK // len(chosen))):
            stop = start + sum(run)
            part = None if outside is None else outside[start:stop]
            found = self._item_draws(features[start:stop], chosen, part, noise_seed=0)
            for rewards in found.split(list(run), dim=1):
                draws[:, prompt, : rewards.shape[1]] = rewards
                mask[prompt, : rewards.shape[1]] = True
                prompt += 1
            start = stop
        return RewardBelief.from_draws(draws, mask)

    def _feedback_draws(
        self,
        features: Tensor,
        groups: Sequence[FeedbackGroup],
        num_samples: int,
        seed: int,
        outside: Tensor | None,
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        chosen = self._chosen(num_samples)
        numbers = max(1, len(features) + sum(8 * g.items.numel() for g in groups))
        together = max(1, _CHUNK // numbers)
        for i, part in enumerate(chosen.split(together)):
            rewards = self._item_draws(features, part, outside, noise_seed=seed + i)
            if not self.unconstrained_latents.shape[1]:
                yield [rewards[:, g.items] for g in groups], self.unconstrained_latents[0]
                continue
            for one, index in zip(rewards, part.tolist(), strict=True):
                yield [one[g.items][None] for g in groups], self.unconstrained_latents[index]

    def _joint_draws(
        self, features: Tensor, sizes: Sequence[int], outside: Tensor | None, num_samples: int, seed: int
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        chosen = self._chosen(num_samples)
        if outside is None:
            rewards = self._item_draws(features, chosen, None, seed)
        else:
            parts = zip(features.split(list(sizes)), outside.split(list(sizes)), strict=True)
            rewards = torch.cat([self._item_draws(f, chosen, o, seed + i) for i, (f, o) in enumerate(parts)], dim=1)
        stats = {name: values[chosen] for name, values in self.sample_stats.items()}
        if self.log_ratio is not None:
            stats["log_ratio"] = self.log_ratio[chosen]
        return rewards, self.unconstrained_latents[chosen], stats

    def _latent_draws(self, num_samples: int, seed: int) -> Tensor:
        return self.unconstrained_latents[self._chosen(num_samples)]

    def weighted_draws(self, data: Comparisons, *, num_samples: int | None = None, seed: int = 0) -> JointDraws:
        """See `Posterior.weighted_draws`: the draws before they were resampled, which keep the proposal's tails."""
        source = self.resampled_from
        if source is None:
            return self.draw(data, num_samples=num_samples, seed=seed)
        proposal = DrawsPosterior(
            self.program, self.schema, self.report, self._expansion, self._whitening, source.z, source.latents,
            log_ratio=source.log_ratio,
        )  # fmt: skip
        return proposal.draw(data, num_samples=num_samples, seed=seed)

    def _state(self) -> dict[str, Tensor]:
        tensors = coordinates_state(self._expansion, self._whitening) | {
            "z": self.z,
            "latents": self.unconstrained_latents,
            "num_chains": torch.tensor(self.num_chains),
        }
        tensors |= {f"stats.{name}": value for name, value in self.sample_stats.items()}
        if self.log_ratio is not None:
            tensors["log_ratio"] = self.log_ratio
        if self.resampled_from is not None:
            tensors |= {f"resampled_from.{f.name}": getattr(self.resampled_from, f.name) for f in _FIELDS}
        return tensors

    @classmethod
    def _restore(
        cls, program: RewardModel, schema: FeedbackSchema, report: FitReport, tensors: dict[str, Tensor]
    ) -> "DrawsPosterior":
        expansion, whitening = restore_coordinates(program, tensors)
        stats = {k.removeprefix("stats."): v for k, v in tensors.items() if k.startswith("stats.")}
        source = None
        if "resampled_from.z" in tensors:
            source = WeightedDraws(**{f.name: tensors[f"resampled_from.{f.name}"] for f in _FIELDS})
        return cls(
            program, schema, report, expansion, whitening, tensors["z"], tensors["latents"],
            num_chains=int(tensors["num_chains"]), sample_stats=stats, log_ratio=tensors.get("log_ratio"),
            resampled_from=source,
        )  # fmt: skip


def rewards_of(expansion: Expansion, whitening: Whitening, features: Tensor, z: Tensor) -> Tensor:
    """Rewards of items at draws of the coordinates, shape `(draws, items)`, the prior's mean outside of them.

    Args:
        expansion: The head; a linear one is taken at any point, others run at each draw.
        whitening: The coordinates.
        features: Features of the items as they come, shape `(items, D)`.
        z: Coordinates, shape `(draws, R)`.
    """
    head = expansion.program.head
    if head.is_linear:
        jacobian = expansion.jacobian(features)
        base = expansion.rewards(features) + jacobian @ (whitening.center - expansion.point)
        return base + z @ whitening.design(jacobian).T
    shapes = head.parameter_shapes(features.shape[1])
    scaled = expansion.scaled(features)

    def at(vector: Tensor) -> Tensor:
        value: Tensor = head.apply(unflatten(whitening.to_parameters(vector), shapes), scaled)
        return value

    step = max(1, _CHUNK // max(1, len(features) * max(shape[-1] for shape in shapes.values())))
    every = torch.func.vmap(at)
    return torch.cat([every(part) for part in z.split(step)])


def _noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

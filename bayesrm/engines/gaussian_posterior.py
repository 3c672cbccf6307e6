"""Gaussian posteriors of a tangent model: Laplace's approximation, and the point that MAP returns."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from .._typing import Tensor
from ..beliefs import RewardBelief, covariance_root
from ..data.groups import FeedbackGroup
from ..programs import RewardModel
from ..rewards.heads import unflatten
from ._tangent import Whitening
from .posterior import FeedbackSchema, FitReport, Posterior

#: Predictions are made for about this many numbers at once.
_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class Expansion:
    """A head linearised at a point: r(x) = head(x; point) + J(x) (theta - point).

    Attributes:
        program: The reward model.
        point: Parameters at which it is linearised, shape `(P,)`.
        feature_center: Subtracted from features, shape `(D,)`.
        feature_scale: Features are divided by it, shape `(D,)`.
    """

    program: RewardModel
    point: Tensor
    feature_center: Tensor
    feature_scale: Tensor

    def scaled(self, features: Tensor) -> Tensor:
        """Features as the head sees them."""
        return (features - self.feature_center) / self.feature_scale

    def rewards(self, features: Tensor) -> Tensor:
        """Rewards at the point, shape `(n,)`, of features as they come, shape `(n, D)`."""
        head = self.program.reward
        shapes = head.parameter_shapes(features.shape[1])
        result: Tensor = head.apply(unflatten(self.point, shapes), self.scaled(features))
        return result

    def jacobian(self, features: Tensor) -> Tensor:
        """Derivative of the rewards in the parameters, shape `(n, P)`."""
        head = self.program.reward
        scaled = self.scaled(features)
        if head.is_linear and head.parameter_shapes(features.shape[1]) == {"weight": (features.shape[1],)}:
            return scaled
        shapes = head.parameter_shapes(features.shape[1])

        def reward(point: Tensor, x: Tensor) -> Tensor:
            value: Tensor = head.apply(unflatten(point, shapes), x)
            return value

        step = max(1, _CHUNK // len(self.point))
        rows = torch.func.vmap(torch.func.grad(reward), in_dims=(None, 0))
        return torch.cat([rows(self.point, part) for part in scaled.split(step)])


class GaussianPosterior(Posterior):
    """A Gaussian over whitened coordinates z and unconstrained latents, plus the prior outside their span.

    Attributes:
        mode: Mean of (z, latents), shape `(R + Q,)`.
        factor: Lower Cholesky factor of the precision of (z, latents), shape `(R + Q, R + Q)`; for a diagonal structure
            its diagonal, shape `(R + Q,)`; `None` for a point.
    """

    def __init__(
        self,
        program: RewardModel,
        schema: FeedbackSchema,
        report: FitReport,
        expansion: Expansion,
        whitening: Whitening,
        mode: Tensor,
        factor: Tensor | None,
    ) -> None:
        self.program = program
        self.schema = schema
        self.report = report
        self.mode = mode
        self.factor = factor
        self._expansion = expansion
        self._whitening = whitening

    def plug_in(self) -> "GaussianPosterior":
        """The same mode without its uncertainty: what MAP would return."""
        return GaussianPosterior(
            self.program, self.schema, self.report, self._expansion, self._whitening, self.mode, factor=None
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters of the reward function at the mode, by site."""
        shapes = self.program.reward.parameter_shapes(self._num_features())
        return unflatten(self._whitening.to_parameters(self.mode[: self._whitening.size]), shapes)

    def _num_features(self) -> int:
        return len(self._expansion.feature_center)

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean `(n,)` of the items' rewards, root in coordinates `(n, R + Q)`, and the complement's root `(n, P)`."""
        w = self._whitening
        jacobian = self._expansion.jacobian(features)
        design = w.design(jacobian)
        base = self._expansion.rewards(features) + jacobian @ (w.center - self._expansion.point)
        mean = base + design @ self.mode[: w.size]
        if self.factor is None:
            return mean, design.new_zeros(len(design), 0), None
        return mean, self._solve(design), w.complement(jacobian)

    def _solve(self, design: Tensor) -> Tensor:
        """Rows x L^-T, whose inner products are the covariances of x . (z, latents), for x of shape `(n, <= R + Q)`."""
        assert self.factor is not None
        padded = torch.nn.functional.pad(design, (0, self.factor.shape[0] - design.shape[1]))
        if self.factor.dim() == 1:
            return padded / self.factor
        solved: Tensor = torch.linalg.solve_triangular(self.factor, padded.T, upper=False)
        return solved.T

    def _belief(self, features: Tensor, sizes: Sequence[int]) -> RewardBelief:
        most = max(sizes)
        means = features.new_zeros(len(sizes), most)
        mask = torch.zeros(len(sizes), most, dtype=torch.bool)
        roots = []
        numbers = max(len(self._expansion.point), 1)
        chunks = _whole_prompts(sizes, max(1, _CHUNK // numbers))
        start = prompt = 0
        for chunk in chunks:
            block = features[start : start + sum(chunk)]
            start += sum(chunk)
            mean, root, outside = self._moments(block)
            if outside is not None:
                root = torch.cat([root, outside], dim=1)
            for m, a in zip(mean.split(list(chunk)), root.split(list(chunk)), strict=True):
                means[prompt, : len(m)] = m
                mask[prompt, : len(m)] = True
                # Few candidates: K numbers each carry the same covariance as R (QR squares nothing).
                roots.append(a if len(a) >= a.shape[1] else torch.linalg.qr(a.T, mode="r")[1].T)
                prompt += 1
        rank = max(a.shape[1] for a in roots)
        root = features.new_zeros(len(sizes), most, rank)
        for i, a in enumerate(roots):
            root[i, : a.shape[0], : a.shape[1]] = a
        return RewardBelief(means, root, mask)

    def _latent_draws(self, num_samples: int, seed: int) -> Tensor:
        mean = self.mode[self._whitening.size :]
        if self.factor is None or not len(mean):
            return mean.expand(num_samples, -1)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, len(mean), generator=generator, dtype=torch.float64)
        return mean + noise @ covariance_root(self._latent_covariance()).T

    def _latent_root(self) -> Tensor:
        """Rows whose inner products are the covariances of the unconstrained latents, shape `(Q, R + Q)`."""
        size, total = self._whitening.size, len(self.mode)
        unit = torch.eye(total, dtype=torch.float64)[size:]
        return self._solve(unit)

    def _latent_covariance(self) -> Tensor:
        root = self._latent_root()
        return root @ root.T

    def _feedback_draws(
        self, features: Tensor, groups: Sequence[FeedbackGroup], num_samples: int, seed: int
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        latents = self.mode[self._whitening.size :]
        q = len(latents)
        pieces = [self._moments(part) for part in features.split(max(1, _CHUNK // max(1, len(self._expansion.point))))]
        mean = torch.cat([m for m, _, _ in pieces])
        if self.factor is None:
            yield [mean[g.items][None] for g in groups], latents
            return
        root = torch.cat([a if c is None else torch.cat([a, c], dim=1) for _, a, c in pieces])
        latent_root = torch.nn.functional.pad(self._latent_root(), (0, root.shape[1] - len(self.mode)))
        latent_scale = covariance_root(latent_root @ latent_root.T) if q else root.new_zeros(0, 0)
        # Rewards given the latents: r = mean + cross e_latents + conditional e_rewards.
        to_latents = torch.linalg.solve(latent_scale, latent_root) if q else root.new_zeros(0, root.shape[1])
        item_cross = root @ to_latents.T
        residual = root - item_cross @ to_latents
        conditional = [_row_roots(residual, g.items) for g in groups]
        widest = max(g.items.shape[1] for g in groups)
        # Points are spread over latents and rewards at once; with latents, a few reward points share each latent point.
        inner = num_samples if q == 0 else min(4, num_samples)
        outer = -(-num_samples // inner)
        latent_points = _sobol_normal(outer, q, seed) if q else root.new_zeros(1, 0)
        reward_points = _sobol_normal(outer * inner, widest, seed + 1)
        together = max(1, min(inner, _CHUNK // sum(8 * g.items.numel() for g in groups)))
        for e_latents, e_rewards in zip(latent_points, reward_points.split(inner), strict=True):
            shifted = mean + item_cross @ e_latents
            for e in e_rewards.split(together):
                rewards = [
                    shifted[g.items] + torch.einsum("nkj,sj->snk", c, e[:, : g.items.shape[1]])
                    for g, c in zip(groups, conditional, strict=True)
                ]
                yield rewards, latents + latent_scale @ e_latents

    def _state(self) -> dict[str, Tensor]:
        e, w = self._expansion, self._whitening
        tensors = {
            "point": e.point,
            "feature_center": e.feature_center,
            "feature_scale": e.feature_scale,
            "prior_mean": w.center,
            "prior_scale": w.scale,
            "mode": self.mode,
        }
        if w.basis is not None:
            tensors["basis"] = w.basis
        if self.factor is not None:
            tensors["factor"] = self.factor
        return tensors

    @classmethod
    def _restore(
        cls, program: RewardModel, schema: FeedbackSchema, report: FitReport, tensors: dict[str, Tensor]
    ) -> "GaussianPosterior":
        expansion = Expansion(program, tensors["point"], tensors["feature_center"], tensors["feature_scale"])
        whitening = Whitening(tensors["prior_mean"], tensors["prior_scale"], tensors.get("basis"))
        return cls(program, schema, report, expansion, whitening, tensors["mode"], tensors.get("factor"))


def _whole_prompts(sizes: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    """Splits the prompts into runs of at most about `limit` candidates."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > limit:
            yield run
            run = []
        run.append(size)
    yield run


def _row_roots(root: Tensor, items: Tensor) -> Tensor:
    """A K x K covariance root for the candidates of each row, shape `(rows, K, K)`."""
    rows, k = items.shape
    step = max(1, _CHUNK // max(1, k * root.shape[1]))
    parts = []
    for part in items.split(step):
        a = root[part]
        parts.append(covariance_root(a @ a.transpose(1, 2)))
    return torch.cat(parts) if parts else root.new_zeros(rows, k, k)


def _sobol_normal(num_samples: int, dimension: int, seed: int) -> Tensor:
    """Scrambled Sobol points mapped to standard normal numbers, each followed by its mirror, shape `(num_samples, d)`.

    Mirrored points make the average of an odd function exactly zero, so that integration error cannot overturn which of
    two candidates is the likelier choice.
    """
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    uniform = engine.draw(-(-num_samples // 2), dtype=torch.float64)
    normal: Tensor = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    return torch.stack([normal, -normal], dim=1).flatten(0, 1)[:num_samples]

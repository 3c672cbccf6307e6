"""What simulation-based calibration ranks: identified rewards, latents, and the density of the feedback itself."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from .._typing import Tensor
from ..data import Comparisons
from ..engines._density import FeedbackDensity
from ..programs import RewardModel
from ..rewards import GaussianProcess
from ..rewards.heads import unflatten

#: From rewards `(S, items)` and constrained latents `(S, *site)` to named numbers `(S,)`.
Quantities = Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]]

#: Rewards, and components of each latent, that are looked at by default.
_REWARDS, _COMPONENTS = 3, 4


class DefaultQuantities:
    """Reward differences of a few rows (rewards, where rows have one item), a few latents, and the log joint.

    Where the items are pairs of responses, `responses` holds those of each row, and the differences are preference
    scores.

    The log joint depends on the feedback, so that a posterior which ignores it is found out (Modrak et al. 2023,
    2211.02383). It is log p(feedback, latents | rewards), latents in unconstrained space, plus for linear heads the log
    prior density of the rewards up to a constant.
    """

    def __init__(self, program: RewardModel, design: Comparisons, responses: Tensor | None = None) -> None:
        groups = design.groups()
        rows = [row for g in groups for row in zip(g.rows.tolist(), g.items.tolist(), strict=True)]
        spread = torch.linspace(0, len(rows) - 1, min(_REWARDS, len(rows))).round().long().tolist()
        self._pairs = [_named(rows[i][0], rows[i][1], responses) for i in spread]
        self._whiten: Tensor | None = None
        if program.head.is_linear:
            self._whiten, self._base = _prior_whitening(program, design)

    def __call__(
        self, rewards: Tensor, latents: Mapping[str, Tensor], density: FeedbackDensity, unconstrained: Tensor
    ) -> dict[str, Tensor]:
        """The quantities of draws, each of shape `(S,)`."""
        found = {}
        for name, a, b in self._pairs:
            found[name] = rewards[:, a] if b is None else rewards[:, a] - rewards[:, b]
        for site, values in latents.items():
            flat = values.reshape(len(values), -1)
            size = flat.shape[1]
            for i in torch.linspace(0, size - 1, min(_COMPONENTS, size)).round().long().tolist():
                found[site if values.dim() == 1 else f"{site}[{i}]"] = flat[:, i]
        with torch.no_grad():
            log_joint = density.log_joints(rewards, unconstrained)
        if self._whiten is not None:
            log_joint = log_joint - 0.5 * ((rewards - self._base) @ self._whiten.T).square().sum(1)
        found["log joint"] = log_joint
        return found


def _named(row: int, items: list[int], responses: Tensor | None) -> tuple[str, int, int | None]:
    """The name of what is looked at in a row, and the two items (or the one) whose difference it is."""
    first, second = items[0], items[1] if len(items) > 1 else None
    if responses is not None:
        return f"score[{responses[row, 0]}, {responses[row, 1]}]", first, second
    name = f"reward[{first}]" if second is None else f"reward[{first}] - reward[{second}]"
    return name, first, second


def _prior_whitening(program: RewardModel, design: Comparisons) -> tuple[Tensor, Tensor]:
    """A matrix that turns rewards less their prior mean into independent standard normal numbers, and that mean."""
    raw = program.encode(design).double()
    center, spread = program.standardisation(raw, design.groups())
    if isinstance(program.reward, GaussianProcess):
        program = dataclasses.replace(program, reward=program.reward.bind(raw, center, spread))
    features = (raw - center) / spread
    shapes = program.head.parameter_shapes(raw.shape[1])
    scale = torch.cat([_full(shape, program.prior.of(site) ** -0.5) for site, shape in shapes.items()])

    def rewards(whitened: Tensor) -> Tensor:
        value: Tensor = program.head.apply(unflatten(whitened * scale, shapes), features)
        return value

    zero = torch.zeros_like(scale)
    return torch.linalg.pinv(torch.func.jacrev(rewards)(zero)), rewards(zero)


def _full(shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full((int(torch.Size(shape).numel()),), value, dtype=torch.float64)

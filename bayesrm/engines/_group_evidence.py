"""Prior precisions of groups of parameters by Laplace's evidence, with its exact gradient.

The items' rewards are `offset + sum_g exp(-l_g / 2) Phi_g z_g` with z ~ N(0, I): every column of a whitened design
belongs to one prior group, and l_g is the log factor on that group's declared prior precision (MacKay 1992; the
gradient is that of Rasmussen & Williams 2006, section 5.5.1, with the latents of the likelihood in the mode and in the
determinant). Only the rewards' prior covariance `K(l) = sum_g exp(-l_g) Phi_g Phi_g'` matters, so a design may be given
by its columns, or by the Gram matrices of its groups where it is too wide to keep.
"""

import dataclasses
import warnings

import numpy as np
import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..errors import ConvergenceWarning
from ._curvature import (
    CurvatureKind,
    _grad,
    _leaves,
    _prior_curvature,
    answer_scores,
    curvature,
    observed_curvature,
)
from ._density import FeedbackDensity
from ._gaussian_fit import maximise_bracketed
from ._grouped_design import ColumnGroups, EvidencePoint, GramGroups, GroupedDesign, curved
from ._newton import Mode, evidence, find_mode, log_normal
from ._tangent import CHUNK, joint_precision

#: Log factors are searched within this distance of the declared precisions.
BOUND = 16.0
#: A slope of the evidence in a log factor, in nats, below which it counts as flat.
_FLAT = 1e-2
#: Log evidences closer than this are not worth telling apart; the inner modes' tolerance alone moves them by less.
_SAME = 1e-4
#: Starts closer than this in every log factor lead to the same optimum.
_SAME_START = 0.5
#: A group of which the feedback informs fewer directions than this may stand on a plateau of the evidence.
_IDLE = 0.1
#: Rounds of looking for such groups.
_ROUNDS = 3
#: Gradient norm at which the modes on the way are found: the evidence's error is of first order in it.
_TOLERANCE = 1e-7
#: Half width of the differences that stand for the gradient where the Fisher information is drawn.
_STEP = 0.05


@dataclasses.dataclass(frozen=True)
class TunedGroups:
    """The log factors with the largest evidence, and the posterior there.

    Attributes:
        log_factors: Log factors on the declared precisions, shape `(G,)`, within [-16, 16].
        mode: The mode, in the coordinates of `design`.
        design: The working design at `log_factors`, shape `(items, R)`.
        log_evidence: Laplace's approximation of log p(feedback).
        evaluations: Evidences computed, each of which finds a mode.
        iterations: Newton steps taken in all of them.
        converged: Whether the evidence is stationary, up to the bounds, and `mode` is a mode.
    """

    log_factors: Tensor
    mode: Mode
    design: Tensor
    log_evidence: float
    evaluations: int
    iterations: int
    converged: bool


class GroupEvidence:
    """Laplace's evidence as a function of the log factors; each mode starts from the last one.

    Args:
        density: The feedback.
        family: The design.
        offset: Rewards of the items at z = 0, shape `(items,)`.
        latents: Where the first mode's latents start, unconstrained, shape `(Q,)`.
        tolerance: Gradient norm of (z, latents) at which a mode is found.
        max_iterations: Most Newton steps to a mode.
        curvature: Which curvature stands in the determinant; `auto` chooses anew at every point.
        seed: Seed of the Fisher information's draws.
    """

    def __init__(
        self,
        density: FeedbackDensity,
        family: GroupedDesign,
        offset: Tensor,
        latents: Tensor,
        *,
        tolerance: float,
        max_iterations: int,
        curvature: CurvatureKind,
        seed: int,
    ) -> None:
        self.density = density
        self.family = family
        self.offset = offset
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.kind = curvature
        self.seed = seed
        self.evaluations = 0
        self.iterations = 0
        self.missed = 0
        self._latents = latents
        self._last: EvidencePoint | None = None

    def at(self, log_factors: Tensor) -> EvidencePoint:
        """The evidence at log factors of shape `(G,)`, and what it was computed from."""
        density = self.density
        design = self.family.design(log_factors)
        z, latents = self._start(log_factors, design)
        mode = find_mode(
            density, design, self.offset, z, latents,
            tolerance=self.tolerance, max_iterations=self.max_iterations, warn=False,
        )  # fmt: skip
        change = design @ mode.z
        rewards = self.offset + change
        _, scores, _ = density.value_and_gradient(rewards, mode.latents)
        c = curvature(density, density.gather(rewards), mode.latents, self.kind, seed=self.seed)
        factor = torch.linalg.cholesky(joint_precision(design, density.groups, c))
        point = EvidencePoint(
            log_factors, design, mode, rewards, change, scores, c, factor, evidence(mode, factor)
        )  # fmt: skip
        self.evaluations += 1
        self.iterations += mode.iterations
        self.missed += not mode.converged
        self._last = point
        return point

    def _start(self, log_factors: Tensor, design: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is None:
            return design.new_zeros(design.shape[1]), self._latents
        latents = self._last.mode.latents
        # The rewards move little with the prior; where they move much, their scores, which z is made of, may not.
        starts = [self.family.carried(self._last, log_factors, design), design.T @ self._last.scores]
        values = []
        for z in starts:
            with torch.no_grad():
                value = float(self.density.log_joint(self.density.gather(self.offset + design @ z), latents))
            value += log_normal(z)
            values.append(value if np.isfinite(value) else -np.inf)
        return starts[int(np.argmax(values))], latents

    def slope(self, point: EvidencePoint) -> tuple[Tensor, Tensor]:
        """Gradient of the evidence in the log factors, and how many directions of each group the feedback determines.

        The gradient is exact for the observed curvature and the enumerated Fisher information at a mode; with
        `auto`, for whichever of them the point uses. For draws, which jump as the rewards move, it is a central
        difference of the evidence, at the price of two modes a group.

        Args:
            point: A point of `at`.

        Returns:
            Two tensors of shape `(G,)`.
        """
        groups, c = self.density.groups, point.curvature
        size, items, q = point.design.shape[1], len(point.rewards), c.latents.shape[0]
        identity = torch.eye(size + q, dtype=point.factor.dtype, device=point.factor.device)
        inverse = torch.linalg.solve_triangular(point.factor, identity, upper=False)
        root = torch.cat([point.design @ inverse[:, :size].T, inverse[:, size:].T])
        informed = self.family.informed(point, groups, root, inverse)
        if c.kind == "fisher-draws":
            return self._differences(point), informed
        spread = self.family.spread(point.log_factors, point.scores)
        h_r, h_u = self._volume_slope(point, root)
        # By the implicit function theorem the mode moves by (I - S H) times the rewards' own move, -spread_g, with S
        # the inverse of the log joint's Hessian and H the likelihood's; its transpose needs one solve for all groups.
        if c.kind == "observed":
            hessian = c
            moved = root @ (root.T @ torch.cat([h_r, h_u]))
        else:
            hessian = observed_curvature(self.density, self.density.gather(point.rewards), point.mode.latents)
            precision = joint_precision(point.design, groups, hessian)
            step = torch.linalg.solve(precision, torch.cat([point.design.T @ h_r, h_u]))
            moved = torch.cat([point.design @ step[:size], step[size:]])
        through_mode = h_r - curved(groups, hessian, moved[:items, None], moved[items:, None])[:, 0]
        return 0.5 * (informed - point.scores @ spread) - through_mode @ spread, informed

    def _differences(self, point: EvidencePoint) -> Tensor:
        steps = _STEP * torch.eye(len(point.log_factors), dtype=point.factor.dtype, device=point.factor.device)
        ends = [[self.at(point.log_factors + sign * s).log_evidence for sign in (1.0, -1.0)] for s in steps]
        return point.log_factors.new_tensor([(up - down) / (2.0 * _STEP) for up, down in ends])

    def _volume_slope(self, point: EvidencePoint, root: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient in (rewards of the items, latents) of the log volume around the mode, through the curvature alone.

        That is the gradient of -tr(S H) / 2 with the posterior covariance S held fixed: `(items,)` and `(Q,)`.
        """
        density, items = self.density, len(point.rewards)
        covariances = [_row_covariances(root[:items], root[items:], group) for group in density.groups]
        s_u = root[items:] @ root[items:].T
        r, u = _leaves(density.gather(point.rewards), point.mode.latents)
        if point.curvature.kind == "observed":
            c = observed_curvature(density, r, u, create_graph=True)
            total = (s_u * (c.latents + c.prior)).sum()
            for (s_r, s_x), block, cross in zip(covariances, c.rewards, c.cross, strict=True):
                total = total + (s_r * block).sum() + 2.0 * (s_x * cross).sum()
            *by_row, h_u = _grad(-0.5 * total, [*r, u])
        else:
            distributions, log_prior = density.distributions(r, u)
            (h_u,) = _grad(-0.5 * (s_u * _prior_curvature(log_prior, u, create=True)).sum(), [u])
            by_row = []
            for d, group, x, (s_r, s_x) in zip(distributions, density.groups, r, covariances, strict=True):
                h_x = torch.zeros_like(x)
                # Answer by answer, so that the graphs of third derivatives never stand in memory together.
                for p, score_r, score_u in answer_scores(d, group, x, u, self.seed, create_graph=True):
                    along_r = (s_r @ score_r[:, :, None])[:, :, 0] + 2.0 * (s_x @ score_u[:, :, None])[:, :, 0]
                    square = (score_r * along_r).sum(1) + (score_u * (score_u @ s_u)).sum(1)
                    part_x, part_u = _grad(-0.5 * (p * square).sum(), [x, u])
                    h_x, h_u = h_x + part_x, h_u + part_u
                by_row.append(h_x)
        h_r = torch.zeros_like(point.rewards)
        for group, h_x in zip(density.groups, by_row, strict=True):
            h_r.index_add_(0, group.items.reshape(-1), h_x.reshape(-1))
        return h_r, h_u


def _row_covariances(root_r: Tensor, root_u: Tensor, group: FeedbackGroup) -> tuple[Tensor, Tensor]:
    """Covariance of the rewards of each row, `(rows, K, K)`, and with the latents, `(rows, K, Q)`."""
    rows, k = group.items.shape
    s_r, s_x = root_r.new_empty(rows, k, k), root_r.new_empty(rows, k, root_u.shape[0])
    step = max(1, CHUNK // max(1, k * root_r.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        of_row = root_r[group.items[part]]
        s_r[part] = of_row @ of_row.transpose(1, 2)
        s_x[part] = of_row @ root_u.T
    return s_r, s_x


def tune_groups(
    density: FeedbackDensity,
    family: ColumnGroups | GramGroups,
    offset: Tensor,
    latents: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    curvature: CurvatureKind,
    seed: int,
) -> TunedGroups:
    """The log factors on the groups' prior precisions with the largest evidence, and the mode there.

    L-BFGS-B starts from the declared precisions and from the best factor common to all groups, so that a badly declared
    precision is no local trap, and keeps the better end. A group on whose plateau it stops goes to the bound if the
    evidence there is no smaller.

    Args:
        density: The feedback.
        family: The design, by columns or by Gram matrices.
        offset: Rewards of the items at z = 0, shape `(items,)`.
        latents: Where the likelihood's latents start, unconstrained, shape `(Q,)`.
        tolerance: Gradient norm of (z, latents) at which the final mode is found; on the way, at most 1e-7.
        max_iterations: Most Newton steps to each mode.
        curvature: Which curvature stands in the determinant.
        seed: Seed of the Fisher information's draws.

    Warns:
        ConvergenceWarning: A group's log factor is at its bound, the evidence is not stationary, or a point was no
            mode.
    """
    search = GroupEvidence(
        density, family, offset, latents,
        tolerance=min(tolerance, _TOLERANCE), max_iterations=max_iterations, curvature=curvature, seed=seed,
    )  # fmt: skip
    zeros = offset.new_zeros(family.num_groups)
    common = maximise_bracketed(lambda factor: -search.at(zeros + factor).log_evidence, BOUND)
    starts = [zeros + common] if abs(common) < _SAME_START else [zeros + common, zeros]
    found = max((_ascend(search, start) for start in starts), key=lambda point: point.log_evidence)
    for _ in range(_ROUNDS):
        moved = _pushed(search, _returned(search, found))
        if moved is found:
            break
        found = moved
    search.tolerance = tolerance
    found = search.at(found.log_factors)
    steepest = _steepest(search, found)
    _warn(search, found, steepest)
    return TunedGroups(
        found.log_factors, found.mode, found.design, found.log_evidence, search.evaluations, search.iterations,
        found.mode.converged and steepest <= _FLAT,
    )  # fmt: skip


def _ascend(search: GroupEvidence, start: Tensor) -> EvidencePoint:
    from scipy.optimize import minimize

    best: list[EvidencePoint] = []

    def negative(log_factors: np.ndarray) -> tuple[float, np.ndarray]:
        point = search.at(torch.as_tensor(log_factors.copy()).to(start))
        if not best or point.log_evidence > best[0].log_evidence:
            best[:] = [point]
        gradient, _ = search.slope(point)
        return -point.log_evidence, -gradient.cpu().numpy()

    minimize(
        negative, start.cpu().numpy(), jac=True, method="L-BFGS-B", bounds=[(-BOUND, BOUND)] * len(start),
        options={"gtol": 0.1 * _FLAT, "ftol": 1e-9, "maxiter": 200},
    )  # fmt: skip
    return best[0]


def _steepest(search: GroupEvidence, point: EvidencePoint) -> float:
    """Largest slope of the evidence, in nats for a log factor, that does not lead over a bound."""
    gradient, _ = search.slope(point)
    inside = torch.where(gradient > 0, point.log_factors < BOUND, point.log_factors > -BOUND)
    return float((gradient.abs() * inside).max())


def _pushed(search: GroupEvidence, found: EvidencePoint) -> EvidencePoint:
    """`found` with the groups that do next to nothing moved to the bound, where the evidence is no smaller there.

    The slope towards a width of zero falls off exponentially, so that an optimiser stops anywhere on the way.
    """
    _, informed = search.slope(found)
    idle = ((informed < _IDLE) & (found.log_factors < BOUND)).nonzero()[:, 0].tolist()
    for chosen in [idle, *([g] for g in idle)] if idle else []:
        factors = found.log_factors.clone()
        factors[chosen] = BOUND
        if torch.equal(factors, found.log_factors):
            continue
        point = search.at(factors)
        if point.log_evidence >= found.log_evidence - _SAME:
            found = point
    return found


def _returned(search: GroupEvidence, found: EvidencePoint) -> EvidencePoint:
    """The better of `found` and the end of an ascent with the groups that a long step took too far out brought back."""
    gradient, informed = search.slope(found)
    # At an optimum the slope is a small part of gamma, which is one of the terms that cancel in it.
    inward = (informed < _IDLE) & (informed > 0.0) & (gradient < -0.01 * informed)
    if not bool(inward.any()) and _steepest(search, found) <= _FLAT:
        return found
    factors = found.log_factors.clone()
    # Out there gamma falls like the variance: this is where one direction would be informed.
    factors[inward] = (factors[inward] + informed[inward].log()).clamp_min(-BOUND)
    point = _ascend(search, factors)
    return point if point.log_evidence > found.log_evidence + _SAME else found


def _warn(search: GroupEvidence, found: EvidencePoint, steepest: float) -> None:
    """The warnings of a finished search, as if from the caller of `tune_groups`."""
    messages = []
    if search.missed:
        messages.append(
            f"the prior precisions were tuned on the evidence at {search.evaluations} points, {search.missed} of "
            "which are no modes; raise `max_iterations` or `gradient_tolerance`"
        )
    if steepest > _FLAT:
        messages.append(
            f"the marginal likelihood still changes by {steepest:.1e} nats in a log prior precision where its search "
            "stopped; the precisions are not those of largest evidence"
        )
    for sign, limit in ((1.0, "infinity: the data prefer no reward from them"), (-1.0, "zero")):
        reached = [
            name for name, x in zip(search.family.group_names, sign * found.log_factors, strict=True) if x > BOUND - 0.1
        ]
        if reached:
            messages.append(
                f"the marginal likelihood still grows as the prior precision of {', '.join(reached)} goes to {limit}; "
                f"stopped at e^{sign * BOUND:+.0f} times the declared one"
            )
    for message in messages:
        warnings.warn(message, ConvergenceWarning, stacklevel=4)

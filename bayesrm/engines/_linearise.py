"""From a trained network to a linear model in few coordinates: the tangent, its prior precisions and its mode."""

import dataclasses
import re
from collections.abc import Collection, Sequence

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..priors import Gaussian
from ..rewards._subspaces import RowSpace, Sketch, Subspace
from ._curvature import CurvatureKind
from ._density import FeedbackDensity
from ._derivatives import Derivatives, digest
from ._directions import LeadingDirections
from ._group_evidence import tune_groups
from ._grouped_design import ColumnGroups, GramGroups
from ._processes import Processes

#: Eigenvalues of a Gram matrix below this share of the largest are rounding.
_RANK = 1e-12


@dataclasses.dataclass(frozen=True)
class Contrasts:
    """The items whose derivatives matter, and the rows in terms of them.

    Where feedback depends on differences of rewards alone, every item counts relative to the first one of its prompt:
    the derivatives that both responses of a pair share cancel before any sum is taken, and half of the items are left.

    Attributes:
        items: The items that are left, shape `(n,)`.
        against: What is subtracted from each, shape `(n,)`; `None` for nothing.
        groups: The rows, items numbered by their place in `items`; n stands for an item whose reward is zero.
    """

    items: Tensor
    against: Tensor | None
    groups: list[FeedbackGroup]

    @classmethod
    def of(cls, density: FeedbackDensity, prompt: Tensor) -> "Contrasts":
        """The contrasts of the items of a density's rows; `prompt` is the prompt of every item."""
        used = torch.unique(torch.cat([g.items[g.weight > 0].reshape(-1) for g in density.groups]))
        place = torch.full((len(prompt),), -1)
        if not density.only_differences():
            place[used] = torch.arange(len(used))
            # Items of masked rows alone have no place of their own; their answers do not count.
            place[place < 0] = len(used)
            return cls(used, None, _renumbered(density.groups, place))
        first = torch.full((int(prompt.max()) + 1,), len(prompt))
        first.scatter_reduce_(0, prompt[used], used, "amin")
        reference = first[prompt[used]]
        items = used[used != reference]
        place[items] = torch.arange(len(items))
        place[place < 0] = len(items)
        return cls(items, reference[used != reference], _renumbered(density.groups, place))

    def padded(self, values: Tensor) -> Tensor:
        """`values` of the items, shape `(n, ...)`, with a zero for the item that stands for none, `(n + 1, ...)`."""
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])])

    def relative(self, values: Tensor) -> Tensor:
        """`values` of all items, relative as the contrasts are, for the items that are left."""
        return values[self.items] if self.against is None else values[self.items] - values[self.against]

    def differences(self, items: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(places, relative derivatives) among the derivatives `(n, P)` of all items of some prompts."""
        where = torch.searchsorted(self.items, items).clamp_max(max(len(self.items) - 1, 0))
        mine = (self.items[where] == items).nonzero()[:, 0] if len(self.items) else where[:0]
        block = rows[mine.to(rows.device)]
        if self.against is not None:
            order = torch.argsort(items)
            others = order[torch.searchsorted(items[order], self.against[where[mine]])]
            block = block - rows[others.to(rows.device)]
        return where[mine], block


def _renumbered(groups: Sequence[FeedbackGroup], place: Tensor) -> list[FeedbackGroup]:
    return [dataclasses.replace(g, items=place[g.items]) for g in groups]


def precision_groups(sites: Sequence[str], by: str, head: Collection[str]) -> list[str]:
    """For each parameter site the name of the group that shares one prior precision.

    Args:
        sites: Parameter sites.
        by: `"one"`; `"module"`, sites that differ in the number of their layer alone; or `"layer"`, sites of the same
            numbered layer (`encoder.layer.3`).
        head: Sites of the head, and of what else is trained whole: the group `head`.

    Example:
        >>> sites = ["enc.layer.0.query.lora_A", "enc.layer.1.query.lora_A", "score.weight"]
        >>> precision_groups(sites, "module", {"score.weight"})
        ['enc.layer.query.lora_A', 'enc.layer.query.lora_A', 'head']
        >>> precision_groups(sites, "layer", {"score.weight"})
        ['enc.layer.0', 'enc.layer.1', 'head']
    """
    names = []
    for site in sites:
        layer = re.match(r"(.*?\.\d+)\.", site)
        if by == "one":
            names.append("all")
        elif site in head:
            names.append("head")
        elif by == "module" or layer is None:
            names.append(".".join(part for part in site.split(".") if not part.isdigit()))
        else:
            names.append(layer[1])
    return names


@dataclasses.dataclass(frozen=True)
class Linearised:
    """A linear model of the training items in whitened coordinates, at its tuned prior.

    Attributes:
        values: Reward at z = 0 and coordinates of the contrasts' items, float64, shape `(n + 1, 1 + R)`.
        scale: Prior standard deviation of every weight, tuned, shape `(P,)`, float64.
        prior: The prior with its tuned precisions.
        subspace: Directions of z; `None` when only the Gram matrix is known.
        dual: With a Gram matrix, V of z = V' (relative derivatives * scale) (theta - center) / scale, shape `(n, R)`.
        latents: Unconstrained latents at the tuned prior, a start for the mode.
        iterations: Newton steps that tuning took.
    """

    values: Tensor
    scale: Tensor
    prior: Gaussian
    subspace: Subspace | None
    dual: Tensor | None
    latents: Tensor
    iterations: int


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """How prior precisions are found: groups of sites (`None` for as declared), and settings of the inner Newton."""

    groups: str | None
    tolerance: float
    max_iterations: int
    curvature: CurvatureKind
    seed: int


def linearise_gram(
    derivatives: Derivatives, contrasts: Contrasts, density: FeedbackDensity, prior: Gaussian, shift: Tensor,
    latents: Tensor, settings: TuningSettings,
) -> Linearised:  # fmt: skip
    """The exact tangent in the row space of the contrasts, from their Gram matrix.

    Args:
        derivatives: Derivatives of all items, kept.
        contrasts: The items that matter.
        density: The feedback, on the contrasts' groups.
        prior: The declared prior.
        shift: center - theta_0, shape `(P,)`.
        latents: Start of the latents.
        settings: How prior precisions are found.
    """
    names = precision_groups(derivatives.sites, settings.groups or "one", derivatives.network.head_sites)
    order = list(dict.fromkeys(names))
    columns = _group_of_column(derivatives, names, order)
    scale = _prior_scale(derivatives, prior)
    n = len(contrasts.items)
    grams = torch.zeros(len(order), n + 1, n + 1, dtype=torch.float64)
    offset = contrasts.relative(derivatives.rewards.double())
    for start, stop, block in derivatives.column_blocks(contrasts.items, contrasts.against):
        offset += block @ shift[start:stop].double()
        whitened = block * scale[start:stop]
        grams[columns[start], :n, :n] += whitened @ whitened.T
    factors, latents, iterations = _tuned(
        density, GramGroups(list(grams), tuple(order)), contrasts.padded(offset), latents, settings
    )
    gram = torch.einsum("g,gij->ij", torch.exp(-factors), grams[:, :n, :n])
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _RANK * values.amax().clamp_min(1e-300)
    roots = values[kept].sqrt()
    design = vectors[:, kept] * roots
    table = contrasts.padded(torch.cat([offset[:, None], design], dim=1))
    scale = scale * torch.exp(-0.5 * factors)[columns]
    tuned = _tuned_prior(prior, derivatives.sites, names, order, factors)
    return Linearised(table, scale, tuned, None, vectors[:, kept] / roots, latents, iterations)


def row_space_basis(derivatives: Derivatives, contrasts: Contrasts, fitted: Linearised) -> RowSpace:
    """The directions behind a Gram matrix's coordinates."""
    assert fitted.dual is not None
    basis = torch.zeros(fitted.dual.shape[1], derivatives.columns, dtype=derivatives.dtype)
    for start, stop, block in derivatives.column_blocks(contrasts.items, contrasts.against):
        basis[:, start:stop] = (fitted.dual.T @ (block * fitted.scale[start:stop])).to(basis.dtype)
    return RowSpace(basis.to(derivatives.network.device))


def weights_at(derivatives: Derivatives, contrasts: Contrasts, fitted: Linearised, z: Tensor) -> Tensor:
    """Whitened weights at coordinates z, shape `(P,)`, without a basis."""
    assert fitted.dual is not None
    weights = torch.zeros(derivatives.columns, dtype=torch.float64)
    combination = fitted.dual @ z
    for start, stop, block in derivatives.column_blocks(contrasts.items, contrasts.against):
        weights[start:stop] = (combination @ block) * fitted.scale[start:stop]
    return weights


def linearise_in(
    subspace: Subspace | int, derivatives: Derivatives, contrasts: Contrasts, density: FeedbackDensity, prior: Gaussian,
    shift: Tensor, latents: Tensor, settings: TuningSettings,
) -> Linearised:  # fmt: skip
    """The tangent in all directions of few parameters, or in a sketch of many.

    Args:
        subspace: A `WholeSpace`, or the rank of the sketch to find first.
        derivatives: Derivatives of all items, kept or not.
        contrasts: See `linearise_gram`, like the rest.
        density: The feedback.
        prior: The declared prior.
        shift: center - theta_0, shape `(P,)`.
        latents: Start of the latents.
        settings: How prior precisions are found.
    """
    processes = Processes.current(derivatives.network.device)
    if isinstance(subspace, int):
        shapes = [tuple(derivatives.network.sites[site].shape) for site in derivatives.sites]
        sums = LeadingDirections(shapes, subspace, device=derivatives.network.device, seed=settings.seed)
        derivatives.accumulate(
            "directions", f"rank {subspace}, seed {settings.seed}, {digest(contrasts.items, contrasts.against)}",
            sums.state, lambda items, rows: sums.add(contrasts.differences(items, rows)[1]),
        )  # fmt: skip
        space: Subspace = sums.sketch(processes, derivatives.dtype)
    else:
        space = subspace
    n = len(contrasts.items)
    design = torch.zeros(n, space.size, dtype=torch.float64)
    moved = torch.zeros(n, dtype=torch.float64)

    def locate(items: Tensor, rows: Tensor) -> None:
        places, block = contrasts.differences(items, rows)
        moved[places] = (block @ shift.to(block)).double().cpu()
        # The prior's deviation is one number a site, so that directions found before and after scaling agree.
        design[places] = space.coordinates(block).double().cpu()

    decisive = digest(contrasts.items, contrasts.against, shift, *space.state().values())
    derivatives.accumulate("coordinates", decisive, {"design": design, "moved": moved}, locate)
    derivatives.forget("directions", "coordinates")
    design, moved = processes.total(design), processes.total(moved)
    rewards = derivatives.rewards
    if derivatives.jacobian is None:
        rewards = processes.total(rewards)
        derivatives.rewards = rewards
    offset = contrasts.relative(rewards.double()) + moved
    names = precision_groups(derivatives.sites, settings.groups or "one", derivatives.network.head_sites)
    order = list(dict.fromkeys(names))
    site_of = _site_of_coordinate(derivatives, space)
    deviation = torch.tensor([prior.of(site) ** -0.5 for site in derivatives.sites], dtype=torch.float64)
    group = torch.tensor([order.index(name) for name in names])
    design = contrasts.padded(design * deviation[site_of])
    column_group = group[site_of]
    if len(design) < design.shape[1]:
        parts = [design[:, column_group == g] for g in range(len(order))]
        family: GramGroups | ColumnGroups = GramGroups([part @ part.T for part in parts], tuple(order))
    else:
        family = ColumnGroups(design, column_group, tuple(order))
    factors, latents, iterations = _tuned(density, family, contrasts.padded(offset), latents, settings)
    table = torch.cat([contrasts.padded(offset)[:, None], design * torch.exp(-0.5 * factors)[column_group]], dim=1)
    scale = _prior_scale(derivatives, prior) * torch.exp(-0.5 * factors)[_group_of_column(derivatives, names, order)]
    tuned = _tuned_prior(prior, derivatives.sites, names, order, factors)
    return Linearised(table, scale, tuned, space, None, latents, iterations)


def _tuned(
    density: FeedbackDensity,
    family: GramGroups | ColumnGroups,
    offset: Tensor,
    latents: Tensor,
    settings: TuningSettings,
) -> tuple[Tensor, Tensor, int]:
    """Log factors on the precisions of the groups, latents there, and Newton steps taken."""
    if settings.groups is None:
        return torch.zeros(family.num_groups, dtype=torch.float64), latents, 0
    found = tune_groups(
        density, family, offset, latents, tolerance=max(settings.tolerance, 1e-5),
        max_iterations=settings.max_iterations, curvature=settings.curvature, seed=settings.seed,
    )  # fmt: skip
    return found.log_factors, found.mode.latents, found.iterations


def _tuned_prior(
    prior: Gaussian, sites: Sequence[str], names: Sequence[str], order: Sequence[str], factors: Tensor
) -> Gaussian:
    values = {
        site: prior.of(site) * float(factors[order.index(name)].exp()) for site, name in zip(sites, names, strict=True)
    }
    same = len(set(values.values())) == 1
    return Gaussian(next(iter(values.values()))) if same else Gaussian(values)


def _sizes(derivatives: Derivatives) -> list[int]:
    return [derivatives.network.sites[site].numel() for site in derivatives.sites]


def _prior_scale(derivatives: Derivatives, prior: Gaussian) -> Tensor:
    parts = zip(derivatives.sites, _sizes(derivatives), strict=True)
    return torch.cat([torch.full((size,), prior.of(site) ** -0.5, dtype=torch.float64) for site, size in parts])


def _group_of_column(derivatives: Derivatives, names: Sequence[str], order: Sequence[str]) -> Tensor:
    sizes = torch.tensor(_sizes(derivatives))
    return torch.repeat_interleave(torch.tensor([order.index(name) for name in names]), sizes)


def _site_of_coordinate(derivatives: Derivatives, subspace: Subspace) -> Tensor:
    counts = subspace.counts if isinstance(subspace, Sketch) else _sizes(derivatives)
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))

"""A posterior as ArviZ's inference data, with named dimensions."""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray

from .. import __version__
from .._arviz import arviz, inference_data
from .._typing import Tensor
from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ._density import FeedbackDensity
from ._evaluation import evaluations
from ._settings import check_choice
from .draws import JointDraws
from .report import FitReport

if TYPE_CHECKING:
    from .posterior import Posterior

#: Names of variables and dimensions of the group `posterior`; a latent of such a name gets a prefix.
_TAKEN = frozenset({"reward", "chain", "draw", "item", "annotator"})
#: ArviZ's names for what samplers record.
_STATISTICS = {"num_steps": "n_steps", "accept_prob": "acceptance_rate"}


class Unit(enum.StrEnum):
    """What has a number in `log_likelihood`."""

    COMPARISON = "comparison"
    """Each row."""
    PROMPT = "prompt"
    """All rows about one prompt."""


#: Names of the dimensions of a variable, and its values.
Variable = tuple[tuple[str, ...], NDArray[Any]]


def export(posterior: "Posterior", data: Comparisons, *, num_samples: int, seed: int, predictive: bool, by: str) -> Any:
    """What `Posterior.to_arviz` returns.

    Groups and variables, C candidates at most and F features:

    * `posterior`: `reward` (chain, draw, item), and each latent of the likelihood in constrained space; a latent with a
      number for each annotator has the dimension `annotator`.
    * `posterior_predictive` and `observed_data`: `feedback`, coded as in `FeedbackGroup`, (comparison) or for rankings
      (comparison, rank), padded with -1. Data of several kinds have a variable and a dimension for each, such as
      `feedback_rating` over `comparison_rating`.
    * `log_likelihood`: `feedback` (chain, draw, comparison), unweighted, in the order of the data; or by prompt
      (chain, draw, prompt), rows summed with their weights.
    * `sample_stats`: what the sampler recorded, under ArviZ's names; `log_ratio` of approximate engines.
    * `constant_data`: `kind`, `weight`, `prompt_of_comparison`, `annotator_of_comparison` (-1: none) and `margin` over
      `comparison`; `candidates` (comparison, candidate), items padded with -1; `prompt_of_item`, `words` over `item`;
      `features` (item, feature); `weight_of_prompt` (prompt), summed over its rows.

    Rows of weight 0 are in `constant_data` alone, so that no statistic counts them, nor prompts that have no others;
    coordinates of `comparison` are positions in the data, those of `prompt` numbers as in `prompt_of_comparison`.
    """
    check_choice("by", by, Unit)
    arviz()
    draws = posterior.draw(data, num_samples=num_samples, seed=seed)
    density = posterior._density_of(data)
    found = list(evaluations(density, draws, seed=seed + 1 if predictive else None))
    log_probs = [torch.cat(parts) for parts in zip(*(e.log_probs for e in found), strict=True)]
    counted, log_likelihood = _counted_rows(density.groups, log_probs)
    constants = _constants(data, density.groups)
    coordinate = counted
    if Unit(by) is Unit.PROMPT:
        weight = torch.from_numpy(constants["weight"][1][counted])
        coordinate, log_likelihood = _by_prompt(log_likelihood * weight, data.prompt_of_row[counted])
    sampled = ("chain", "draw")
    variables: dict[str, dict[str, Variable]] = {
        "posterior": {"reward": ((*sampled, "item"), _by_chain(draws, draws.rewards))}
        | _latents(posterior, density, draws),
        "log_likelihood": {"feedback": ((*sampled, Unit(by).value), _by_chain(draws, log_likelihood))},
        "sample_stats": {name: (sampled, _by_chain(draws, x)) for name, x in _statistics(draws).items()},
        "constant_data": constants,
    }
    variables["observed_data"], positions = _feedback(density.groups, [g.outcome[None] for g in density.groups], None)
    if predictive:
        drawn = [torch.cat(parts) for parts in zip(*(e.outcomes or [] for e in found), strict=True)]
        variables["posterior_predictive"], _ = _feedback(density.groups, drawn, draws)
    coordinates: dict[str, NDArray[Any]] = {
        "chain": np.arange(draws.num_chains),
        "draw": np.arange(len(draws.rewards) // draws.num_chains),
        "item": np.arange(data.num_items) if data.ids is None else np.asarray(data.ids),
        Unit(by).value: coordinate,
        "annotator": np.asarray(_annotators(posterior, data), dtype=str),
        **positions,
    }
    groups = {name: _dataset(group, coordinates) for name, group in variables.items() if group}
    if data.annotators:
        groups["constant_data"] = groups["constant_data"].assign_coords(annotator=coordinates["annotator"])
    return inference_data(groups, run_attributes(posterior.report, seed))


def _by_prompt(values: Tensor, prompts: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts there are, ascending, and for each the sum of its columns of `values`, shape `(draws, prompts)`."""
    found, place = np.unique(prompts, return_inverse=True)
    total = torch.zeros(len(values), len(found), dtype=values.dtype)
    return found, total.index_add(1, torch.from_numpy(place.reshape(-1)), values)


def _dataset(variables: Mapping[str, Variable], coordinates: Mapping[str, NDArray[Any]]) -> Any:
    import xarray

    sizes = {dim: n for dims, values in variables.values() for dim, n in zip(dims, values.shape, strict=True)}
    # Only `constant_data` lists all comparisons; some dimensions have no labels of their own.
    labels = {dim: coordinates[dim] if len(coordinates.get(dim, ())) == n else np.arange(n) for dim, n in sizes.items()}
    return xarray.Dataset(dict(variables), labels)


def _by_chain(draws: JointDraws, values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.detach().cpu().numpy()
    return array.reshape(draws.num_chains, -1, *array.shape[1:])


def _counted_rows(groups: Sequence[FeedbackGroup], values: Sequence[Tensor]) -> tuple[NDArray[np.int64], Tensor]:
    """Positions of the rows that count, ascending, and their values `(draws, rows)` from those of each group."""
    rows = torch.cat([g.rows[g.weight > 0] for g in groups])
    joined = torch.cat([v[:, g.weight > 0] for v, g in zip(values, groups, strict=True)], dim=1)
    order = torch.argsort(rows)
    return rows[order].numpy(), joined[:, order]


def _feedback(
    groups: Sequence[FeedbackGroup], values: Sequence[Tensor], draws: JointDraws | None
) -> tuple[dict[str, Variable], dict[str, NDArray[np.int64]]]:
    """Answers of the rows that count, a variable for each kind, and the positions of rows where there are several.

    `values` are of shape `(draws, rows, ...)` for each group, a single draw without `draws`.
    """
    kinds = list(dict.fromkeys(g.comparison.kind for g in groups))
    variables: dict[str, Variable] = {}
    positions = {}
    for kind in kinds:
        members = [(g, v) for g, v in zip(groups, values, strict=True) if g.comparison.kind == kind]
        suffix = "" if len(kinds) == 1 else f"_{kind}"
        dims: tuple[str, ...] = (f"comparison{suffix}",)
        if kind == "ranking":
            dims = (*dims, "rank")
            depth = max(v.shape[2] for _, v in members)
            members = [(g, torch.nn.functional.pad(v, (0, depth - v.shape[2]), value=-1)) for g, v in members]
        rows = torch.cat([g.rows[g.weight > 0] for g, _ in members])
        order = torch.argsort(rows)
        joined = torch.cat([v[:, g.weight > 0] for g, v in members], dim=1)[:, order]
        positions[dims[0]] = rows[order].numpy()
        name = f"feedback{suffix}"
        if draws is None:
            variables[name] = (dims, joined[0].numpy())
        else:
            variables[name] = (("chain", "draw", *dims), _by_chain(draws, joined))
    return variables, positions


def _latents(posterior: "Posterior", density: FeedbackDensity, draws: JointDraws) -> dict[str, Variable]:
    """Latents in constrained space; what has a number for each annotator is what an annotator more makes longer."""
    if not density.sites:
        return {}
    schema = posterior.schema
    longer = dataclasses.replace(schema, annotators=(*schema.annotators, "another"))
    grown = {s.name: s.shape for s in FeedbackDensity(posterior.program, longer.example_groups()).sites}
    variables = {}
    for site, values in zip(density.sites, density.constrain(draws.latents).values(), strict=True):
        name = f"latent.{site.name}" if site.name in _TAKEN else site.name
        dims = [
            "annotator" if n != m else f"{name}_dim_{i}"
            for i, (n, m) in enumerate(zip(site.shape, grown[site.name], strict=True))
        ]
        variables[name] = (("chain", "draw", *dims), _by_chain(draws, values))
    return variables


def _statistics(draws: JointDraws) -> dict[str, Tensor]:
    found = {_STATISTICS.get(name, name): values for name, values in draws.sample_stats.items()}
    return found if draws.log_ratio is None else found | {"log_ratio": draws.log_ratio}


def _annotators(posterior: "Posterior", data: Comparisons) -> tuple[str, ...]:
    """Names by the codes that `FeedbackSchema.check` leaves: those of the training data, where they had any."""
    trained = any(kind["annotator"] for kind in posterior.schema.kinds)
    return posterior.schema.annotators if trained else data.annotators


def _constants(data: Comparisons, groups: Sequence[FeedbackGroup]) -> dict[str, Variable]:
    most = max(g.items.shape[1] for g in groups)
    kind = np.empty(len(data), dtype="U8")
    weight, margin = np.ones(len(data)), np.full(len(data), np.nan)
    annotator = np.full(len(data), -1)
    candidates = np.full((len(data), most), -1)
    for g in groups:
        rows, c = g.rows.numpy(), g.comparison
        kind[rows] = c.kind
        weight[rows] = g.weight
        candidates[rows, : g.items.shape[1]] = g.items
        if c.annotator is not None:
            annotator[rows] = c.annotator
        if c.margin is not None:
            margin[rows] = c.margin
    variables: dict[str, Variable] = {
        "kind": (("comparison",), kind),
        "weight": (("comparison",), weight),
        "prompt_of_comparison": (("comparison",), np.asarray(data.prompt_of_row)),
        "candidates": (("comparison", "candidate"), candidates),
        "prompt_of_item": (("item",), np.asarray(data.prompt_of_item)),
        "weight_of_prompt": (
            ("prompt",), np.bincount(np.asarray(data.prompt_of_row), weights=weight, minlength=data.num_prompts)
        ),
    }  # fmt: skip
    if data.annotators:
        variables["annotator_of_comparison"] = (("comparison",), annotator)
    if not np.isnan(margin).all():
        variables["margin"] = (("comparison",), margin)
    if data.words is not None:
        variables["words"] = (("item",), np.asarray(data.words))
    if data.features is not None:
        variables["features"] = (("item", "feature"), np.asarray(data.features))
    return variables


def run_attributes(report: FitReport, seed: int) -> dict[str, str | int]:
    """What a data set of ArviZ says of the run that it came from; `seed` is that of the draws."""
    return {
        "inference_library": "bayesrm",
        "inference_library_version": __version__,
        "engine": report.engine["name"],
        "engine_settings": json.dumps(report.engine.get("settings", {}), default=str),
        "seed": report.seed,
        "draw_seed": seed,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
        "arviz_version": arviz().__version__,
    }

"""What a fit on adapter weights will need, stated before it starts: memory, disk, passes over the data."""

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod

from ..errors import EngineError
from ._directions import side_numbers
from ._kron import kron_bytes

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class WorkPlan:
    """Needs of a fit.

    Attributes:
        structure: Structure of the posterior.
        items: Items to differentiate.
        contrasts: Derivatives that matter: items relative to the first of their prompt, or all of them.
        parameters: Uncertain weights, P.
        coordinates: Coordinates of the posterior, R.
        passes: Passes over the items after training, each a forward and a backward pass.
        derivatives: Where derivatives are kept: `"memory"`, `"disk"` or `"nowhere"` (computed again in each pass).
        memory_gib: Largest memory beside the network's own.
        disk_gib: Disk.
        in_all_weights: Whether the coordinates are the weights themselves.
    """

    structure: str
    items: int
    contrasts: int
    parameters: int
    coordinates: int
    passes: int
    derivatives: str
    memory_gib: float
    disk_gib: float
    in_all_weights: bool = False

    def __str__(self) -> str:
        where = {
            "memory": "kept in memory",
            "disk": f"{self.disk_gib:.1f} GiB on disk",
            "nowhere": "computed each time",
        }
        return (
            f"{self.structure}: {self.items:,} items, {self.parameters:,} weights, {self.coordinates:,} coordinates; "
            f"{self.passes} pass{'es' if self.passes > 1 else ''} over the items, derivatives "
            f"{where[self.derivatives]}; about {self.memory_gib:.2f} GiB of memory"
        )


def plan_work(
    structure: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    items: int,
    contrasts: int,
    memory_gib: float,
    disk_gib: float,
    sketch_rank: int = 16,
    precision_groups: int = 1,
    itemsize: int = 4,
    coordinates: str = "auto",
    prefer_disk: bool = False,
) -> WorkPlan:
    """Plans the fit of a structure.

    Args:
        structure: `"full"`, `"sketch"`, `"last_layer"`, `"kron"` or `"diag"`.
        shapes: Shape of each uncertain parameter site.
        items: Items to differentiate.
        contrasts: How many derivatives matter.
        memory_gib: Memory that may be used.
        disk_gib: Disk that may be used.
        sketch_rank: Directions on each side of a matrix for `sketch`.
        precision_groups: Number of groups of prior precisions.
        itemsize: Bytes of a derivative.
        prefer_disk: Whether derivatives go to disk even where they fit into memory, so that a killed fit can go on.
        coordinates: Whether `full` works in all parameters (`"primal"`), in the row space (`"dual"`) or the smaller.
    """
    parameters = sum(prod(shape) for shape in shapes.values())
    in_all = coordinates == "primal" or (coordinates == "auto" and parameters <= contrasts)
    whole = structure == "full" and in_all
    stored = items * parameters * itemsize / _GIB
    square = 8 * contrasts**2 / _GIB
    rank = min(contrasts, parameters)
    chunk = 2 * 8 * 2**24 / _GIB
    if structure == "last_layer":
        rank = parameters
        need = 8 * (3 * contrasts * rank + 4 * min(rank, contrasts) ** 2 + rank * min(rank, contrasts)) / _GIB
    elif structure == "sketch":
        rank = sum(_sketched(shape, sketch_rank) for shape in shapes.values())
        sides = sum(side_numbers(n, sketch_rank) for shape in shapes.values() for n in _matrix(shape))
        working = min(rank, contrasts)
        need = 8 * (3 * contrasts * rank + 4 * working**2 + sides + rank * working) / _GIB
    elif whole:
        rank = parameters
        need = 8 * (3 * contrasts * parameters + 4 * parameters**2) / _GIB
    else:
        need = (precision_groups + 6) * square + chunk
        if structure == "full":
            need += rank * parameters * itemsize / _GIB
        elif structure == "kron":
            need += kron_bytes(shapes) / _GIB
    must_keep = structure in ("kron", "diag") or (structure == "full" and not whole)
    fits = need + stored <= 0.9 * memory_gib
    if fits and not (prefer_disk and stored <= disk_gib):
        return WorkPlan(structure, items, contrasts, parameters, rank, 1, "memory", need + stored, 0.0, whole)
    if fits or must_keep:
        return WorkPlan(structure, items, contrasts, parameters, rank, 1, "disk", need, stored, whole)
    passes = 2 if structure == "sketch" else 1
    return WorkPlan(structure, items, contrasts, parameters, rank, passes, "nowhere", need, 0.0, whole)


def check_plan(plan: WorkPlan, alternatives: Sequence[WorkPlan], *, memory_gib: float, disk_gib: float) -> None:
    """Raises an `EngineError` that lists what would fit, if `plan` does not."""

    def fits(p: WorkPlan) -> bool:
        return p.memory_gib <= memory_gib and p.disk_gib <= disk_gib

    if fits(plan):
        return
    listed = [f"structure='{p.structure}' ({p.memory_gib:.2f} GiB)" for p in alternatives if fits(p)]
    advice = f"within the limits are {', '.join(listed)}" if listed else "no structure is within the limits"
    raise EngineError(
        f"{plan}, {plan.disk_gib:.1f} GiB of disk, above `memory_gib={memory_gib}` or `disk_gib={disk_gib}`; {advice}; "
        "or use fewer comparisons, a lower rank, or raise the limits"
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def _sketched(shape: tuple[int, ...], rank: int) -> int:
    m, n = _matrix(shape)
    return min(m, rank**2 if n == 1 else rank) * min(n, rank**2 if m == 1 else rank)

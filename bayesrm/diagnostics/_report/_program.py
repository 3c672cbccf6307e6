"""The random variables that a program declares, found by running it."""

import dataclasses

import pyro
import torch
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance

from ...backend import seeded
from ...engines import Posterior


@dataclasses.dataclass(frozen=True)
class Variable:
    """A random variable of a program.

    Attributes:
        name: Name of its site.
        distribution: Name of its distribution, `outcome` for one written by hand.
        shape: Its shape.
        plates: Names of the plates it is in, with their sizes.
        parents: Variables that its distribution depends on, through the rewards where it does so.
        observed: Whether it is feedback.
    """

    name: str
    distribution: str
    shape: tuple[int, ...]
    plates: tuple[tuple[str, int], ...]
    parents: tuple[str, ...]
    observed: bool


def declared(posterior: Posterior) -> list[Variable]:
    """The variables of a posterior's program in the order of their declaration, with what each depends on.

    The program runs once as a Pyro program, on one made-up row of each kind of feedback it was fitted on; which values
    a log probability was computed from is followed through the arithmetic (`pyro.infer.inspect`).
    """
    groups = posterior.schema.example_groups()
    most = max(group.items.shape[1] for group in groups)
    features = torch.zeros(most, posterior._num_features(), dtype=torch.float64)
    # Validation would branch on tracked values; Pyro's own inspection turns it off as well.
    with seeded(0), torch.no_grad(), pyro.validation_enabled(False), TrackProvenance():
        trace = pyro.poutine.trace(posterior.program).get_trace(features, groups)
    found = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or pyro.poutine.util.site_is_subsample(site):
            continue
        upstream = get_provenance(site["fn"].log_prob(site["value"])) - {name}
        found.append(
            Variable(
                name,
                _distribution_name(site["fn"]),
                tuple(detach_provenance(site["value"]).shape),
                tuple((frame.name, int(frame.size)) for frame in site["cond_indep_stack"]),
                tuple(other for other in trace.nodes if other in upstream),
                bool(site["is_observed"]),
            )
        )
    return found


def _distribution_name(distribution: object) -> str:
    while hasattr(distribution, "base_dist") and type(distribution).__name__ in (
        "Independent",
        "ExpandedDistribution",
        "MaskedDistribution",
    ):
        distribution = distribution.base_dist
    name = type(distribution).__name__
    return "outcome" if name.startswith("_") else name

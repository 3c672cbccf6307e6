"""What was declared: the graphical model, drawn from the program itself, and the priors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...engines import NetworkDraws, Posterior
from ...rewards import PairwiseHead, ProjectedHead
from ...rewards.tangent import Tangent
from ._graph import describe, draw
from ._html import Html, element, join, paragraph, table
from ._program import Variable, declared
from ._section import Section, Status, several


def declaration(posterior: Posterior) -> Section:
    """The section on the program."""
    variables = declared(posterior)
    latents = [v for v in variables if not v.observed and not v.name.startswith("reward.")]
    report = posterior.report
    head, width = posterior.program.head, posterior._num_features()
    pairs = isinstance(head, PairwiseHead)
    if isinstance(head, Tangent | NetworkDraws):
        reward = "LoRA adapters on a language model"
    elif isinstance(head, PairwiseHead):
        reward = f"the features of both responses, intransitive in {several(head.rank, 'direction')}"
    elif isinstance(head, ProjectedHead):
        reward = f"{head.title} in {several(width, 'coordinate')}"
    else:
        reward = f"a {type(head).__name__} head on {several(width, 'feature')}"
    known = f" with {several(len(latents), 'latent')} of its own" if latents else " with no latents of its own"
    verdict = (
        f"{'Scores of pairs' if pairs else 'Rewards'} come from {reward} "
        f"({several(report.num_parameters, 'parameter')}), and answers from "
        f"{likelihood_name(posterior.program.likelihood)}{known}."
    )
    picture = element(
        "figure",
        draw(variables, num_features=posterior._num_features(), num_rows=report.num_rows, pairs=pairs),
        element(
            "figcaption",
            "The declared model, found by running the program. Ellipses are random variables, shaded ones are known; a "
            "box repeats what it holds; the "
            f"{'score' if pairs else 'reward'} is a function of the features and the weights.",
        ),
    )
    return Section("model", "What was declared", Status.NOTE, verdict, "", join([
        element("div", picture, element("div", _variables(variables), _settings(posterior)), class_="columns"),
        paragraph("In words: ", describe(variables), class_="tag"),
    ]))  # fmt: skip


def likelihood_name(likelihood: Any) -> str:
    """A likelihood in one line: wrappers around what they wrap, by kind where there are several."""
    if isinstance(likelihood, Mapping):
        return ", ".join(f"{likelihood_name(value)} for each {kind}" for kind, value in likelihood.items())
    name = getattr(likelihood, "__name__", type(likelihood).__name__)
    base = getattr(likelihood, "base", None)
    return f"{name}({likelihood_name(base)})" if base is not None else name


def _variables(variables: list[Variable]) -> Html:
    rows = [
        (
            v.name,
            v.distribution,
            "observed" if v.observed else " x ".join(f"{n:,}" for n in v.shape) or "one number",
            ", ".join(f"{name} ({size:,})" if not v.observed else name for name, size in v.plates) or "-",
        )
        for v in variables
    ]
    return table("Random variables of the program", ["site", "distribution", "shape", "plates"], rows)


def _settings(posterior: Posterior) -> Html:
    rows: list[tuple[str, object]] = []
    report = posterior.report
    precision = report.prior_precision
    shown = (
        ", ".join(f"{k} {v:.4g}" for k, v in list(precision.items())[:6])
        if isinstance(precision, Mapping)
        else f"{precision:.4g}"
    )
    rows.append(
        (
            "prior precision of the weights",
            f"{shown} ({'tuned by the marginal likelihood' if report.tuned else 'given'})",
        )
    )
    likelihood = posterior.program.likelihood
    value: Any
    for kind, value in likelihood.items() if isinstance(likelihood, Mapping) else [("", likelihood)]:
        while value is not None:
            name = getattr(value, "__name__", type(value).__name__)
            fields: Any = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            given: list[tuple[str, Any]] = [(f.name, getattr(value, f.name)) for f in fields if f.name != "base"]
            said = ", ".join(f"{n} = {v:.4g}" if isinstance(v, float) else f"{n} = {v}" for n, v in given)
            rows.append((f"{kind}: {name}" if kind else name, said or "no settings"))
            value = getattr(value, "base", None)
    return table("Priors and settings", ["of", "value"], rows)

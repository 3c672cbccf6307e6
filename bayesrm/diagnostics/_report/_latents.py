"""What was learnt about the annotators and the scale of the feedback: the likelihood's latents."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...backend import PriorRecorder, following, seeded
from ...engines import Posterior, TrajectoryPosterior
from ..plots import BLUE
from ._evidence import Floats
from ._html import Html, element, join, paragraph, table
from ._model import likelihood_name
from ._program import declared
from ._section import Section, Status, several

#: Rows of the table; vectors of latents can be long.
_MOST = 40
_LEVELS = (0.05, 0.5, 0.95)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A latent number: its posterior and prior 90% intervals.

    Attributes:
        site: Name of the site.
        entry: Which entry of it, or whose; empty for a single number.
        low: Lower end.
        median: Median.
        high: Upper end.
        prior_low: Lower end of the prior's interval.
        prior_high: Its upper end.
    """

    site: str
    entry: str
    low: float
    median: float
    high: float
    prior_low: float
    prior_high: float

    @property
    def name(self) -> str:
        """Site and entry."""
        return self.site + self.entry

    @property
    def informed(self) -> float:
        """By how much the data have narrowed the interval, 0 for not at all and 1 for a point."""
        before = self.prior_high - self.prior_low
        return 1.0 - (self.high - self.low) / before if before > 0 else 0.0


def latents(posterior: Posterior | TrajectoryPosterior, *, seed: int) -> Section:
    """The section on the latents."""
    found = intervals(posterior, seed=seed)
    if not found:
        verdict = (
            f"From {several(posterior.report.num_rows, 'comparison')} only the reward was learnt: "
            f"{likelihood_name(posterior.program.likelihood)} has no latents."
        )
        return Section("latents", "Latents of the likelihood", Status.NOTE, verdict, "", Html())
    held = [i for i in found if i.low == i.high]
    vague = [i for i in found if i.low < i.high and i.informed < 0.1]
    first = found[0]
    shown = f"{first.name} = {first.median:.3g} [{first.low:.3g}, {first.high:.3g}]"
    status, advice = Status.GOOD, ""
    if len(held) == len(found):
        status = Status.CAUTION
        verdict = (
            f"The {several(len(found), 'latent')} stand at their mode without an interval ({first.name} = "
            f"{first.median:.3g})."
        )
        advice = "This engine gives a point; fit with Laplace or NUTS to learn how uncertain they are."
    elif vague:
        status = Status.CAUTION
        verdict = (
            f"{len(vague)} of {several(len(found), 'latent')} are as uncertain as before the data, such as "
            f"{vague[0].name}; {shown}."
        )
        advice = (
            "Where the data say nothing the prior decides: check that the prior is meant, or collect feedback "
            "that bears "
            "on it (ties, more answers an annotator, responses of different lengths)."
        )
    else:
        verdict = (
            f"The data have narrowed {'the one latent' if len(found) == 1 else f'all {len(found)} latents'}; {shown}."
        )
    spans: dict[str, tuple[float, float]] = {}
    for i in found:
        low, high = spans.get(i.site, (np.inf, -np.inf))
        spans[i.site] = min(low, i.low, i.prior_low), max(high, i.high, i.prior_high)
    rows = [
        (
            i.name,
            bar(i, *spans[i.site]),
            f"{i.median:.3g}",
            f"{i.low:.3g} to {i.high:.3g}",
            f"{i.prior_low:.3g} to {i.prior_high:.3g}",
        )
        for i in found[:_MOST]
    ]
    head = ["latent", "posterior (blue), prior (grey)", "median", "90% interval", "prior 90%"]
    more = paragraph(f"and {len(found) - _MOST:,} more", class_="tag") if len(found) > _MOST else None
    return Section(
        "latents", "Latents of the likelihood", status, verdict, advice, join([table("Latents", head, rows), more])
    )


def intervals(posterior: Posterior | TrajectoryPosterior, *, seed: int) -> list[Interval]:
    """Posterior and prior intervals of every latent number, and of annotators' reliabilities where modelled."""
    draws = posterior.latents(2000, seed=seed)
    if not draws:
        return []
    prior = _prior_draws(posterior, 400, seed)
    names = posterior.schema.annotators
    raters: set[str] = set()
    if not isinstance(posterior, TrajectoryPosterior):
        raters = {v.name for v in declared(posterior) if any(size == len(names) for _, size in v.plates)}
    after = draws | _reliabilities(posterior.program.likelihood, draws)
    before = prior | _reliabilities(posterior.program.likelihood, prior)
    found = []
    for site, values in after.items():
        post, pre = _quantiles(values), _quantiles(before[site])
        for k in range(post.shape[1]):
            known = (site in raters or site not in draws) and post.shape[1] == len(names)
            entry = "" if values.dim() == 1 else f" {names[k]}" if known else f" [{k}]"
            found.append(Interval(site, entry, post[0, k], post[1, k], post[2, k], pre[0, k], pre[2, k]))
    return found


def bar(interval: Interval, low: float, high: float) -> Html:
    """An interval over its prior's on the axis from `low` to `high`, as a small picture."""
    width, height = 180, 20
    scale = (width - 12) / (high - low) if high > low else 0.0

    def at(value: float) -> float:
        return round(6 + (value - low) * scale, 1)

    words = f"{interval.low:.3g} to {interval.high:.3g}, prior {interval.prior_low:.3g} to {interval.prior_high:.3g}"

    def line(start: float, end: float, colour: str, thickness: int) -> Html:
        return element("line", x1=at(start), x2=at(end), y1="10", y2="10", stroke=colour, stroke_width=str(thickness))

    return element(
        "svg",
        line(interval.prior_low, interval.prior_high, "#c3c9d1", 8),
        line(interval.low, interval.high, BLUE, 3),
        element("circle", cx=at(interval.median), cy="10", r="4", fill=BLUE),
        viewBox=f"0 0 {width} {height}", width=str(width), height=str(height), role="img", aria_label=words,
    )  # fmt: skip


def _quantiles(values: torch.Tensor) -> Floats:
    flat = values.double().reshape(len(values), -1).numpy()
    result: Floats = np.quantile(flat, _LEVELS, axis=0)
    return result


def _prior_draws(posterior: Posterior | TrajectoryPosterior, count: int, seed: int) -> dict[str, torch.Tensor]:
    program = posterior.program.feedback_model if isinstance(posterior, TrajectoryPosterior) else posterior.program
    groups = posterior.schema.example_groups()
    zeros = [torch.zeros(g.items.shape, dtype=torch.float64) for g in groups]
    found: dict[str, list[torch.Tensor]] = {}
    with seeded(seed), torch.no_grad(), following(zeros[0]):
        for _ in range(count):
            recorder = PriorRecorder({})
            with recorder:
                program.feedback(zeros, [g.comparison for g in groups])
            for name, (_, value) in recorder.sites.items():
                found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def _reliabilities(likelihood: Any, draws: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`reliability` of each annotator, where the likelihood or one that it wraps defines it."""
    if isinstance(likelihood, Mapping):
        found: dict[str, torch.Tensor] = {}
        for kind, value in likelihood.items():
            own = {name.removeprefix(f"{kind}."): d for name, d in draws.items() if name.startswith(f"{kind}.")}
            found |= {f"{kind}.{name}": d for name, d in _reliabilities(value, own).items()}
        return found
    while likelihood is not None and not hasattr(likelihood, "reliability"):
        likelihood = getattr(likelihood, "base", None)
    return {} if likelihood is None else {"reliability": likelihood.reliability(draws)}

"""A posterior in a few lines: what was fitted, how it went, and the latents."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..rewards import ProjectedHead
from .report import FitReport

if TYPE_CHECKING:
    from .posterior import Posterior


def summarise(posterior: "Posterior") -> str:
    """The lines that `Posterior.summary` returns."""
    r, head = posterior.report, posterior.program.head
    reward = head.title if isinstance(head, ProjectedHead) else type(head).__name__
    if reward == "NetworkDraws":
        reward = "LoRA"
    precision = _shown_precision(r.prior_precision)
    lines = [
        f"{reward} reward, {_likelihood_name(posterior.program.likelihood)} likelihood, "
        f"{r.engine['name']} ({r.seconds:.1f} s)",
        f"  data        {r.num_rows} rows, {r.num_items} items, {r.num_prompts} prompts",
        f"  parameters  {r.num_parameters} in {r.num_coordinates} coordinates",
        f"  prior       precision {precision} ({'tuned by the marginal likelihood' if r.tuned else 'given'})",
        *_engine_lines(r),
    ]
    if r.training is not None:
        early = "" if r.training["steps"] >= r.training["planned_steps"] else "  STOPPED EARLY"
        lines.append(f"  training    {r.training['steps']} of {r.training['planned_steps']} steps{early}")
    if r.refinement is not None:
        move = r.refinement
        lines.append(
            f"  refinement  trained weights: gradient norm {move['trained_gradient_norm']:.1e}; the mode lies "
            f"{move['distance']:.2g} prior deviations away, {move['log_joint_gain']:.2f} nats higher, rewards move "
            f"by {move['reward_change']:.2g} (scale {move['reward_scale']:.2g})"
        )
    for name, draws in posterior.latents(2000).items():
        flat = draws.reshape(len(draws), -1)
        low, mid, high = torch.quantile(flat, torch.tensor([0.05, 0.5, 0.95], dtype=flat.dtype), dim=0)
        shown = ", ".join(
            f"{m:.3g} [{lo:.3g}, {hi:.3g}]" if lo < hi else f"{m:.3g} (held at its mode)"
            for lo, m, hi in zip(low[:4], mid[:4], high[:4], strict=True)
        )
        lines.append(f"  latent      {name} = {shown}" + (f", ... ({len(mid)} in all)" if len(mid) > 4 else ""))
    return "\n".join(lines)


def _engine_lines(r: FitReport) -> list[str]:
    found = r.diagnostics
    lines = []
    if "divergences" in found:
        r_hat, ess = (
            "unknown" if math.isnan(found[name]) else f"{found[name]:{digits}}"
            for name, digits in (("r_hat", ".3f"), ("ess", ".0f"))
        )
        lines.append(
            f"  chains      largest R-hat {r_hat}, smallest ESS {ess}, "
            f"{found['divergences']} divergences" + ("" if r.converged else "  NOT CONVERGED")
        )
    elif "elbo" in found:
        settled = "" if r.converged else "  NOT SETTLED: it still rose"
        error = found.get("elbo_std_error")
        lines.append(
            f"  bound       ELBO {found['elbo']:.2f}"
            + ("" if error is None else f" (standard error {error:.2g})")
            + settled
        )
        if "mean_scale" in found:
            lines.append(f"  spread      {found['mean_scale']:.2g} prior deviations on average")
    elif r.training is None or r.refinement is not None or r.engine["name"] == "MAP":
        lines.append(
            f"  optimum     gradient norm {r.gradient_norm:.1e} after {r.iterations} steps"
            + ("" if r.converged else "  NOT CONVERGED: this is no mode")
        )
    if "k_hat" in found:
        lines.append(f"  weights     k-hat {found['k_hat']:.2f}, effective sample size {found['ess']:.0f}")
    if r.curvature is not None:
        lines.append(f"  curvature   {r.curvature}")
    if r.log_evidence is not None:
        lines.append(f"  evidence    log p(feedback) = {r.log_evidence:.2f}")
    if r.structure_check is not None:
        check = r.structure_check
        lines.append(
            f"  structure   against full: variance ratio {check['variance_ratio']:.2f}, "
            f"rank correlation {check['rank_correlation']:.2f} ({check['num_probes']:.0f} comparisons)"
        )
    return lines


def _shown_precision(precision: float | Mapping[str, float]) -> str:
    if not isinstance(precision, Mapping):
        return f"{precision:.4g}"
    if len(precision) <= 8:
        return ", ".join(f"{site} {value:.4g}" for site, value in precision.items())
    return f"{min(precision.values()):.4g} to {max(precision.values()):.4g} over {len(precision)} sites"


def _likelihood_name(likelihood: Any) -> str:
    if isinstance(likelihood, Mapping):
        return " + ".join(f"{kind}: {_likelihood_name(value)}" for kind, value in likelihood.items())
    base = getattr(likelihood, "base", None)
    name = getattr(likelihood, "__name__", type(likelihood).__name__)
    return f"{name}({_likelihood_name(base)})" if base is not None else name

"""A posterior over rewards of states in a few lines."""

from typing import TYPE_CHECKING

import torch

from ..rewards import StateReward
from ._summary import _engine_lines, _likelihood_name

if TYPE_CHECKING:
    from .trajectory_posterior import TrajectoryPosterior

#: Terms of AVRIL's objective.
_TERMS = ("imitation", "kl", "constraint", "preferences")


def summarise(posterior: "TrajectoryPosterior") -> str:
    """The lines that `TrajectoryPosterior.summary` returns."""
    r, program, reward = posterior.report, posterior.program, posterior.program.reward
    assert isinstance(reward, StateReward)
    states = f"{reward.num_states} states" if reward.num_states is not None else "states with features"
    lines = [
        f"reward of a state{' and action' if reward.by_action else ''} ({states}, {reward.num_actions} actions), "
        f"{_likelihood_name(program.likelihood)} likelihood, {r.engine['name']} ({r.seconds:.1f} s)",
        f"  data        {r.num_rows} steps of {r.num_prompts} trajectories, {r.num_items} distinct states",
        f"  parameters  {r.num_parameters} in {r.num_coordinates} coordinates",
        f"  prior       precision {program.reward_precision:.4g}, discount {program.discount:.4g}, "
        f"rationality {program.rationality:.4g}",
        *_engine_lines(r),
    ]
    if "objective" in r.diagnostics:
        terms = ", ".join(f"{name} {r.diagnostics[name]:.4g}" for name in _TERMS if name in r.diagnostics)
        lines.append(f"  objective   {r.diagnostics['objective']:.4g} nats ({terms})")
    for name, draws in posterior.latents(2000).items():
        low, mid, high = torch.quantile(draws.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), dim=0)
        shown = ", ".join(
            f"{m:.3g} [{lo:.3g}, {hi:.3g}]" if lo < hi else f"{m:.3g} (held at a point)"
            for lo, m, hi in zip(*(q.reshape(-1)[:4].tolist() for q in (low, mid, high)), strict=True)
        )
        lines.append(f"  latent      {name} = {shown}")
    return "\n".join(lines)

"""The sections of a report on a posterior over rewards of states."""

from typing import Any

from ...data import Trajectories
from ...engines import TrajectoryPosterior
from ...errors import ArgumentError
from ._engine import Check, engine, judged
from ._latents import latents
from ._section import Section, Status
from ._states import rewards_by_state, uncertainty_by_visits
from ._trajectory_data import trajectory_data
from ._trajectory_model import trajectory_declaration
from ._trajectory_predictions import predicted_actions, predicted_preferences


def examine_trajectories(posterior: TrajectoryPosterior, data: Any, *, train: Any, seed: int) -> list[Section]:
    """The sections in the order of the page; see `report`.

    Raises:
        ArgumentError: The data are no trajectories.
        DataError: A state or an action is not one of the program's.
    """
    for name, part in (("data", data), ("train", train)):
        if part is not None and not isinstance(part, Trajectories):
            raise ArgumentError(f"`{name}` is of type {type(part).__name__}; this posterior is about Trajectories")
        if part is not None:
            posterior.state_reward.check(part)
    preferences = predicted_preferences(posterior, data, seed=seed)
    return [
        trajectory_data(posterior, data, train),
        trajectory_declaration(posterior),
        engine(posterior, entropy_checks(posterior)),
        predicted_actions(posterior, data, seed=seed),
        *([] if preferences is None else [preferences]),
        rewards_by_state(posterior, data, train),
        uncertainty_by_visits(posterior, data, train),
        *([latents(posterior, seed=seed)] if posterior.latents(1) else []),
    ]


def entropy_checks(posterior: TrajectoryPosterior) -> list[Check]:
    """Whether AVRIL's weights leave its distribution any entropy."""
    settings = posterior.report.engine.get("settings", {})
    if posterior.report.engine["name"] != "AVRIL":
        return []
    kl, constraint = float(settings.get("kl_weight", 1.0)), float(settings.get("constraint_weight", 1.0))
    return [
        judged(
            "entropy of the rewards",
            f"weights {kl:g} of the divergence, {constraint:g} of the constraint",
            "the first above the second",
            None if kl > constraint else Status.CAUTION,
            "with a constraint that weighs as much as the divergence the entropy cancels: standard deviations are the "
            "residual of the temporal difference, however few the data.",
            "Lower `constraint_weight` (0.1), or with known dynamics fit with NUTS, before you use the uncertainty.",
        )
    ]

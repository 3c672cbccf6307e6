"""What a posterior over rewards of states is judged on: trajectories, demonstrations, preferences."""

import numpy as np

from ...data import Trajectories
from ...engines import TrajectoryPosterior
from ...engines._trajectory_digest import trajectory_digest
from ._data import FEW_PROMPTS
from ._html import Html, element, join, paragraph, table
from ._section import Section, Status, several


def trajectory_data(posterior: TrajectoryPosterior, data: Trajectories, train: Trajectories | None) -> Section:
    """The section on the data."""
    report = posterior.report
    clusters = len(np.unique(data.clusters))
    judged = f"{several(len(data), 'trajectory', 'trajectories')} of {several(len(data.actions), 'step')}"
    judged = judged.replace(" of ", " with ", 1)
    fitted = f"{several(report.num_prompts, 'trajectory', 'trajectories')} with {several(report.num_rows, 'step')}"
    status, verdict, advice = Status.GOOD, f"{judged} judge a posterior that was fitted on {fitted}.", ""
    shared = None if train is None else shared_trajectories(data, train)
    if trajectory_digest(data) == report.data_digest:
        status = Status.PROBLEM
        verdict = f"These {several(len(data), 'trajectory', 'trajectories')} are the very data of the fit."
        advice = "Give trajectories that the fit has not seen: on its own data every posterior looks too good."
    elif shared:
        # In a small world two episodes may well take the same way.
        status = Status.CAUTION
        verdict += f" {shared:,} of them are step for step also in the training data."
        advice = "Make sure that no trajectory is on both sides; in a small world equal ones come about by chance."
    elif clusters < FEW_PROMPTS:
        status = Status.CAUTION
        advice = (
            f"Collect at least {FEW_PROMPTS} trajectories or groups of them that do not depend on each other: with "
            f"{clusters} the intervals below are too narrow."
        )
    elif data.refused:
        status = Status.CAUTION
        verdict += f" {several(len(data.refused), 'row')} of the source could not be used."
        advice = "Look at the reasons below; rows that are left out for a reason are seldom like the others."
    notes: list[Html | None] = [_sizes(posterior, data, train)]
    if shared is None and status != Status.PROBLEM:
        notes.append(
            paragraph("Whether these were held out cannot be told without the training data (`train`).", class_="tag")
        )
    if data.refused:
        notes.append(element("ul", *(element("li", f"row {row}: {reason}") for row, reason in data.refused[:5])))
    return Section("data", "The data", status, verdict, advice, join(notes))


def shared_trajectories(data: Trajectories, train: Trajectories) -> int:
    """How many trajectories of `data` have the states and actions of one of the training data."""
    known = set(_contents(train))
    return sum(content in known for content in _contents(data))


def _contents(data: Trajectories) -> list[bytes]:
    stops = np.cumsum(data.lengths)
    spans = zip(stops - data.lengths, stops, strict=True)
    return [data.states[a:b].tobytes() + b"|" + data.actions[a:b].tobytes() for a, b in spans]


def _sizes(posterior: TrajectoryPosterior, data: Trajectories, train: Trajectories | None) -> Html:
    report = posterior.report
    rows: list[tuple[str, ...]] = [
        ("fitted on", f"{report.num_prompts:,}", f"{report.num_rows:,}", f"{report.num_items:,}", "-", "-")
    ]
    for name, part in (("judged on", data), ("training data given", train)):
        if part is not None:
            distinct = len(np.unique(part.states, axis=0))
            counts = (len(part), len(part.actions), distinct, int(part.demonstrated.sum()), len(part.preferences))
            rows.append((name, *(f"{count:,}" for count in counts)))
    head = ["data", "trajectories", "steps", "distinct states", "demonstrations", "preferences"]
    return table("Sizes", head, rows)

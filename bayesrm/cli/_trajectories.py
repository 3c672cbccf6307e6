"""What commands say about trajectories: rows of predictions, and picks."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..beliefs import RewardBelief
from ..data import Trajectories
from ..diagnostics._actions import log_probabilities
from ..engines import TrajectoryPosterior


def trajectory_rows(posterior: TrajectoryPosterior, data: Trajectories) -> Iterator[dict[str, Any]]:
    """What is believed about each trajectory, in the order of the data.

    `mean` is the expected sum of its rewards and `mean_std` its standard deviation; `deviation` is the expected
    difference from the mean of its group, `std` the standard deviation of that, and `prob_best` the probability that no
    other one of the group is better. `action_log_prob` is the log probability of its actions, in nats.
    """
    belief = posterior.predict_items(data)
    deviations, best = belief.differences("mean"), belief.prob_best()
    log_probs = np.zeros(len(data))
    np.add.at(log_probs, data.owners, log_probabilities(posterior, data))
    place = _places(data)
    for i, name in enumerate(data.ids or ()):
        at = place[i]
        yield {
            "id": name,
            "group": None if data.group is None else data.group[i],
            "steps": int(data.lengths[i]),
            "mean": float(belief.mean[at]),
            "mean_std": float(belief.std[at]),
            "deviation": float(deviations.mean[at]),
            "std": float(deviations.std[at]),
            "prob_best": float(best[at]),
            "action_log_prob": float(log_probs[i]),
        }


def picked_trajectories(
    data: Trajectories, scores: Tensor, indices: Tensor, belief: RewardBelief
) -> Iterator[dict[str, Any]]:
    """The pick of each group: its place in the group, its name and score, and what is believed about it."""
    deviations = belief.differences("mean")
    for row, (group, index) in enumerate(zip(data.candidates().items(), indices.tolist(), strict=True)):
        name, members = group
        assert members.ids is not None
        yield {
            "group": name,
            "index": index,
            "id": members.ids[index],
            "candidates": len(members),
            "score": float(scores[row, index]),
            "deviation": float(deviations.mean[row, index]),
            "std": float(deviations.std[row, index]),
        }


def show_trajectory(row: Mapping[str, Any]) -> str:
    """A row of `trajectory_rows` for a person."""
    told = f"{row['id']}: {row['mean']:+.3f} +- {row['mean_std']:.3f}"
    if row["group"] is not None:
        told += (
            f"; against the others of group {row['group']} {row['deviation']:+.3f} +- {row['std']:.3f}, best with "
            f"probability {row['prob_best']:.2f}"
        )
    return f"{told}; {row['action_log_prob'] / row['steps']:.3f} nats an action"


def show_pick(pick: Mapping[str, Any]) -> str:
    """A pick for a person."""
    return f"group {pick['group']}: {pick['id']}, one of {pick['candidates']}, score {pick['score']:+.3f}"


def _places(data: Trajectories) -> list[tuple[int, int]]:
    """Group and place in it of each trajectory, as in a belief about all groups."""
    if data.group is None:
        return [(0, i) for i in range(len(data))]
    order = {name: row for row, name in enumerate(dict.fromkeys(data.group))}
    taken = [0] * len(order)
    found = []
    for name in data.group:
        row = order[name]
        found.append((row, taken[row]))
        taken[row] += 1
    return found

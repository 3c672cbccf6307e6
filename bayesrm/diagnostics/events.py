"""Events whose probability a posterior predicts: what calibration is checked on, for each kind of feedback."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.prediction import FeedbackPrediction
from ..errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Events:
    """Events that were given a probability and happened or not. Those of one row exclude each other.

    Attributes:
        probability: Predicted probability of each event, shape `(events,)`.
        occurred: Whether it occurred, 0 or 1, shape `(events,)`.
        rows: Row of the data that each belongs to, shape `(events,)`.
        weight: Weight of that row, shape `(events,)`.
    """

    probability: NDArray[np.float64]
    occurred: NDArray[np.float64]
    rows: NDArray[np.int64]
    weight: NDArray[np.float64]

    def __post_init__(self) -> None:
        if len({a.shape for a in (self.probability, self.occurred, self.rows, self.weight)}) > 1:
            raise ArgumentError(
                f"`probability` has shape {self.probability.shape}, `occurred` {self.occurred.shape}, `rows` "
                f"{self.rows.shape}, `weight` {self.weight.shape}; they must agree"
            )

    def counted(self) -> "Events":
        """Those of positive weight.

        Raises:
            ArgumentError: There are none.
        """
        keep = self.weight > 0
        if not keep.any():
            raise ArgumentError("no event has a positive weight; calibration needs at least one row that counts")
        return Events(self.probability[keep], self.occurred[keep], self.rows[keep], self.weight[keep])


def predicted_events(prediction: FeedbackPrediction) -> dict[str, Events]:
    """All events whose calibration can be judged, by name.

    For every kind the likeliest answer (top-label calibration; of equally likely ones one at random, always the same).
    Of choices "candidate chosen" and "tie", of rankings "first place", of ratings "level at most j" for each j, and
    "approved". That a candidate is chosen is one event for each candidate, pooled, so that nothing depends on the order
    in which candidates are listed: in data read from `chosen` and `rejected` that order is the answer.

    Args:
        prediction: From `posterior.predict_feedback(data)`. Rows whose outcomes are too many to enumerate are left out.

    Raises:
        ArgumentError: No row has outcomes that can be enumerated.
    """
    parts: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]] = {}
    for group in prediction.groups:
        if group.probs is None or group.observed is None or group.outcomes is None:
            continue
        kind, width = group.label.split(".")[:2]
        probs, observed, rows = group.probs.numpy(), group.observed.numpy(), group.rows.numpy()
        top, confidence = _likeliest(probs)
        parts.setdefault(f"{kind}: likeliest answer", []).append((confidence, (top == observed).astype(float), rows))
        for name, member in _sets_of_outcomes(kind, int(width), group.outcomes.numpy()):
            happened = member[observed].astype(float)
            every_row = np.repeat(rows, member.shape[1])
            parts.setdefault(f"{kind}: {name}", []).append(((probs @ member).ravel(), happened.ravel(), every_row))
    if not parts:
        raise ArgumentError("no row has outcomes that can be enumerated; calibration of its answers is undefined")
    weight = prediction.weight.numpy()
    joined = {}
    for name, pieces in parts.items():
        probability, occurred, rows = (np.concatenate(column) for column in zip(*pieces, strict=True))
        joined[name] = Events(probability, occurred, rows, weight[rows])
    return joined


def _sets_of_outcomes(kind: str, width: int, outcomes: NDArray[Any]) -> list[tuple[str, NDArray[np.float64]]]:
    """For each event the outcomes that belong to it, shape `(outcomes, exclusive events)`."""
    first = outcomes if outcomes.ndim == 1 else outcomes[:, 0]
    places = (first[:, None] == np.arange(width)).astype(float)
    if kind == "choice":
        tie = (first == width).astype(float)[:, None]
        return [("candidate chosen", places), *([("tie", tie)] if tie.any() else [])]
    if kind == "ranking":
        return [("first place", places)]
    if kind == "rating":
        return [(f"level at most {j}", (first <= j).astype(float)[:, None]) for j in np.sort(first)[:-1]]
    return [("approved", (first == 1).astype(float)[:, None])]


def top_label(prediction: FeedbackPrediction) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Probability of the likeliest outcome, whether it occurred, and the row, where outcomes are enumerated.

    Of outcomes that are equally likely one is taken at random, always the same.
    """
    likeliest = [found for name, found in predicted_events(prediction).items() if name.endswith(": likeliest answer")]
    return (
        np.concatenate([found.probability for found in likeliest]),
        np.concatenate([found.occurred for found in likeliest]),
        np.concatenate([found.rows for found in likeliest]),
    )


def top_choice(prediction: FeedbackPrediction) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """As `top_label`, but of rankings the candidate that is likeliest in first place.

    Of n candidates there are n! orders, so that even the likeliest is improbable and says little of the reward.
    """
    parts = []
    for group in prediction.groups:
        if group.probs is None or group.observed is None or group.outcomes is None:
            continue
        kind, width = group.label.split(".")[:2]
        probs, observed = group.probs.numpy(), group.observed.numpy()
        if kind == "ranking":
            ((_, first),) = _sets_of_outcomes(kind, int(width), group.outcomes.numpy())
            probs, observed = probs @ first, first[observed].argmax(1)
        top, probability = _likeliest(probs)
        parts.append((probability, (top == observed).astype(float), group.rows.numpy()))
    if not parts:
        raise ArgumentError("no row has outcomes that can be enumerated; calibration of its answers is undefined")
    confidence, occurred, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    return confidence, occurred, rows


def _likeliest(probs: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The likeliest outcome of each row and its probability; of outcomes that are equally likely one at random.

    The first would be right each time where data list the chosen candidate first.
    """
    most = probs.max(1, keepdims=True)
    among = probs >= most - 1e-12
    order = np.random.default_rng(0).random(probs.shape)
    return np.where(among, order, -1.0).argmax(1), most[:, 0]


def randomised_pit(prediction: FeedbackPrediction, *, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probability integral transform of ratings: F(y - 1) + v p(y) with uniform v, and the row of each.

    Uniform on (0, 1) if predictions are calibrated (Smith 1985; Czado, Gneiting & Held, Biometrics 2009): a hump says
    that the predicted spread is too wide, a trough that it is too narrow. Rows of weight 0 are left out.

    Args:
        prediction: From `posterior.predict_feedback(data)`.
        seed: Seed of v.

    Raises:
        ArgumentError: There are no ratings (or approvals, which are two levels).
    """
    rng = np.random.default_rng(seed)
    pit, rows = [], []
    for group in prediction.groups:
        if group.probs is None or group.observed is None or group.label.split(".")[0] not in ("rating", "approval"):
            continue
        keep = (prediction.weight[group.rows] > 0).numpy()
        probs, observed = group.probs.numpy()[keep], group.observed.numpy()[keep]
        at = np.take_along_axis(probs, observed[:, None], 1)[:, 0]
        up_to = np.take_along_axis(np.cumsum(probs, 1), observed[:, None], 1)[:, 0]
        pit.append(np.clip(up_to - at * rng.random(len(at)), 0.0, 1.0))
        rows.append(group.rows.numpy()[keep])
    if not rows or not sum(map(len, rows)):
        raise ArgumentError("the rows hold no ratings or approvals; only ordered answers have a PIT")
    return np.concatenate(pit), np.concatenate(rows)

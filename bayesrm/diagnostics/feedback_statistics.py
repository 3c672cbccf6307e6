"""Statistics of feedback that a posterior predictive check compares: one small function each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..data import Comparisons
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """What a statistic sees: comparisons with their answers, observed or replicated.

    Attributes:
        groups: Rows by kind and shape, as `data.groups()` returns them.
        rewards: Posterior mean reward of each item, shape `(items,)`; `None` where no posterior is at hand.
        annotators: Names of the annotators, in the order of their codes.
        order_is_answer: Whether each observed comparison lists the candidate that won first, as data read from `chosen`
            and `rejected` do; then the order says nothing about the judges.
    """

    groups: tuple[FeedbackGroup, ...]
    rewards: NDArray[np.float64] | None = None
    annotators: tuple[str, ...] = ()
    order_is_answer: bool = False
    _known: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, data: Comparisons, rewards: NDArray[np.float64] | None = None) -> "Feedback":
        """The feedback of a data set."""
        given = cls(tuple(data.groups()), rewards, tuple(data.annotators))
        picks = [p.pick[p.decided] for p in _first_picks(given)]
        order_is_answer = bool(picks) and not np.concatenate(picks).any()
        return dataclasses.replace(given, order_is_answer=order_is_answer)

    def with_outcomes(self, outcomes: Sequence[Any]) -> "Feedback":
        """The same comparisons with other answers, one tensor for each group."""
        groups = tuple(dataclasses.replace(g, outcome=o) for g, o in zip(self.groups, outcomes, strict=True))
        return dataclasses.replace(self, groups=groups)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The value of `make()`, computed once for all replicates: for what depends on the comparisons alone."""
        if key not in self._known:
            self._known[key] = make()
        value: T = self._known[key]
        return value

    def predicted(self) -> NDArray[np.float64]:
        """Posterior mean rewards, for statistics that need them.

        Raises:
            ArgumentError: There are none.
        """
        if self.rewards is None:
            raise ArgumentError("`rewards` is missing; this statistic compares answers with predicted rewards")
        return self.rewards


@runtime_checkable
class Statistic(Protocol):
    """A number, or named numbers, computed from feedback.

    Rows of weight 0 do not count. A statistic raises `ArgumentError` where the comparisons cannot support it, and gives
    NaN where only the answers at hand leave it undefined.
    """

    def __call__(self, feedback: Feedback) -> float | Mapping[str, float]:
        """The statistic of `feedback`."""
        ...


@dataclasses.dataclass(frozen=True)
class _Picks:
    """Of rows of positive weight: candidates, weight, first pick (K for a tie), whether one was picked, annotator."""

    group: FeedbackGroup
    keep: NDArray[np.bool_]
    items: NDArray[np.int64]
    weight: NDArray[np.float64]
    pick: NDArray[np.int64]
    annotator: NDArray[np.int64]

    @property
    def width(self) -> int:
        return int(self.items.shape[1])

    @property
    def decided(self) -> NDArray[np.bool_]:
        return self.pick < self.width


def _first_picks(feedback: Feedback, *, kinds: Sequence[str] = ("choice", "ranking"), width: int = 0) -> list[_Picks]:
    """What was chosen or ranked first; of ratings and approvals, the answer. `width` asks for rows of that many."""
    found = []
    for g in feedback.groups:
        keep = np.asarray(g.weight) > 0
        if g.comparison.kind not in kinds or not keep.any() or width not in (0, g.comparison.num_candidates):
            continue
        outcome = np.asarray(g.outcome)[keep]
        coded = g.comparison.annotator
        annotator = np.full(int(keep.sum()), -1) if coded is None else np.asarray(coded)[keep]
        pick = outcome if outcome.ndim == 1 else outcome[:, 0]
        found.append(_Picks(g, keep, np.asarray(g.items)[keep], np.asarray(g.weight)[keep], pick, annotator))
    return found


def _rate(events: Sequence[NDArray[np.bool_]], weights: Sequence[NDArray[np.float64]]) -> float:
    weight = np.concatenate(weights)
    return float(np.average(np.concatenate(events), weights=weight)) if len(weight) else float("nan")


def _require(found: Sized, name: str, needed: str) -> None:
    if not len(found):
        raise ArgumentError(f"{name} needs {needed}, which the data do not hold")


def tie_rate(feedback: Feedback) -> float:
    """Share of choices that are ties."""
    picks = _first_picks(feedback, kinds=("choice",))
    _require(picks, "the tie rate", "choices")
    return _rate([~p.decided for p in picks], [p.weight for p in picks])


def tie_rate_by_difference(feedback: Feedback, *, num_bins: int = 4) -> dict[str, float]:
    """Share of ties among pairs, in bins of the predicted difference of reward, each with as many pairs as the others.

    Ties should grow rarer with the difference as fast as the likelihood says: a constant share of ties, from judges who
    skip, shows here and nowhere in the overall rate.
    """
    picks = _first_picks(feedback, kinds=("choice",), width=2)
    _require(picks, "the tie rate by difference", "choices between two candidates")
    rewards = feedback.predicted()
    (pairs,) = picks

    def bins() -> tuple[list[NDArray[np.int64]], list[str]]:
        difference = np.abs(rewards[pairs.items[:, 0]] - rewards[pairs.items[:, 1]])
        members = [b for b in np.array_split(np.argsort(difference, kind="stable"), num_bins) if len(b)]
        ends = [(difference[b[0]], difference[b[-1]]) for b in members]
        return members, [f"difference {i}: {low:.2g} to {high:.2g}" for i, (low, high) in enumerate(ends, 1)]

    members, names = feedback.once(f"tie_rate_by_difference.{num_bins}", bins)
    tie = ~pairs.decided
    return {name: _rate([tie[b]], [pairs.weight[b]]) for name, b in zip(names, members, strict=True)}


def first_position_rate(feedback: Feedback) -> float:
    """Share of decided choices and rankings whose winner was listed first: judges' bias for the order of candidates."""
    picks = _first_picks(feedback)
    _require(picks, "the first-position rate", "choices or rankings")
    if feedback.order_is_answer:
        raise ArgumentError(
            "the first-position rate needs candidates in the order the judges saw; these data list the winner first"
        )
    return _rate([(p.pick == 0)[p.decided] for p in picks], [p.weight[p.decided] for p in picks])


def longest_wins_rate(feedback: Feedback) -> float:
    """Share of decided choices and rankings won by the longest candidate, where one is longest."""
    picks = [p for p in _first_picks(feedback) if p.group.comparison.lengths is not None]
    _require(picks, "the rate at which the longest wins", "choices or rankings with lengths (give `words`)")
    events, weights = [], []
    for p in picks:
        lengths = np.asarray(p.group.comparison.lengths)[p.keep]
        longest = lengths == lengths.max(1, keepdims=True)
        asked = p.decided & (longest.sum(1) == 1)
        events.append(longest.argmax(1)[asked] == p.pick[asked])
        weights.append(p.weight[asked])
    return _rate(events, weights)


def intransitive_triads(feedback: Feedback) -> float:
    """Share of cycles A > B > C > A among three items all of whose pairs were compared, by majority of choices.

    Triads with a pair that is tied on balance do not count.
    """
    picks = _first_picks(feedback, kinds=("choice",), width=2)
    _require(picks, "the share of intransitive triads", "choices between two candidates")
    (pairs,) = picks

    def design() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ends, code = np.unique(np.sort(pairs.items, axis=1), axis=0, return_inverse=True)
        return code.reshape(-1), _triads(ends)

    code, triads = feedback.once("intransitive_triads", design)
    _require(triads, "the share of intransitive triads", "three items that are all compared with each other")
    lower_first = pairs.items[:, 0] < pairs.items[:, 1]
    lower_won = (pairs.pick == 0) == lower_first
    net = np.bincount(code, np.where(pairs.decided, np.where(lower_won, 1.0, -1.0), 0.0))
    sign = np.sign(net)[triads]
    decided = (sign != 0).all(1)
    cycle = (sign[:, 0] == sign[:, 1]) & (sign[:, 0] != sign[:, 2])
    return float(cycle[decided].mean()) if decided.any() else float("nan")


def _triads(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each triad a < b < c of items, positions of the pairs (a, b), (b, c), (a, c) in `ends`; `(triads, 3)`."""
    position = {(int(a), int(b)): i for i, (a, b) in enumerate(ends) if a != b}
    above: dict[int, set[int]] = {}
    for a, b in position:
        above.setdefault(a, set()).add(b)
    found = [
        (i, position[b, c], position[a, c])
        for (a, b), i in position.items()
        for c in sorted(above[a] & above.get(b, set()))
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def rater_agreement(feedback: Feedback) -> dict[str, float]:
    """Agreement of different annotators on the same candidates, raw and beyond chance (Fleiss' kappa, 1971).

    Pairs of answers are pooled over all that was judged twice or more. Chance agreement comes from the shares of levels
    for ratings and approvals. Candidates of a choice or ranking have no lasting names, so of their answers chance knows
    the share of ties alone; rankings agree where their first places do. Rows that name no annotator count as different
    ones; two answers of one annotator are no agreement. Rows count once each, whatever their weight.
    """
    agreed = pairs = chance = 0.0
    for p in _first_picks(feedback, kinds=("choice", "ranking", "rating", "approval")):
        subject, rater, alone, count = feedback.once(
            f"rater_agreement.{p.group.label}", functools.partial(_judged_again, p)
        )
        if not count:
            continue
        compared = p.group.comparison.kind in ("choice", "ranking")
        answer = p.pick
        if compared:
            # The candidate's place among the row's items, so that the order of listing does not matter.
            rank = np.argsort(np.argsort(p.items, axis=1), axis=1)
            answer = np.where(p.decided, rank[np.arange(len(rank)), np.minimum(p.pick, p.width - 1)], p.width)
        pairs += count
        agreed += _num_pairs(subject, answer) - _num_pairs(rater, answer)
        share = np.bincount(answer[~alone]) / (~alone).sum()
        if compared:
            tied = share[p.width :].sum()
            chance += count * (tied**2 + (1 - tied) ** 2 / p.width)
        else:
            chance += count * (share**2).sum()
    if not pairs:
        raise ArgumentError("rater agreement needs candidates that two annotators judged, which the data do not hold")
    kappa = (agreed - chance) / (pairs - chance) if pairs - chance > 1e-9 * pairs else float("nan")
    return {"agreement": agreed / pairs, "kappa": kappa}


def _judged_again(p: _Picks) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]:
    """Code of what each row judges, of that with its annotator, rows nobody else judged, and pairs of annotators."""
    _, subject = np.unique(np.sort(p.items, axis=1), axis=0, return_inverse=True)
    subject = subject.reshape(-1)
    unnamed = -1 - np.arange(len(subject))
    rater = np.stack([subject, np.where(p.annotator < 0, unnamed, p.annotator)], axis=1)
    _, rater_code = np.unique(rater, axis=0, return_inverse=True)
    rater_code = rater_code.reshape(-1)
    others = np.bincount(subject)[subject] - np.bincount(rater_code)[rater_code]
    return subject, rater_code, others == 0, int(others.sum()) // 2


def _num_pairs(code: NDArray[np.int64], answer: NDArray[np.int64]) -> float:
    """Pairs of rows with the same code and the same answer."""
    size = np.bincount(code * (int(answer.max()) + 1) + answer).astype(np.float64)
    return float((size * (size - 1)).sum() / 2)


def rating_levels(feedback: Feedback) -> dict[str, float]:
    """Share of ratings on each level."""
    picks = _first_picks(feedback, kinds=("rating",))
    _require(picks, "the histogram of ratings", "ratings")
    levels = range(max(p.group.comparison.num_levels or 0 for p in picks))
    return {f"level {j}": _rate([p.pick == j for p in picks], [p.weight for p in picks]) for j in levels}


def approval_rate(feedback: Feedback) -> float:
    """Share of approvals among the labels good and not good."""
    picks = _first_picks(feedback, kinds=("approval",))
    _require(picks, "the approval rate", "approvals")
    return _rate([p.pick == 1 for p in picks], [p.weight for p in picks])


def predicted_best_rate(feedback: Feedback) -> float:
    """Share of decided choices and rankings won by the candidate with the highest predicted reward."""
    picks = _first_picks(feedback)
    _require(picks, "the rate at which the predicted best wins", "choices or rankings")
    rewards = feedback.predicted()
    return _rate(
        [(rewards[p.items].argmax(1) == p.pick)[p.decided] for p in picks], [p.weight[p.decided] for p in picks]
    )


def first_place_entropy(feedback: Feedback) -> float:
    """Entropy, in nats, of the predicted rank of what came first, among three candidates or more.

    0 when the candidate predicted best always comes first; the log of the number of candidates when any is as likely.
    """
    picks = [p for p in _first_picks(feedback) if p.width > 2]
    _require(picks, "the entropy of first places", "choices or rankings of three candidates or more")
    rewards = feedback.predicted()
    share = np.zeros(max(p.width for p in picks))
    for p in picks:
        rank = np.argsort(np.argsort(-rewards[p.items], axis=1), axis=1)
        won = rank[p.decided, p.pick[p.decided]]
        share += np.bincount(won, p.weight[p.decided], len(share))
    if not share.any():
        return float("nan")
    share = share[share > 0] / share.sum()
    return float(-(share * np.log(share)).sum())


def agreement_by_annotator(feedback: Feedback) -> dict[str, float]:
    """For each annotator the share of decided comparisons won by the candidate with the highest predicted reward."""
    picks = [p for p in _first_picks(feedback) if (p.annotator >= 0).any()]
    _require(picks, "agreement by annotator", "choices or rankings with named annotators")
    rewards = feedback.predicted()
    annotator = np.concatenate([p.annotator for p in picks])
    weight = np.concatenate([p.weight * p.decided for p in picks])
    agreed = np.concatenate([rewards[p.items].argmax(1) == p.pick for p in picks])
    result = {}
    for code in np.unique(annotator[annotator >= 0]):
        total = weight[annotator == code].sum()
        right = (weight * agreed)[annotator == code].sum()
        result[feedback.annotators[code]] = float(right / total) if total > 0 else float("nan")
    return result


#: The statistics of this module, in the order in which a report shows them.
STATISTICS: tuple[Statistic, ...] = (
    predicted_best_rate,
    tie_rate,
    tie_rate_by_difference,
    first_position_rate,
    longest_wins_rate,
    intransitive_triads,
    rater_agreement,
    first_place_entropy,
    rating_levels,
    approval_rate,
    agreement_by_annotator,
)

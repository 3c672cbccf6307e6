"""Rewards by state, and whether they are surer where demonstrations went."""

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from ...data import Trajectories
from ...engines import TrajectoryPosterior
from ..plots import BLUE
from ._figures import axes, image
from ._html import Html, join, paragraph, table
from ._section import Section, Status, several

#: States in the table and the figure; those with the highest and the lowest rewards.
_MOST = 30
#: Fewer states than this have no rank correlation worth a test.
_FEW = 8


def rewards_by_state(posterior: TrajectoryPosterior, data: Trajectories, train: Trajectories | None) -> Section:
    """The section on rewards: of all numbered states, or of the distinct ones of the data."""
    states, visits = visited(posterior, data if train is None else train, data)
    mean, std, likeliest = _moments(posterior, states)
    order = np.argsort(-mean, kind="stable")
    names = [_named(states[i]) for i in range(len(states))]
    best, worst = order[0], order[-1]
    verdict = (
        f"Highest is the reward of {names[best]} ({mean[best]:+.2f} ± {std[best]:.2f}), lowest that of {names[worst]} "
        f"({mean[worst]:+.2f} ± {std[worst]:.2f}), of {several(len(states), 'state')}."
    )
    shown = order if len(order) <= _MOST else np.concatenate([order[: _MOST // 2], order[-(_MOST // 2) :]])
    by_action = posterior.state_reward.by_action
    head = ["state", "mean", "std", "steps there", "likeliest action" + (", whose reward it is" if by_action else "")]
    rows = [(names[i], f"{mean[i]:+.3f}", f"{std[i]:.3f}", f"{visits[i]:,}", f"{likeliest[i]}") for i in shown]
    whose = "the data" if train is None else "the training data"
    left = len(order) - len(shown)
    body = [
        _figure(mean[shown], std[shown], [names[i] for i in shown]),
        table(f"Rewards by state, highest first; steps are those of {whose}", head, rows),
        paragraph(f"{left:,} states between them are left out.", class_="tag") if left else None,
        paragraph(
            "Rewards that differ by a potential explain the same actions: where demonstrations alone are known, the "
            "prior decides between them.",
            class_="tag",
        ),
    ]
    return Section("rewards", "Rewards by state", Status.NOTE, verdict, "", join(body))


def uncertainty_by_visits(posterior: TrajectoryPosterior, data: Trajectories, train: Trajectories | None) -> Section:
    """The section on whether rewards are surer where there were more steps."""
    title, name = "Uncertainty where nobody went", "uncertainty"
    states, visits = visited(posterior, data if train is None else train, data)
    _, std, _ = _moments(posterior, states)
    if train is None:
        advice = "Give the training data (`train`) to see whether the reward is surer where the fit saw more."
        verdict = (
            f"The reward of a state is known to ± {np.median(std):.2f} in the middle of "
            f"{several(len(states), 'state')}; how often the fit saw each is not known."
        )
        return Section(name, title, Status.NOTE, verdict, advice, Html())
    if len(states) < _FEW or len(np.unique(visits)) < 2 or np.ptp(std) <= 1e-9 * max(std.max(), 1e-300):
        verdict = (
            f"{several(len(states), 'state')} with {several(len(np.unique(visits)), 'number')} of visits and standard "
            f"deviations from {std.min():.3f} to {std.max():.3f} are too few or too equal to compare."
        )
        return Section(name, title, Status.NOTE, verdict, "", Html())
    found = scipy.stats.spearmanr(visits, std)
    unseen = visits == 0
    verdict = (
        f"The rank correlation of steps of the fit in a state with its standard deviation is {found.statistic:+.2f} "
        f"(p = {found.pvalue:.2g})"
    )
    if unseen.any() and (~unseen).any():
        verdict += (
            f"; {several(int(unseen.sum()), 'state')} without a step stand at ± {np.median(std[unseen]):.2f}, the "
            f"others at ± {np.median(std[~unseen]):.2f} in the middle"
        )
    good = found.statistic < 0 and found.pvalue < 0.05
    advice = "" if good else (
        "Do not count on the uncertainty to tell where nobody went. AVRIL with equal weights loses it (lower "
        "`constraint_weight`); with known dynamics fit with NUTS."
    )  # fmt: skip
    figure, ax = axes(5.4, 3.2)
    ax.plot(np.maximum(visits, 0.5), std, "o", color=BLUE, alpha=0.6, ms=4)
    ax.set(xscale="log", xlabel="steps of the training data in the state (0 drawn at 0.5)", ylabel="std of its reward")
    ax.set_ylim(bottom=0)
    body = image(figure, verdict, "Standard deviation of the reward of each state against steps of the fit there.")
    return Section(name, title, Status.GOOD if good else Status.CAUTION, verdict + ".", advice, body)


def visited(
    posterior: TrajectoryPosterior, counted: Trajectories, data: Trajectories
) -> tuple[NDArray[np.float64] | NDArray[np.int64], NDArray[np.int64]]:
    """The states, and how many steps of `counted` are in each: all numbered ones, or the distinct ones of both."""
    number = posterior.state_reward.num_states
    if number is not None:
        return np.arange(number), np.bincount(counted.states, minlength=number)
    both = np.concatenate([data.states, counted.states])
    states, places = np.unique(both, axis=0, return_inverse=True)
    return states, np.bincount(places.reshape(-1)[len(data.states) :], minlength=len(states))


def _moments(
    posterior: TrajectoryPosterior, states: NDArray[np.float64] | NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean and standard deviation of the reward of each state (of its likeliest action), and that action."""
    likeliest = posterior.policy(states).argmax(1).numpy()
    mean, std = posterior.reward(states, likeliest)
    return mean.double().numpy(), std.double().numpy(), likeliest


def _named(state: NDArray[np.float64] | np.int64) -> str:
    if np.ndim(state) == 0:
        return f"state {int(state)}"
    shown = [f"{x:.3g}" for x in np.asarray(state)[:4]]
    return f"({', '.join(shown)}{', …' if np.size(state) > 4 else ''})"


def _figure(mean: NDArray[np.float64], std: NDArray[np.float64], names: list[str]) -> Html:
    figure, ax = axes(5.4, 0.9 + 0.19 * len(mean))
    place = np.arange(len(mean))[::-1]
    ax.errorbar(mean, place, xerr=std, fmt="o", color=BLUE, ms=4, lw=1.2)
    ax.axvline(0.0, color="#c3c9d1", lw=0.8, zorder=0)
    ax.set_yticks(place, names, fontsize=8)
    ax.set(xlabel="reward, mean ± standard deviation")
    alt = "; ".join(f"{n}: {m:+.2f} ± {s:.2f}" for n, m, s in zip(names[:10], mean, std, strict=False))
    return image(figure, f"Rewards by state. {alt}", "Rewards by state under the posterior.")

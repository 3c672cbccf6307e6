"""Three fixed gridworlds, and one whose rewards are drawn from the prior."""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from bayesrm.programs.tabular_mdp import TabularMDP

SIDE, ACTIONS = 5, 4
#: Up, right, down, left.
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


@dataclasses.dataclass(frozen=True, eq=False)
class Gridworld:
    """A 5 x 5 grid: an action moves to the neighbour on its side, and stays where there is a border.

    Attributes:
        name: What it is called.
        rewards: Reward of each square, shape `(25,)`.
        mdp: Its dynamics.
    """

    name: str
    rewards: NDArray[np.float64]
    mdp: TabularMDP


def grid(name: str, rows: list[str], values: dict[str, float], *, slip: float = 0.0, end: str = "") -> Gridworld:
    """A gridworld from a drawing.

    Args:
        name: What it is called.
        rows: A character for each square.
        values: Reward of each character.
        slip: Probability that the move is a random one instead.
        end: Characters of squares that end the episode.
    """
    squares = "".join(rows)
    onward = np.zeros((SIDE**2, ACTIONS, SIDE**2))
    for square in range(SIDE**2):
        for action, (down, right) in enumerate(MOVES):
            row, column = square // SIDE + down, square % SIDE + right
            inside = 0 <= row < SIDE and 0 <= column < SIDE
            onward[square, action, row * SIDE + column if inside else square] += 1.0
    onward = (1.0 - slip) * onward + slip * onward.mean(1, keepdims=True)
    terminal = np.array([square in end for square in squares])
    return Gridworld(name, np.array([values[square] for square in squares]), TabularMDP(onward, terminal))


@functools.cache
def layouts() -> tuple[Gridworld, ...]:
    """The three layouts: a goal that ends the episode, places to stay at, and a slippery cliff."""
    goal = grid("goal", [".....", ".xx..", "...x.", ".x...", "....G"], {".": -0.3, "x": -1.5, "G": 3.0}, end="G")
    stay = grid("stay", ["A....", "..xx.", "..x..", ".....", "x...B"], {".": 0.0, "x": -1.0, "A": 1.0, "B": 2.0})
    cliff = grid(
        "cliff", [".....", ".....", "..+..", ".....", ".xxxG"], {".": -0.2, "+": 0.6, "x": -2.0, "G": 2.5},
        slip=0.2, end="G",
    )  # fmt: skip
    return goal, stay, cliff


def drawn(seed: int) -> Gridworld:
    """The dynamics of `stay`, with rewards from the standard normal prior: exact intervals cover at their level."""
    rewards = np.random.default_rng([71, seed]).normal(size=SIDE**2)
    return Gridworld("drawn", rewards, layouts()[1].mdp)

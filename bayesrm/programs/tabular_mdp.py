"""An environment whose states can be listed and whose dynamics are known."""

import dataclasses
import importlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._typing import Array
from ..backend import convert, ops
from ..data import Trajectories
from ..errors import ArgumentError, DataError

#: Most Newton steps; each gains more than a sweep of value iteration, and the last ones square the error.
_MOST_STEPS = 100
#: The values are found when a step moves them by less, relative to the largest.
_TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class TabularMDP:
    """S states, A actions, and the probability of each next state.

    In a terminal state one more action is taken, which ends the episode: its reward counts and nothing after it.

    Attributes:
        transitions: p(s' | s, a), shape `(S, A, S)`; of terminal states it does not count. Nested lists become arrays.
        terminal: Whether each state ends the episode, shape `(S,)`; by default none does.
        start: Probability of each state at the start, shape `(S,)`; by default equal for those that are not terminal.

    Raises:
        ArgumentError: An argument is no array of numbers, shapes disagree, or probabilities are negative or do not sum
            to 1.

    Example:
        >>> chain = TabularMDP(np.eye(3)[[[0, 1], [0, 2], [2, 2]]], terminal=np.array([False, False, True]))
        >>> chain.soft_values(torch.tensor([0.0, 0.0, 1.0]), discount=0.5, rationality=1000.0).max(1).values
        tensor([0.2502, 0.5003, 1.0000])
    """

    transitions: Any
    terminal: Any = None
    start: Any = None

    def __post_init__(self) -> None:
        transitions = _array("transitions", self.transitions, "(S, A, S)")
        shape = transitions.shape
        if len(shape) != 3 or shape[0] != shape[2] or shape[1] < 2:
            raise ArgumentError(f"`transitions` has shape {shape}; it is (S, A, S), with at least 2 actions")
        given = np.zeros(shape[0], dtype=bool) if self.terminal is None else self.terminal
        terminal = _array("terminal", given, "(S,)", None)
        if terminal.shape != shape[:1] or terminal.dtype != np.bool_:
            raise ArgumentError(
                f"`terminal` has shape {terminal.shape} and dtype {terminal.dtype}; it holds True or False, shape "
                f"({shape[0]},)"
            )
        if terminal.all():
            raise ArgumentError("`terminal` names every state; at least one has to go on")
        start = ~terminal / (~terminal).sum() if self.start is None else _array("start", self.start, "(S,)")
        if start.shape != shape[:1]:
            raise ArgumentError(f"`start` has shape {start.shape}; it is ({shape[0]},)")
        going = np.where(terminal[:, None, None], 1.0 / shape[0], transitions)
        for name, found in (("transitions", going), ("start", start)):
            # A number that is none compares false.
            wrong = ~((found >= 0).all(-1) & (np.abs(found.sum(-1) - 1.0) <= 1e-8))
            if wrong.any():
                place = f"[{', '.join(map(str, np.argwhere(wrong)[0]))}]" if name == "transitions" else ""
                row = found[wrong][0] if name == "transitions" else found
                raise ArgumentError(
                    f"`{name}` must be probabilities of {shape[0]} states that sum to 1; `{name}{place}` is "
                    f"{np.array2string(row, threshold=6, precision=4)}"
                )
        # What follows a terminal state is worth nothing: no way leads out of it.
        onward = np.where(terminal[:, None, None], 0.0, transitions)
        for name, value in (("transitions", onward), ("terminal", terminal), ("start", start)):
            object.__setattr__(self, name, value)

    @classmethod
    def load(cls, path: str | Path) -> "TabularMDP":
        """Reads what `save` wrote, or another `.npz` file with `transitions` and, if you like, `terminal` and `start`.

        Raises:
            DataError: The file is missing or damaged, or holds other arrays.
            ArgumentError: The arrays do not fit together.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise DataError(f"it is no .npz file of arrays ({error})", source=str(path)) from None
        if "transitions" not in found or not set(found) <= {"transitions", "terminal", "start"}:
            raise DataError(
                f"it holds {sorted(found)}; accepted are `transitions`, and `terminal` and `start` if you like",
                source=str(path),
            )
        return cls(**found)

    def save(self, path: str | Path) -> None:
        """Writes the arrays to a `.npz` file.

        Raises:
            ArgumentError: The path does not end in `.npz`.
        """
        if Path(path).suffix != ".npz":
            raise ArgumentError(f"`path` is {str(path)!r}; it must end in .npz")
        np.savez(path, transitions=self.transitions, terminal=self.terminal, start=self.start)

    @property
    def num_states(self) -> int:
        """S."""
        return int(self.transitions.shape[0])

    @property
    def num_actions(self) -> int:
        """A."""
        return int(self.transitions.shape[1])

    def soft_values(self, rewards: Array, *, discount: float, rationality: float) -> Array:
        """Action values of the soft-optimal policy, `Q = R + discount * E V'`, V a soft maximum of Q.

        V is log sum_a exp(rationality Q) / rationality. The limit of soft value iteration (Ziebart et al., 2008), by
        Newton's method: each step is the exact value of the present policy with its entropy. Differentiable once: a
        Newton step from the solution has the derivative of the implicit function.

        Args:
            rewards: Shape `(S,)`; or `(..., S, 1)` for states and `(..., S, A)` for states and actions. Torch or JAX.
            discount: Above 0 and below 1: at 1 the entropy of a policy may add up without end.
            rationality: Inverse temperature; the larger, the closer to the optimal values.

        Returns:
            Shape `(..., S, A)`.

        Raises:
            ArgumentError: The rewards are of another shape, or a number is out of range.
        """
        if not 0.0 < discount < 1.0 or not rationality > 0.0:
            raise ArgumentError(
                f"`discount` is {discount}, `rationality` {rationality}; they lie between 0 and 1, and above 0"
            )
        if rewards.ndim == 1:
            rewards = rewards[:, None]
        if rewards.shape[-2] != self.num_states or rewards.shape[-1] not in (1, self.num_actions):
            raise ArgumentError(
                f"`rewards` has shape {tuple(rewards.shape)}; it is (..., {self.num_states}, 1 or {self.num_actions})"
            )
        library = _Torch() if isinstance(rewards, torch.Tensor) else _Jax()
        onward = discount * convert(self.transitions, rewards)
        eye = convert(np.eye(self.num_states), rewards)

        def backed_up(r: Array, values: Array) -> Array:
            return r + library.einsum("sat,...t->...sa", onward, values)

        def step(r: Array, values: Array) -> Array:
            q = backed_up(r, values)
            policy = library.stop(ops.exp(ops.log_softmax(rationality * q, axis=-1)))
            moves = library.einsum("...sa,sat->...st", policy, onward)
            soft = ops.logsumexp(rationality * q, axis=-1) / rationality
            target = soft - library.einsum("...st,...t->...s", moves, values)
            return library.solve(eye - moves, target)

        fixed = library.stop(rewards)
        start = ops.logsumexp(rationality * backed_up(fixed, 0.0 * fixed[..., 0]), axis=-1) / rationality
        values = library.settled(lambda v: step(fixed, v), start)
        return backed_up(rewards, step(rewards, library.stop(values)))

    def policy(self, rewards: Array, *, discount: float, rationality: float) -> Array:
        """Probabilities of the actions under the soft-optimal policy, shape `(..., S, A)`; see `soft_values`."""
        values = self.soft_values(rewards, discount=discount, rationality=rationality)
        return ops.exp(ops.log_softmax(rationality * values, axis=-1))

    def policy_value(self, policy: Any, rewards: Any, *, discount: float) -> float:
        """Expected discounted sum of rewards from the start, without the entropy, exactly.

        Args:
            policy: Probabilities of the actions, shape `(S, A)`.
            rewards: Shape `(S,)`, or `(S, A)`.
            discount: Above 0 and below 1.

        Raises:
            ArgumentError: A shape is wrong, rows of the policy are no probabilities, or the discount is out of range.
        """
        policy, rewards = _array("policy", policy, "(S, A)"), _array("rewards", rewards, "(S,) or (S, A)")
        if not 0.0 < discount < 1.0:
            raise ArgumentError(f"`discount` is {discount}; it lies above 0 and below 1, so that sums converge")
        if rewards.shape not in ((self.num_states,), (self.num_states, self.num_actions)):
            raise ArgumentError(
                f"`rewards` has shape {rewards.shape}; it is {(self.num_states,)}, or "
                f"{(self.num_states, self.num_actions)}"
            )
        if policy.shape != (self.num_states, self.num_actions) or not np.allclose(policy.sum(1), 1.0, atol=1e-6):
            raise ArgumentError(f"`policy` must hold probabilities, shape {(self.num_states, self.num_actions)}")
        by_action = rewards[:, None] if rewards.ndim == 1 else rewards
        moves = np.einsum("sa,sat->st", policy, self.transitions)
        values = np.linalg.solve(np.eye(self.num_states) - discount * moves, (policy * by_action).sum(1))
        return float(self.start @ values)

    def demonstrate(
        self,
        rewards: NDArray[np.float64],
        num_trajectories: int,
        *,
        max_steps: int,
        discount: float,
        rationality: float,
        seed: int,
    ) -> Trajectories:
        """Demonstrations by the soft-optimal policy; those that reach no terminal state in `max_steps` are cut.

        Example:
            >>> chain = TabularMDP(np.eye(3)[[[0, 1], [0, 2], [2, 2]]], terminal=np.array([False, False, True]))
            >>> rewards = np.array([0.0, 0.0, 1.0])
            >>> chain.demonstrate(rewards, 2, max_steps=9, discount=0.9, rationality=50.0, seed=0).lengths
            array([2, 3])
        """
        policy = np.asarray(self.policy(torch.as_tensor(rewards).double(), discount=discount, rationality=rationality))
        rng = np.random.default_rng(seed)

        def draw(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
            below = rng.random((len(probabilities), 1)) > np.cumsum(probabilities, axis=1)
            # The last sum may fall short of 1 by rounding.
            places: NDArray[np.int64] = np.minimum(below.sum(1), probabilities.shape[1] - 1)
            return places

        state = draw(np.broadcast_to(self.start, (num_trajectories, self.num_states)))
        going = np.ones(num_trajectories, dtype=bool)
        states: list[list[int]] = [[] for _ in range(num_trajectories)]
        actions: list[list[int]] = [[] for _ in range(num_trajectories)]
        ended = np.zeros(num_trajectories, dtype=bool)
        for _ in range(max_steps):
            action = draw(policy[state])
            for i in np.flatnonzero(going):
                states[i].append(int(state[i]))
                actions[i].append(int(action[i]))
            ended |= going & self.terminal[state]
            going &= ~ended
            if not going.any():
                break
            state = np.where(going, draw(np.where(going[:, None], self.transitions[state, action], self.start)), state)
        return Trajectories.from_arrays(states, actions, ended=ended)


def _array(name: str, value: Any, shape: str, dtype: Any = np.float64) -> NDArray[Any]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"`{name}` cannot be read as an array ({error}); give numbers of shape {shape}") from None


class _Torch:
    """What `soft_values` needs beside `ops`, under torch."""

    einsum = staticmethod(torch.einsum)

    def stop(self, x: Any) -> Any:
        return x.detach()

    def solve(self, matrix: Any, vector: Any) -> Any:
        return torch.linalg.solve(matrix, vector[..., None])[..., 0]

    def settled(self, step: Any, values: Any) -> Any:
        for _ in range(_MOST_STEPS):
            before, values = values, step(values)
            if float((values - before).abs().max()) <= _TOLERANCE * (1.0 + float(values.abs().max())):
                break
        return values


class _Jax:
    """The same under JAX, where it may be traced."""

    def __init__(self) -> None:
        self._jax = importlib.import_module("jax")
        self.einsum = self._jax.numpy.einsum

    def stop(self, x: Any) -> Any:
        return self._jax.lax.stop_gradient(x)

    def solve(self, matrix: Any, vector: Any) -> Any:
        return self._jax.numpy.linalg.solve(matrix, vector[..., None])[..., 0]

    def settled(self, step: Any, values: Any) -> Any:
        def unsettled(state: Any) -> Any:
            count, away, now = state
            return (count < _MOST_STEPS) & (away > _TOLERANCE * (1.0 + abs(now).max()))

        def move(state: Any) -> Any:
            moved = step(state[2])
            return state[0] + 1, abs(moved - state[2]).max(), moved

        return self._jax.lax.while_loop(unsettled, move, (0, self._jax.numpy.inf + 0.0 * values.sum(), values))[2]

"""Inverse reinforcement learning as a program, and soft-optimal values of known dynamics."""

import math

import numpy as np
import pyro
import pytest
import torch

import bayesrm as brm
from bayesrm.data import Trajectories
from bayesrm.errors import ArgumentError, DataError
from bayesrm.programs import InverseRL, Steps
from bayesrm.programs.tabular_mdp import TabularMDP
from bayesrm.rewards import StateReward

DISCOUNT, RATIONALITY = 0.85, 1.7


def random_mdp(seed=0, states=5, actions=3, terminal=(4,)):
    rng = np.random.default_rng(seed)
    ends = np.isin(np.arange(states), terminal)
    return TabularMDP(rng.dirichlet(np.ones(states), size=(states, actions)), ends), rng


def value_iteration(mdp, rewards, discount=DISCOUNT, rationality=RATIONALITY):
    """Soft value iteration, the slow way."""
    values = np.zeros(mdp.num_states)
    for _ in range(2000):
        q = np.empty((mdp.num_states, mdp.num_actions))
        for s in range(mdp.num_states):
            for a in range(mdp.num_actions):
                onward = 0.0 if mdp.terminal[s] else mdp.transitions[s, a] @ values
                q[s, a] = rewards[s, a] + discount * onward
        values = np.log(np.exp(rationality * q).sum(1)) / rationality
    return q


@pytest.mark.parametrize("terminal", [(), (4,), (0, 3)])
def test_soft_values_are_the_limit_of_value_iteration(terminal):
    mdp, rng = random_mdp(terminal=terminal)
    by_action = rng.normal(size=(5, 3))
    for rewards in (by_action, by_action[:, :1]):
        found = mdp.soft_values(torch.as_tensor(rewards), discount=DISCOUNT, rationality=RATIONALITY)
        expected = value_iteration(mdp, np.broadcast_to(rewards, (5, 3)))
        assert np.abs(found.numpy() - expected).max() < 1e-9
    flat = mdp.soft_values(torch.as_tensor(by_action[:, 0]), discount=DISCOUNT, rationality=RATIONALITY)
    assert torch.equal(flat, found)
    # Another discount is another answer.
    assert np.abs(found.numpy() - value_iteration(mdp, np.broadcast_to(rewards, (5, 3)), discount=0.9)).max() > 0.1


def test_soft_values_of_many_rewards_and_cold_policies():
    mdp, rng = random_mdp()
    rewards = torch.as_tensor(rng.normal(size=(4, 5, 1)))
    for rationality in (0.01, 1.0, 1e5):
        found = mdp.soft_values(rewards, discount=0.95, rationality=rationality)
        for one, expected in zip(rewards, found, strict=True):
            alone = mdp.soft_values(one, discount=0.95, rationality=rationality)
            assert torch.allclose(alone, expected, rtol=1e-9, atol=1e-9)
    # Cold: the optimal values, of which the greedy policy's own value is the maximum over actions.
    best = found[0].max(1).values
    onward = torch.as_tensor(0.95 * mdp.transitions) @ best
    assert torch.allclose(found[0], rewards[0] + onward, atol=1e-3)


def test_derivatives_of_soft_values_are_those_of_differences():
    mdp, rng = random_mdp()
    weights = torch.as_tensor(rng.normal(size=(5, 3)))
    rewards = torch.as_tensor(rng.normal(size=(5, 3)), dtype=torch.float64).requires_grad_(True)

    def value(r):
        return (weights * mdp.soft_values(r, discount=DISCOUNT, rationality=RATIONALITY)).sum()

    (slope,) = torch.autograd.grad(value(rewards), [rewards])
    step = 1e-5
    for s in range(5):
        for a in range(3):
            moved = torch.zeros(5, 3, dtype=torch.float64)
            moved[s, a] = step
            difference = (value(rewards + moved) - value(rewards - moved)) / (2 * step)
            # Rounding 1e-16 * 10 / step and the third derivative times step^2.
            assert float(slope[s, a]) == pytest.approx(float(difference.detach()), abs=1e-8)


def test_jax_agrees_in_values_and_derivatives():
    jax = pytest.importorskip("jax")
    mdp, rng = random_mdp()
    rewards = rng.normal(size=(5, 1))
    weights = rng.normal(size=(5, 3))
    x = torch.as_tensor(rewards).requires_grad_(True)
    expected = mdp.soft_values(x, discount=DISCOUNT, rationality=RATIONALITY)
    (slope,) = torch.autograd.grad((torch.as_tensor(weights) * expected).sum(), [x])
    with jax.enable_x64(True):

        def value(r):
            return (weights * mdp.soft_values(r, discount=DISCOUNT, rationality=RATIONALITY)).sum()

        at = jax.numpy.asarray(rewards)
        found = jax.jit(lambda r: mdp.soft_values(r, discount=DISCOUNT, rationality=RATIONALITY))(at)
        assert np.abs(np.asarray(found) - expected.detach().numpy()).max() < 1e-11
        assert np.abs(np.asarray(jax.jit(jax.grad(value))(at)) - slope.numpy()).max() < 1e-10


def test_policy_value_is_a_geometric_sum():
    mdp, rng = random_mdp()
    policy = rng.dirichlet(np.ones(3), size=5)
    rewards = rng.normal(size=(5, 3))
    at, total = mdp.start, 0.0
    for t in range(500):
        total += DISCOUNT**t * (at @ (policy * rewards).sum(1))
        at = np.einsum("s,sa,sat->t", at, policy, mdp.transitions)
    assert mdp.policy_value(policy, rewards, discount=DISCOUNT) == pytest.approx(total, abs=1e-12)


def test_demonstrations_act_by_the_policy_and_end_in_terminal_states():
    mdp, rng = random_mdp()
    rewards = rng.normal(size=5)
    data = mdp.demonstrate(rewards, 4000, max_steps=6, discount=DISCOUNT, rationality=RATIONALITY, seed=3)
    policy = mdp.policy(torch.as_tensor(rewards), discount=DISCOUNT, rationality=RATIONALITY).numpy()
    counts = np.zeros((5, 3))
    np.add.at(counts, (data.states, data.actions), 1)
    error = np.sqrt(policy * (1 - policy) / counts.sum(1, keepdims=True))
    assert (np.abs(counts / counts.sum(1, keepdims=True) - policy) < 4.5 * error).all()
    assert ((data.states == 4) == (data.last & data.ended[data.owners])).all()
    assert data.lengths.max() == 6
    assert (~data.ended[data.lengths < 6]).sum() == 0
    again = mdp.demonstrate(rewards, 4000, max_steps=6, discount=DISCOUNT, rationality=RATIONALITY, seed=3)
    assert (again.states == data.states).all()


def test_next_states_follow_the_transitions():
    mdp, rng = random_mdp(terminal=())
    data = mdp.demonstrate(rng.normal(size=5), 2000, max_steps=5, discount=0.5, rationality=0.1, seed=0)
    here = np.flatnonzero(~data.last)
    counts = np.zeros((5, 3, 5))
    np.add.at(counts, (data.states[here], data.actions[here], data.states[here + 1]), 1)
    total = counts.sum(2, keepdims=True)
    error = np.sqrt(mdp.transitions * (1 - mdp.transitions) / total)
    assert (np.abs(counts / total - mdp.transitions) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transitions": np.ones((2, 2, 3))}, r"`transitions` has shape \(2, 2, 3\)"),
        ({"transitions": np.ones((2, 2, 2))}, "`transitions` must be probabilities"),
        ({"transitions": np.full((2, 2, 2), 0.5), "terminal": np.array([True, True])}, "`terminal` names every state"),
        ({"transitions": np.full((2, 2, 2), 0.5), "terminal": np.array([True])}, r"`terminal` has shape \(1,\)"),
        ({"transitions": np.full((2, 2, 2), 0.5), "start": np.array([0.5, 0.6])}, "`start` must be probabilities"),
        ({"transitions": np.full((2, 2, 2), 0.5), "start": [1.0]}, r"`start` has shape \(1,\); it is \(2,\)"),
        (
            {"transitions": [[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.6]]]},
            r"`transitions\[1, 1\]` is \[0\.5 0\.6\]",
        ),
        ({"transitions": [[[1.0, np.nan], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]]}, r"`transitions\[0, 0\]` is"),
        ({"transitions": [[[1.0], [1.0, 0.0]]]}, r"`transitions` cannot be read as an array .* shape \(S, A, S\)"),
        ({"transitions": "chain"}, "`transitions` cannot be read as an array"),
        ({"transitions": np.full((2, 2, 2), 0.5), "terminal": [0, 1]}, "it holds True or False"),
    ],
)
def test_wrong_dynamics_are_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        TabularMDP(**arguments)


def test_nested_lists_are_arrays():
    lists = TabularMDP([[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]], [False, True], [1.0, 0.0])
    assert lists.transitions.shape == (2, 2, 2)
    assert lists.terminal.dtype == np.bool_
    assert lists.start.tolist() == [1.0, 0.0]


def test_dynamics_on_disk(tmp_path):
    mdp, _ = random_mdp()
    mdp.save(tmp_path / "world.npz")
    again = TabularMDP.load(tmp_path / "world.npz")
    for name in ("transitions", "terminal", "start"):
        assert np.array_equal(getattr(again, name), getattr(mdp, name))
    np.savez(tmp_path / "plain.npz", transitions=np.full((2, 2, 2), 0.5))
    assert TabularMDP.load(tmp_path / "plain.npz").start.tolist() == [0.5, 0.5]
    np.savez(tmp_path / "other.npz", moves=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (
        ("other.npz", r"other\.npz: it holds \['moves'\]"),
        ("text.npz", r"text\.npz: it is no \.npz file"),
        ("absent.npz", r"absent\.npz: it is no \.npz file"),
    ):
        with pytest.raises(DataError, match=message):
            TabularMDP.load(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"must end in \.npz"):
        mdp.save(tmp_path / "world.npy")


def test_wrong_questions_are_named():
    mdp, _ = random_mdp()
    with pytest.raises(ArgumentError, match=r"`discount` is 1\.0"):
        mdp.soft_values(torch.zeros(5), discount=1.0, rationality=1.0)
    with pytest.raises(ArgumentError, match=r"`rewards` has shape \(4, 1\)"):
        mdp.soft_values(torch.zeros(4), discount=0.9, rationality=1.0)
    with pytest.raises(ArgumentError, match="`policy` must hold"):
        mdp.policy_value(np.ones((5, 3)), np.zeros(5), discount=0.9)
    uniform = torch.full((5, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"`discount` is 1\.0"):
        mdp.policy_value(uniform, np.zeros(5), discount=1.0)
    with pytest.raises(ArgumentError, match=r"`rewards` has shape \(4,\)"):
        mdp.policy_value(uniform, np.zeros(4), discount=0.5)
    # A policy as `policy` returns it.
    assert mdp.policy_value(uniform, torch.zeros(5), discount=0.5) == 0.0


def normal(x, deviation):
    return (-0.5 * (x / deviation) ** 2 - np.log(deviation) - 0.5 * math.log(2 * math.pi)).sum()


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_log_joint_given_action_values_is_the_sum_by_hand():
    rng = np.random.default_rng(0)
    values, actions = rng.normal(size=(4, 3)), np.array([2, 0, 1, 1])
    demonstrated, visits = np.array([2.0, 0.0, 1.0, 0.0]), np.array([[2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 3.0]])
    program = InverseRL(StateReward(3), prior=brm.priors.Gaussian(4.0), rationality=RATIONALITY)
    rewards = rng.normal(size=4)
    groups = Trajectories.from_arrays([[0], [0]], [[0], [0]], preferences=[[1, 0]]).groups()
    steps = Steps(*(torch.as_tensor(x) for x in (values, actions, demonstrated, visits)))
    conditioned = pyro.condition(program, data={"reward": torch.as_tensor(rewards)})
    trace = pyro.poutine.trace(conditioned).get_trace(steps, groups)
    taken = np.log(softmax(RATIONALITY * values))[np.arange(4), actions]
    returns = visits @ rewards
    expected = normal(rewards, 0.5) + demonstrated @ taken - np.log1p(np.exp(returns[0] - returns[1]))
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("by_action", [False, True])
def test_log_joint_with_dynamics_is_the_sum_by_hand_under_both_libraries(by_action):
    mdp, rng = random_mdp()
    program = InverseRL(
        StateReward(3, 5, by_action=by_action, dynamics=mdp), prior=brm.priors.Gaussian(4.0), discount=DISCOUNT,
        rationality=RATIONALITY,
    )  # fmt: skip
    counts, visits = rng.integers(0, 4, size=(5, 3)).astype(float), rng.integers(0, 3, size=(2, 5, 3)).astype(float)
    groups = Trajectories.from_arrays([[0], [0]], [[0], [0]], preferences=[[1, 0]]).groups()
    flat = rng.normal(size=15 if by_action else 5)
    rewards = np.broadcast_to(flat.reshape(5, -1), (5, 3))
    returns = (visits * rewards).sum((1, 2))
    expected = normal(flat, 0.5) - np.log1p(np.exp(returns[0] - returns[1]))
    expected += (counts * np.log(softmax(RATIONALITY * value_iteration(mdp, rewards)))).sum()
    conditioned = pyro.condition(program.with_dynamics, data={"reward": torch.as_tensor(flat)})
    trace = pyro.poutine.trace(conditioned).get_trace(torch.as_tensor(counts), torch.as_tensor(visits), groups)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-9)
    jax = pytest.importorskip("jax")
    from numpyro.infer.util import log_density

    with jax.enable_x64(True):
        arrays = (jax.numpy.asarray(counts), jax.numpy.asarray(visits))
        found, _ = log_density(program.with_dynamics, (*arrays, groups), {}, {"reward": jax.numpy.asarray(flat)})
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_without_dynamics_the_program_says_so():
    with pytest.raises(ArgumentError, match="the dynamics are not known"):
        InverseRL(StateReward(3, 5)).with_dynamics(torch.zeros(5, 3), torch.zeros(0, 5, 3))


@pytest.mark.parametrize("settings", [{"discount": 1.5}, {"discount": float("nan")}, {"rationality": float("inf")}])
def test_settings_are_checked(settings):
    (name,) = settings
    with pytest.raises(ArgumentError, match=f"`{name}` is "):
        InverseRL(StateReward(2, 3), **settings)

"""Rewards of states: what fits them, and the networks behind."""

import numpy as np
import pytest
import torch

from bayesrm.data import Trajectories
from bayesrm.errors import ArgumentError, DataError
from bayesrm.programs.tabular_mdp import TabularMDP
from bayesrm.rewards import StateReward

CYCLE = TabularMDP(np.eye(3)[[[1, 0], [2, 1], [0, 2]]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actions": 1}, "`num_actions`"),
        ({"num_actions": 2, "num_states": 0}, "`num_states`"),
        ({"num_actions": 2, "hidden": (8, 0)}, "`hidden`"),
        ({"num_actions": 2, "num_states": 4, "dynamics": CYCLE}, "`dynamics` has 3 states and 2 actions"),
        ({"num_actions": 2, "dynamics": CYCLE}, "`num_states` is None"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArgumentError, match=message):
        StateReward(**settings)


def test_settings_are_compared_by_value():
    assert StateReward(2, 3, (8,)) == StateReward(2, 3, (8,))
    assert StateReward(2, 3, dynamics=CYCLE) != StateReward(2, 3)


def test_data_of_another_kind_are_refused():
    numbered = Trajectories.from_arrays([[0], [3]], [[0], [2]])
    features = Trajectories.from_arrays([[[0.5]]], [[0]])
    for reward, data, message in (
        (StateReward(2, 5), numbered, "trajectory 1 has action 2; `num_actions` is 2"),
        (StateReward(3, 3), numbered, "trajectory 1 has state 3; `num_states` is 3"),
        (StateReward(3), numbered, "are numbers, those of the StateReward are features"),
        (StateReward(3, 3), features, "are features, those of the StateReward are numbers"),
    ):
        with pytest.raises(DataError, match=message):
            reward.check(data)
    StateReward(3, 4).check(numbered)
    StateReward(3).check(features)


@pytest.mark.parametrize("by_action", [False, True])
def test_a_table_starts_at_the_prior_with_entries_of_its_own(by_action):
    reward = StateReward(2, 3, (), by_action)
    inputs, network = reward.inputs(np.arange(3)), reward.network(3)
    shape = (3, 2) if by_action else (3,)
    for part in network.rewards(inputs):
        assert part.shape == shape
        assert not part.any()
    assert not network.action_values(inputs).any()
    network.action_values(inputs)[1].sum().backward()
    (table,) = network.values.parameters()
    assert (table.grad != 0).any(0).tolist() == [False, True, False]


def test_features_are_standardised_and_constant_ones_left_alone():
    states = np.random.default_rng(0).normal(3.0, [2.0, 0.0], size=(50, 2))
    reward = StateReward(2, hidden=(4,))
    network = reward.network(2)
    inputs = reward.inputs(states)
    before = network.action_values(inputs[:1])
    network.standardise(inputs)
    seen = (inputs - network.center) / network.spread
    assert torch.allclose(seen.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert seen[:, 0].std(correction=0) == pytest.approx(1.0)
    assert network.spread[1] == 1.0
    assert not torch.equal(network.action_values(inputs[:1]), before)

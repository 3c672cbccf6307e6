"""Trajectories: what is refused, and parts that keep what belongs together."""

import numpy as np
import pytest

from bayesrm.data import Trajectories
from bayesrm.errors import ArgumentError, DataError


def make(**changes):
    arguments = {
        "states": [[0, 1, 2], [3], [0, 3]],
        "actions": [[1, 0, 1], [0], [1, 1]],
        "ended": [True, True, False],
        "demonstrated": [True, False, False],
        "preferences": [[0, 1], [2, 1]],
    }
    return Trajectories.from_arrays(**(arguments | changes))


def test_steps_know_their_trajectory_and_their_place():
    data = make()
    assert len(data) == 3
    assert data.owners.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.last.tolist() == [False, False, True, True, False, True]
    assert repr(data) == "<Trajectories: 3 trajectories of 1 to 3 steps, 6 steps in all, 4 states, 2 actions>"
    assert data.summary().splitlines()[1:] == ["  ended          2, cut 1", "  demonstrations 1", "  preferences    2"]


def test_one_flag_serves_all():
    data = make(ended=False, demonstrated=True, preferences=())
    assert not data.ended.any()
    assert data.demonstrated.all()
    assert data.preferences.shape == (0, 2)
    assert data.groups() == []


def test_preferences_become_rows_that_index_the_trajectories():
    (group,) = make().groups()
    assert group.label == "choice.2"
    assert group.items.tolist() == [[0, 1], [2, 1]]
    assert group.outcome.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"actions": [[1, 0], [0], [1, 1]]},
            r"trajectory 0 has states of shape \(3,\) and int64 actions of shape \(2,",
        ),
        ({"states": [[0, 1, 2], [], [0, 3]], "actions": [[1, 0, 1], [], [1, 1]]}, "trajectory 1 has states of shape"),
        ({"actions": [[1, 0, 1], [0], [0.5, 1]]}, "trajectory 2 .* actions are whole numbers"),
        ({"actions": [[1, 0, 1], [0], [1, -1]]}, "trajectory 2 has an action below 0"),
        ({"states": [[0, 1, 2], [-1], [0, 3]]}, "trajectory 1 has a state below 0"),
        ({"states": [[0.0, 1, 2], [1], [0, 3]]}, "`states` has shape"),
        ({"states": [[[0.0]] * 3, [[np.nan]], [[1.0]] * 2]}, "trajectory 1 has a feature that is not finite"),
        ({"states": [[[0.0]] * 3, [[0.0, 1.0]], [[1.0]] * 2]}, r"trajectory 1 has states of shape \(1, 2\)"),
        ({"ended": [True, True]}, r"`ended` has shape \(2,\); there are 3 trajectories"),
        ({"demonstrated": [True] * 4}, "`demonstrated` has shape"),
        ({"preferences": [[0, 3]]}, r"preference 0 is between trajectories \[0, 3\]"),
        ({"preferences": [[0, 1], [1, 1]]}, r"preference 1 is between trajectories \[1, 1\]"),
        ({"states": [], "actions": []}, "at least 1"),
    ],
)
def test_what_cannot_be_used_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_lengths_must_add_up():
    with pytest.raises(DataError, match="the lengths sum to 3 steps, with 2 states"):
        Trajectories(np.zeros(2, int), np.zeros(2, int), np.array([3]), np.array([True]), np.array([True]),
                     np.zeros((0, 2), int))  # fmt: skip


def test_select_renumbers_preferences():
    part = make().select([2, 1])
    assert part.states.tolist() == [0, 3, 3]
    assert part.lengths.tolist() == [2, 1]
    assert part.ended.tolist() == [False, True]
    assert part.preferences.tolist() == [[0, 1]]
    for wrong in ([], [0, 0], [3], [-1]):
        with pytest.raises(ArgumentError, match="`trajectories`"):
            make().select(wrong)


def test_split_shares_out_all_trajectories():
    data = Trajectories.from_arrays([[i] for i in range(10)], [[0]] * 10)
    train, test = data.split(0.3, seed=1)
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*train.states, *test.states]) == list(range(10))
    assert data.split(0.3, seed=1)[1].states.tolist() == test.states.tolist()
    with pytest.raises(ArgumentError, match="`test_fraction` is 1"):
        data.split(1.0, seed=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_numbered_states_are_whole_numbers_of_one_size(dtype):
    data = Trajectories.from_arrays([np.array([0, 1], dtype=dtype)], [[0, 1]])
    assert data.states.dtype == np.int64


def test_truth_values_are_neither_states_nor_names():
    with pytest.raises(DataError, match="the states are True and False"):
        Trajectories.from_arrays([[True, False]], [[0, 1]])
    with pytest.raises(ArgumentError, match="`trajectories` is True and False"):
        make().select([False, True, True])

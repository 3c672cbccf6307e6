"""Trajectories from files: what a row means, what is refused and by which words, and the way back to disk."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayesrm.data import Trajectories
from bayesrm.errors import ArgumentError, DataError

ROWS = [
    {"id": "a", "states": [0, 1, 2], "actions": [1, 1, 0], "preferred_to": ["b", "c", "b"], "group": "x"},
    {"id": "b", "states": [0], "actions": [1], "ended": False, "group": "x"},
    {"id": "c", "states": [2, 0], "actions": [0, 0], "demonstrated": True, "preferred_to": "b", "group": "y"},
    {"id": "d", "states": [1, 1], "actions": [0, 1], "group": "y"},
]


def fields(data):
    return [data.states.tolist(), data.actions.tolist(), data.lengths.tolist(), data.ended.tolist(),
            data.demonstrated.tolist(), data.preferences.tolist(), data.ids, data.group]  # fmt: skip


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_a_row_means():
    data = Trajectories.load(ROWS)
    assert data.states.tolist() == [0, 1, 2, 0, 2, 0, 1, 1]
    assert data.actions.tolist() == [1, 1, 0, 1, 0, 0, 0, 1]
    assert data.lengths.tolist() == [3, 1, 2, 2]
    assert data.ended.tolist() == [True, False, True, True]
    # What is in a preference is imitated only where its row says so.
    assert data.demonstrated.tolist() == [False, False, True, True]
    assert data.preferences.tolist() == [[0, 1], [0, 2], [0, 1], [2, 1]]
    assert data.ids == ("a", "b", "c", "d")
    assert {name: part.ids for name, part in data.candidates().items()} == {"x": ("a", "b"), "y": ("c", "d")}
    assert "rows read: 4, refused: 0" in data.summary()


def test_states_may_be_features():
    data = Trajectories.load([{"states": [[0, 1.5], [2, 3]], "actions": [0, 1]}])
    assert data.states.dtype == np.float64
    assert data.states.tolist() == [[0.0, 1.5], [2.0, 3.0]]
    assert data.ids == ("0",)
    assert data.group is None
    assert list(data.candidates()) == ["all"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d.csv"])
def test_files_of_each_kind_hold_the_same(name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".jsonl":
        jsonl(path, ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        import csv

        columns = ["id", "states", "actions", "ended", "demonstrated", "preferred_to", "group"]
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS)
    else:
        listed = [row | {"preferred_to": np.atleast_1d(row.get("preferred_to", [])).tolist()} for row in ROWS]
        pq.write_table(pa.Table.from_pylist(listed, schema=pa.schema({
            "id": pa.string(), "states": pa.list_(pa.int64()), "actions": pa.list_(pa.int64()), "ended": pa.bool_(),
            "demonstrated": pa.bool_(), "preferred_to": pa.list_(pa.string()), "group": pa.string(),
        })), path)  # fmt: skip
    assert fields(Trajectories.load(path)) == fields(Trajectories.load(ROWS))


def test_columns_are_renamed_and_unused_ones_told():
    rows = [{"obs": [0], "actions": [1], "colour": "red"}]
    data = Trajectories.load(rows, columns={"states": "obs"})
    assert data.states.tolist() == [0]
    assert "columns not used: colour" in data.summary()


@pytest.mark.parametrize("features", [False, True])
def test_written_and_read_again(features, tmp_path):
    states = [[[0.5, -1.0], [2.0, 1 / 3]], [[0.0, 0.25]]] if features else [[0, 3], [1]]
    data = Trajectories.from_arrays(
        states, [[1, 0], [2]], ended=[True, False], demonstrated=[True, True], preferences=[[1, 0], [1, 0]],
        ids=["p", "q"], group=["g", "g"],
    )  # fmt: skip
    data.to_parquet(tmp_path / "d.parquet")
    assert fields(Trajectories.load(tmp_path / "d.parquet")) == fields(data)
    plain = Trajectories.from_arrays(states, [[1, 0], [2]], preferences=[[1, 0]])
    plain.to_parquet(tmp_path / "d.parquet")
    again = Trajectories.load(tmp_path / "d.parquet")
    assert again.preferences.tolist() == [[1, 0]]
    assert again.ids == ("0", "1")
    assert [f.name for f in tmp_path.iterdir()] == ["d.parquet"]
    with pytest.raises(ArgumentError, match=r"must end in \.parquet"):
        data.to_parquet(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [0, 1, 2]}, "`states` has 3 entries and `actions` 2; .* leave out the state after the last"),
        ({"states": []}, "`states` is empty"),
        ({"states": [0, -1]}, "`states` has -1"),
        ({"states": [0, 1.5]}, r"`states` has 1\.5; a state is a whole number, or a list of numbers"),
        ({"states": [0.0, 1.0]}, r"`states` has 0\.0; a state is a whole number"),
        ({"states": [True, False]}, "`states` has True"),
        ({"states": [0, None]}, "`states` has None"),
        ({"states": [[0.0], [1.0, 2.0]]}, "`states` has states of different lengths"),
        ({"states": [[0.0], [float("nan")]]}, r"`states`\[1\] is \[nan\]; features are finite"),
        ({"states": [[0.0], [1.0]]}, "`states` holds features of width 1, row 0 numbers"),
        ({"states": 3}, "`states` is of type int; give a list"),
        ({"states": None}, "`states` is null"),
        ({"actions": [0, 1.0]}, r"`actions`\[1\] is 1\.0; actions are whole numbers from 0"),
        ({"actions": [0, -2]}, r"`actions`\[1\] is -2"),
        ({"ended": "perhaps"}, "`ended` is 'perhaps'; give true or false"),
        ({"demonstrated": 7}, "`demonstrated` is 7"),
        ({"id": "first"}, "`id` is 'first', which row 0 has too"),
        ({"id": 1.5}, r"`id` is 1\.5; give a name or a whole number"),
        ({"id": "s", "preferred_to": ["s"]}, "`preferred_to` names 's', the trajectory itself"),
        ({"preferred_to": ["nobody"]}, "`preferred_to` names 'nobody', which is the id of no row"),
        ({"preferred_to": [[1]]}, r"`preferred_to` is \[1\]; give a name"),
        ({"group": "g"}, "`group` has a name here and none in row 0"),
    ],
)
def test_a_bad_row_is_named_and_may_be_left_out(change, message, tmp_path):
    rows = [
        {"id": "first", "states": [0, 1], "actions": [0, 1]},
        {"states": [0, 1], "actions": [0, 1]} | change,
        {"id": "last", "states": [2], "actions": [0]},
    ]
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=rf"d\.jsonl, row 1: .*{message}"):
        Trajectories.load(path)
    data = Trajectories.load(path, on_bad_row="skip")
    assert data.refused[0][0] == 1
    assert data.lengths[-1] == 1
    assert not len(data.preferences)


def test_a_preference_over_a_row_that_is_left_out_goes_alone():
    rows = [
        {"id": "good", "states": [0], "actions": [1], "preferred_to": ["bad", "worse"]},
        {"id": "bad", "states": [], "actions": []},
        {"id": "worse", "states": [0], "actions": [0]},
    ]
    data = Trajectories.load(rows, on_bad_row="skip")
    assert data.ids == ("good", "worse")
    assert data.preferences.tolist() == [[0, 1]]
    assert [row for row, _ in data.refused] == [0, 1]
    assert "this preference alone is left out" in data.refused[0][1]
    only = Trajectories.load([rows[0] | {"preferred_to": ["bad"]}, rows[1]], on_bad_row="skip")
    # It was judged all the same: no example to imitate.
    assert not only.demonstrated.any()


def test_sources_without_trajectories():
    with pytest.raises(DataError, match=r"the columns \['chosen', 'rejected'\] hold no trajectories"):
        Trajectories.load([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="none of its 1 rows can be used; the first is row 0"):
        Trajectories.load([{"states": [], "actions": []}], on_bad_row="skip")
    with pytest.raises(ArgumentError, match="`on_bad_row` is 'ignore'"):
        Trajectories.load(ROWS, on_bad_row="ignore")


def test_names_must_fit():
    with pytest.raises(DataError, match="`ids` has 1 entries; there are 2"):
        Trajectories.from_arrays([[0], [1]], [[0], [0]], ids=["a"])
    with pytest.raises(DataError, match="`ids` names 'a' more than once"):
        Trajectories.from_arrays([[0], [1]], [[0], [0]], ids=["a", "a"])


def test_parts_keep_names_and_groups_stay_together():
    data = Trajectories.load(ROWS)
    part = data.select([3, 0])
    assert (part.ids, part.group) == (("d", "a"), ("y", "x"))
    train, test = data.split(0.5, seed=0)
    assert {*train.group} & {*test.group} == set()
    assert len(train) == len(test) == 2
    with pytest.raises(ArgumentError, match="of 1 groups"):
        data.select([0, 1]).split(0.5, seed=0)


def test_clusters_are_what_groups_and_preferences_join():
    data = Trajectories.from_arrays([[0]] * 6, [[0]] * 6, preferences=[[0, 3], [3, 4]])
    assert data.clusters[[0, 3, 4]].tolist() == [data.clusters[0]] * 3
    assert len(np.unique(data.clusters)) == 4
    grouped = Trajectories.from_arrays([[0]] * 6, [[0]] * 6, preferences=[[0, 3]], group=["a", "a", "b", "c", "b", "d"])
    assert [len(set(grouped.clusters[i].tolist())) for i in ([0, 1, 3], [2, 4], [0, 2, 5])] == [1, 1, 3]

"""Tables, groups, parts and the package's own file format."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bayesrm.data import Comparisons
from bayesrm.errors import ArgumentError, DataError


def mixed(seed=0):
    """Choices, rankings, ratings and approvals over shared items, with annotators, weights and margins."""
    rng = np.random.default_rng(seed)
    pairs, rankings, labels, ratings = [], [], [], []
    for prompt in range(12):
        responses = [f"answer {k} to {prompt}" for k in range(4)]
        for a, b in ((0, 1), (0, 2), (3, 1)):
            row = {"prompt": f"prompt {prompt}", "chosen": responses[a], "rejected": responses[b]}
            pairs.append(row | {"annotator": f"ann {rng.integers(3)}", "weight": float(a), "margin": b / 2})
        order = rng.permutation(4).tolist()[: 2 + prompt % 3]
        rankings.append({"prompt": f"prompt {prompt}", "responses": responses, "ranking": order})
        labels.append({"prompt": f"prompt {prompt}", "response": responses[0], "label": prompt % 2})
        ratings.append({"prompt": f"prompt {prompt}", "response": responses[1], "rating": 1 + prompt % 5})
    return Comparisons.concatenate([Comparisons.load(rows) for rows in (pairs, rankings, labels, ratings)])


def content(data):
    """Everything that a row says, with items spelled out, so that numbering does not matter."""
    found = []
    for row in data.rows:
        items = [data.text(item) for item in row["candidates"]]
        found.append((row | {"candidates": None}, items))
    return found


def test_an_item_in_many_rows_is_stored_once():
    responses = ["a", "b", "c", "d"]
    rows = [{"prompt": "p", "responses": responses, "scores": [1, 2, 3, 4]}]
    data = Comparisons.load(rows)
    assert (len(data), data.num_items, data.num_prompts) == (6, 4, 1)
    assert "responses named: 12, repeats of an item merged: 8" in data.summary()


def test_the_same_response_to_two_prompts_is_two_items():
    data = Comparisons.from_pairs(["p", "q"], ["a", "a"], ["b", "b"])
    assert data.num_items == 4
    assert data.prompt_of_item.tolist() == [0, 0, 1, 1]
    assert data.prompt_of_row.tolist() == [0, 1]


def test_a_conversation_is_not_the_text_that_encodes_it():
    messages = [{"content": "a", "role": "assistant"}]
    rows = [{"prompt": [{"role": "user", "content": "p"}], "chosen": messages, "rejected": "other"}]
    data = Comparisons.load(rows)
    encoded = data.items[0]["response"]
    again = Comparisons.concatenate([data, Comparisons.from_pairs([data.prompts[0]["prompt"]], [encoded], ["other"])])
    assert again.num_prompts == 2
    assert again.num_items == 4
    assert again.text(2) == (data.prompts[0]["prompt"], encoded)


def test_groups_are_ordered_and_never_padded():
    data = mixed()
    groups = data.groups()
    assert [g.label for g in groups] == [
        "choice.2", "ranking.4.2", "ranking.4.3", "ranking.4.4", "rating.1", "approval.1",
    ]  # fmt: skip
    assert sorted(np.concatenate([g.rows for g in groups]).tolist()) == list(range(len(data)))
    for group in groups:
        comparison = group.comparison
        assert group.items.shape == (comparison.num_rows, comparison.num_candidates)
        assert group.items.min() >= 0
        assert group.items.dtype == group.outcome.dtype == group.rows.dtype == torch.int64
        assert group.weight.dtype == torch.float64
        assert comparison.lengths.shape == group.items.shape
        assert comparison.num_annotators == 3
        assert (group.rows.diff() > 0).all()
    choice, rating = groups[0], groups[4]
    assert choice.comparison.margin.dtype == torch.float64
    assert (choice.weight == 0).sum() == 24, "rows of weight 0 stay"
    assert rating.comparison.num_levels == 5
    assert (rating.comparison.annotator == -1).all()
    assert all(g.comparison.num_levels is None for g in groups if g is not rating)


def test_without_annotators_there_is_no_annotator():
    (group,) = Comparisons.from_pairs(["p"], ["a"], ["b"]).groups()
    assert group.comparison.annotator is None
    assert group.comparison.num_annotators == 0


def test_select_compacts_and_keeps_what_rows_say():
    data = mixed().with_features(np.arange(48.0 * 3).reshape(48, 3))
    chosen = [40, 3, 3, 59]
    part = data.select(chosen)
    assert content(part) == [content(data)[row] for row in chosen]
    used = {item for row in chosen for item in data.rows[row]["candidates"]}
    assert part.num_items == len(used)
    assert part.num_prompts == len({int(data.prompt_of_item[item]) for item in used})
    by_text = {data.text(item): data.features[item].tolist() for item in used}
    assert {part.text(item): part.features[item].tolist() for item in range(part.num_items)} == by_text
    assert part.summary().splitlines()[1].startswith("source: part of ")
    mask = np.zeros(len(data), bool)
    mask[[3, 40]] = True
    assert content(data.select(mask)) == content(data.select([3, 40]))
    assert content(part.select([2, 0])) == content(data.select([3, 40]))


def test_select_keeps_annotator_codes():
    data = Comparisons.from_pairs(["p", "q", "r"], ["a"] * 3, ["b"] * 3, annotator=["x", "y", "z"])
    part = data.select([2])
    assert part.annotators == ("x", "y", "z")
    assert part.groups()[0].comparison.annotator.tolist() == [2]


@pytest.mark.parametrize("rows", [[], [-1], [72], [0.5], np.ones(3, bool), [[0]]])
def test_select_refuses(rows):
    with pytest.raises(ArgumentError, match="`row_indices`"):
        mixed().select(rows)


def test_split_by_prompt_shares_no_prompt_and_loses_no_row():
    data = mixed()
    train, test = data.split_by_prompt(0.25, seed=3)
    prompts = [{part.text(item)[0] for item in range(part.num_items)} for part in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 3
    key = repr
    assert sorted(map(key, content(train) + content(test))) == sorted(map(key, content(data)))
    again = data.split_by_prompt(0.25, seed=3)[1]
    assert content(again) == content(test)
    assert any(content(data.split_by_prompt(0.25, seed=s)[1]) != content(test) for s in range(4, 7))


def test_split_by_prompt_refuses():
    with pytest.raises(ArgumentError, match=r"`test_fraction` is 1.0; give a number between 0 and 1"):
        mixed().split_by_prompt(1.0, seed=0)
    with pytest.raises(DataError, match="all rows share one prompt"):
        Comparisons.from_pairs(["p"] * 3, ["a"] * 3, ["b"] * 3).split_by_prompt(0.5, seed=0)
    train, test = Comparisons.from_pairs(["p", "q"], ["a"] * 2, ["b"] * 2).split_by_prompt(0.01, seed=0)
    assert (len(train), len(test)) == (1, 1)


def test_with_outcomes_replaces_and_checks():
    data = mixed()
    groups = data.groups()
    flipped = [g.outcome.flip(0) for g in groups]
    changed = data.with_outcomes(flipped)
    for group, wanted in zip(changed.groups(), flipped, strict=True):
        assert torch.equal(group.outcome, wanted)
    assert [torch.equal(g.outcome, h.outcome) for g, h in zip(groups, data.groups(), strict=True)] == [True] * 6
    with pytest.raises(ArgumentError, match="`outcomes` has 1 entries; give one for each of the 6 groups"):
        data.with_outcomes(flipped[:1])
    with pytest.raises(ArgumentError, match=r"`outcomes`\[1\] has shape"):
        data.with_outcomes([flipped[0], flipped[0], *flipped[2:]])
    with pytest.raises(ArgumentError, match=r"`outcomes`\[0\] has shape .* and type float64"):
        data.with_outcomes([flipped[0].double(), *flipped[1:]])
    flipped[0][4] = 3
    with pytest.raises(DataError, match=r"row 4: the outcome of the choice is 3; accepted are 0 to 1 .*, 2 for a tie"):
        data.with_outcomes(flipped)


def test_concatenate_merges_equal_items():
    data = mixed()
    assert (data.num_items, data.num_prompts) == (48, 12)
    assert data.kinds == ("choice", "ranking", "rating", "approval")
    first = data.select(range(10)).with_features(np.ones((data.select(range(10)).num_items, 2)))
    both = Comparisons.concatenate([first, first])
    assert both.num_items == first.num_items
    assert content(both) == content(first) * 2
    other = first.with_features(2 * first.features)
    with pytest.raises(DataError, match="item 0 of part 1 has other features"):
        Comparisons.concatenate([first, other])
    with pytest.raises(ArgumentError, match="`parts` have features of widths"):
        Comparisons.concatenate([first, data])
    with pytest.raises(ArgumentError, match="`parts` is empty"):
        Comparisons.concatenate([])


def test_concatenate_pools_annotators_by_name():
    parts = [
        Comparisons.from_pairs(["p"] * 2, ["a"] * 2, ["b"] * 2, annotator=names) for names in (["z", None], ["a", "z"])
    ]
    both = Comparisons.concatenate([*parts, Comparisons.from_pairs(["p"], ["a"], ["b"])])
    assert both.annotators == ("a", "z")
    assert both.groups()[0].comparison.annotator.tolist() == [1, -1, 0, 1, -1]


def test_concatenate_refuses_two_rating_scales():
    scales = [Comparisons.load([{"prompt": "p", "response": "r", "rating": 1}], levels=(1, top)) for top in (5, 7)]
    with pytest.raises(DataError, match=r"ratings of \[5, 7\] levels"):
        Comparisons.concatenate(scales)


@pytest.mark.parametrize("features", [None, np.float32, np.float64])
def test_parquet_round_trip(tmp_path, features):
    data = mixed()
    if features is not None:
        data = data.with_features(np.random.default_rng(0).normal(size=(48, 5)).astype(features))
    path = tmp_path / "own.parquet"
    data.to_parquet(path)
    again = Comparisons.load(path)
    assert content(again) == content(data)
    assert again.items.to_dict() == data.items.to_dict()
    assert again.prompts.to_dict() == data.prompts.to_dict()
    assert again.annotators == data.annotators
    if features is None:
        assert again.features is None
    else:
        assert again.features.dtype == features
        np.testing.assert_array_equal(again.features, data.features)
    mapped = Comparisons.load(path, in_memory_limit=100, cache_dir=tmp_path / "cache")
    assert content(mapped) == content(data)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_parquet_round_trip_of_a_part_and_of_arrays(tmp_path):
    part = mixed().split_by_prompt(0.5, seed=0)[0]
    part.to_parquet(tmp_path / "part.parquet")
    assert content(Comparisons.load(tmp_path / "part.parquet")) == content(part)
    arrays = Comparisons.from_arrays(np.eye(4), candidates=[[0, 1], [3, 2]], outcome=[0, 1], ids=list("abcd"))
    arrays.to_parquet(tmp_path / "arrays.parquet")
    again = Comparisons.load(tmp_path / "arrays.parquet")
    assert again.ids == ("a", "b", "c", "d")
    assert again.words is None
    assert again.num_items == 4
    assert again.prompt_of_item.tolist() == arrays.prompt_of_item.tolist()
    np.testing.assert_array_equal(again.features, np.eye(4))


def test_parquet_of_ours_that_is_damaged(tmp_path):
    path = tmp_path / "own.parquet"
    mixed().to_parquet(path)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 5), path, row_group_size=12)
    with pytest.raises(DataError, match=r"own\.parquet: it (holds|cannot)"):
        Comparisons.load(path)
    newer = table.replace_schema_metadata({b"bayesrm.comparisons": b'{"version": 99}'})
    pq.write_table(newer, path)
    with pytest.raises(DataError, match="it has version 99 of the format"):
        Comparisons.load(path)
    with pytest.raises(ArgumentError, match=r"must end in \.parquet"):
        mixed().to_parquet(tmp_path / "own.arrow")


def test_parquet_of_ours_with_an_impossible_outcome(tmp_path):
    path = tmp_path / "own.parquet"
    Comparisons.from_pairs(["p", "q"], ["a", "a"], ["b", "b"]).to_parquet(path)
    table = pq.read_table(path).to_pylist()
    schema = pq.read_schema(path)
    table[-1]["outcome"] = [7]
    with pq.ParquetWriter(path, schema) as writer:
        for kind in ("prompt", "item", "row"):
            writer.write_table(pa.Table.from_pylist([row for row in table if row["table"] == kind], schema))
    with pytest.raises(DataError, match="row 1: the outcome of the choice is 7"):
        Comparisons.load(path)


def test_describe_row():
    data = mixed()
    assert data.describe_row(0).startswith(
        "choice on 'prompt 0': 'answer 0 to 0' chosen among 'answer 0 to 0' | 'answer 1"
    )
    assert "weight 0, margin 0.5" in data.describe_row(0)
    assert "> the rest (" in data.describe_row(36)
    assert "approved 'answer 0 to 1'" in data.describe_row(49)
    assert data.describe_row(60) == "rating on 'prompt 0': level 0 of 0..4 for 'answer 1 to 0'"
    with pytest.raises(ArgumentError, match="`row` is 72; accepted are 0 to 71"):
        data.describe_row(72)
    with pytest.raises(ArgumentError, match="`item` is -1"):
        data.text(-1)


def test_repr_is_short_and_print_gives_the_summary():
    data = mixed()
    assert repr(data) == "Comparisons(72 rows, 48 items, 12 prompts, kinds choice, ranking, rating, approval)"
    assert "choice of 2: 36 rows, 0 ties" in str(data)
    assert "ranking of 4: 4 rows, 3 places ranked" in str(data)
    assert "rating: 12 rows, 5 levels" in str(data)
    assert "approval: 12 rows, 6 approved" in str(data)
    assert "masked by weight 0: 24 rows" in str(data)
    assert "annotators: 3, 36 rows name none" in str(data)


def test_from_pairs_checks_lengths():
    with pytest.raises(ArgumentError, match=r"the lists differ in length: {'prompt': 1, 'chosen': 2, 'rejected': 1}"):
        Comparisons.from_pairs(["p"], ["a", "b"], ["c"])


def test_pickle_keeps_everything():
    data = mixed()
    assert content(pickle.loads(pickle.dumps(data))) == content(data)


def test_import_is_light():
    code = "import sys, bayesrm.data; print(sorted({'datasets', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

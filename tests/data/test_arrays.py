"""Comparisons of items that are known by their features alone."""

import numpy as np
import pytest
import torch

from bayesrm.data import Comparisons
from bayesrm.errors import ArgumentError, DataError

FEATURES = np.arange(12.0).reshape(6, 2)
PAIRS = [[0, 1], [2, 3], [4, 3]]


def make(**changes):
    return Comparisons.from_arrays(**{"features": FEATURES, "candidates": PAIRS, "outcome": [0, 1, 2]} | changes)


def test_choices():
    data = make(annotator=["b", None, "a"], weight=[0, 1, 2], margin=[0.5, np.nan, 1], words=[1, 2, 3, 4, 5, 6])
    (group,) = data.groups()
    assert group.label == "choice.2"
    assert group.items.tolist() == PAIRS
    assert group.outcome.tolist() == [0, 1, 2]
    assert group.weight.tolist() == [0, 1, 2]
    assert group.comparison.annotator.tolist() == [1, -1, 0]
    assert group.comparison.margin.tolist() == [0.5, 0.0, 1.0]
    assert group.comparison.lengths.tolist() == [[1, 2], [3, 4], [5, 4]]
    assert data.text(0) == ("", "")
    np.testing.assert_array_equal(data.features, FEATURES)
    assert make().groups()[0].comparison.lengths is None


def test_connected_items_share_a_prompt():
    data = make()
    prompts = data.prompt_of_item
    assert prompts[0] == prompts[1]
    assert prompts[2] == prompts[3] == prompts[4]
    assert len(set(prompts.tolist())) == data.num_prompts == 3
    train, test = data.split_by_prompt(0.5, seed=0)
    assert {len(train), len(test)} == {1, 2}
    np.testing.assert_array_equal(train.select([0]).features, FEATURES[PAIRS[0] if len(train) == 1 else [2, 3]])


def test_prompts_given():
    assert make(prompt_index=[0, 0, 1, 1, 1, 2]).num_prompts == 3
    with pytest.raises(DataError, match=r"row 2: its candidates answer the prompts \[1, 2\]"):
        make(prompt_index=[0, 0, 1, 1, 2, 2])
    with pytest.raises(ArgumentError, match=r"`prompt_index` has shape \(2,\)"):
        make(prompt_index=[0, 1])


def test_torch_and_integer_features():
    data = make(
        features=torch.arange(12).reshape(6, 2), candidates=torch.tensor(PAIRS), outcome=torch.tensor([0, 1, 2])
    )
    np.testing.assert_array_equal(data.features, FEATURES)
    assert make(features=FEATURES.astype(np.float32)).features.dtype == np.float32


@pytest.mark.parametrize("kind", ["rating", "approval"])
def test_single_items_default_to_all_in_turn(kind):
    data = Comparisons.from_arrays(FEATURES, outcome=[0, 1, 1, 0, 1, 0], kind=kind)
    (group,) = data.groups()
    assert group.items[:, 0].tolist() == list(range(6))
    assert group.comparison.num_levels == (2 if kind == "rating" else None)
    assert data.num_prompts == 6


def test_ratings_with_levels_that_nobody_used():
    (group,) = Comparisons.from_arrays(FEATURES, outcome=[0, 1, 1, 0, 1, 0], kind="rating", num_levels=7).groups()
    assert group.comparison.num_levels == 7


def test_rankings():
    (group,) = make(candidates=[[0, 1, 2], [3, 4, 5]], outcome=[[2, 0], [0, 1]], kind="ranking").groups()
    assert group.label == "ranking.3.2"
    assert group.outcome.tolist() == [[2, 0], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"features": FEATURES[0]}, ArgumentError, r"`features` has shape \(2,\); give a non-empty matrix"),
        ({"features": FEATURES.astype(str)}, ArgumentError, "`features` has type"),
        ({"features": [[1.0], [1.0, 2.0]]}, ArgumentError, "`features` cannot be made an array"),
        ({"kind": "duel"}, ArgumentError, "`kind` is 'duel'; accepted are 'choice', 'ranking'"),
        ({"candidates": None}, ArgumentError, "`candidates` is missing; a choice needs"),
        ({"candidates": [0, 1, 2]}, ArgumentError, r"`candidates` has shape \(3,\)"),
        ({"candidates": [[0.5, 1]] * 3}, ArgumentError, "`candidates` has type float64 or entries"),
        (
            {"candidates": [[0, 1], [2, 6], [4, 3]]},
            DataError,
            r"row 1: its candidates are \[2, 6\]; accepted are items 0",
        ),
        ({"candidates": [[0, 1], [2, 3], [-1, 3]]}, DataError, "row 2: its candidates"),
        ({"candidates": [[0, 1], [2, 2], [4, 3]]}, DataError, "row 1: .* name an item twice"),
        ({"outcome": [0, 1]}, ArgumentError, r"`outcome` has shape \(2,\); 3 rows need shape \(3,\)"),
        ({"outcome": [0, 1, 3]}, DataError, "row 2: the outcome of the choice is 3"),
        ({"outcome": [0, -1, 1]}, DataError, "row 1: the outcome of the choice is -1"),
        ({"outcome": [[0, 0], [0, 1], [1, 0]], "kind": "ranking"}, DataError, r"row 0: the outcome .* is \[0, 0\]"),
        ({"outcome": [0, 1, 1], "kind": "ranking"}, ArgumentError, "3 rankings of 2 need shape"),
        ({"weight": [1, -1, 1]}, DataError, "row 1: `weight` is -1.0"),
        ({"weight": [1, 1, np.nan]}, DataError, "row 2: `weight` is nan"),
        ({"weight": [1]}, ArgumentError, r"`weight` has shape \(1,\)"),
        ({"margin": [1, np.inf, 1]}, DataError, "row 1: `margin` is infinite"),
        ({"annotator": ["a"]}, ArgumentError, "`annotator` has 1 entries"),
        ({"words": [1, 2]}, ArgumentError, r"`words` has shape \(2,\)"),
        ({"ids": ["a"]}, ArgumentError, "`ids` has 1 entries"),
        ({"num_levels": 3}, ArgumentError, "`num_levels` is 3 for a choice"),
    ],
)
def test_what_cannot_be_used(changes, error, reason):
    with pytest.raises(error, match=reason):
        make(**changes)


def test_single_items_and_larger_sets_have_no_margin():
    with pytest.raises(ArgumentError, match="`margin` is given for a rating of 1"):
        Comparisons.from_arrays(FEATURES, outcome=[0, 1] * 3, kind="rating", margin=[1.0] * 6)
    with pytest.raises(ArgumentError, match="`margin` is given for a choice of 3"):
        make(candidates=[[0, 1, 2]], outcome=[0], margin=[1.0])
    with pytest.raises(ArgumentError, match=r"`num_levels` is 1; a rating needs at least 2"):
        Comparisons.from_arrays(FEATURES, outcome=[0] * 6, kind="rating", num_levels=1)
    with pytest.raises(DataError, match=r"row 1: the outcome of the rating is 4; accepted are levels from 0 to 2"):
        Comparisons.from_arrays(FEATURES, outcome=[0, 4, 0, 0, 0, 0], kind="rating", num_levels=3)


def test_features_must_be_finite_and_one_an_item():
    broken = FEATURES.copy()
    broken[3, 1] = np.nan
    broken[5, 0] = np.inf
    with pytest.raises(DataError, match=r"item 3 has the feature nan in column 1; .* 2 items have"):
        make(features=broken)
    with pytest.raises(
        ArgumentError, match=r"`features` has shape \(5, 2\); give a non-empty matrix of shape \(6, D\)"
    ):
        make().with_features(FEATURES[:5])

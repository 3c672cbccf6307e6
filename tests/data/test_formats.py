"""Every format reads to the encoding that `FeedbackGroup` promises."""

import datasets
import numpy as np
import pytest

from bayesrm.data import Comparisons
from bayesrm.errors import ArgumentError, DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def only_group(data):
    (group,) = data.groups()
    return group


def texts(data, row):
    """The texts of a row's candidates, looked up through the tables."""
    rows = data.rows[row]
    return [data.text(item)[1] for item in rows["candidates"]]


def test_explicit_pairs():
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 0.5, "annotator": "ann", "weight": 2},
        {"prompt": "p", "chosen": "good", "rejected": "so so", "tie": True, "annotator": 7},
        {"prompt": "q", "chosen": "yes", "rejected": "no", "tie": False},
    ]
    data = Comparisons.load(rows)
    group = only_group(data)
    assert group.label == "choice.2"
    assert group.outcome.tolist() == [0, 2, 0]
    assert group.items.tolist() == [[0, 1], [0, 2], [3, 4]]
    assert group.weight.tolist() == [2.0, 1.0, 1.0]
    assert group.comparison.margin.tolist() == [0.5, 0.0, 0.0]
    assert data.annotators == ("7", "ann")
    assert group.comparison.annotator.tolist() == [1, 0, -1]
    assert texts(data, 1) == ["good", "so so"]


def test_implicit_string_prompt_is_cut_at_a_white_space():
    start = "\n\nHuman: Who wrote it?\n\nAssistant:"
    data = Comparisons.load([{"chosen": start + " Homer did.", "rejected": start + " However, no."}])
    assert data.text(0) == (start, " Homer did.")
    assert data.text(1) == (start, " However, no.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Yes", "Yes, sure", ""),
        ("Q: a Yes", "Q: a Yes sure", "Q: a"),
        ("one", "two", ""),
        ("same start one", "same start two", "same start"),
    ],
)
def test_implicit_string_prompt_keeps_every_character(chosen, rejected, prompt):
    data = Comparisons.load([{"chosen": chosen, "rejected": rejected}])
    found = [data.text(item) for item in (0, 1)]
    assert {prefix for prefix, _ in found} == {prompt}
    assert [prefix + rest for prefix, rest in found] == [chosen, rejected]


def test_implicit_conversational_prompt_is_the_common_messages():
    start = [{"role": "system", "content": "Be kind."}, user("Hi")]
    data = Comparisons.load([{"chosen": [*start, assistant("Hello!")], "rejected": [*start, assistant("What?")]}])
    assert data.text(0) == (start, [assistant("Hello!")])
    assert data.text(1) == (start, [assistant("What?")])


def test_implicit_prompt_leaves_each_side_a_message():
    short = [user("Hi"), assistant("Hello!")]
    data = Comparisons.load([{"chosen": [*short, user("Bye"), assistant("Bye!")], "rejected": short}])
    assert data.text(1) == ([user("Hi")], [assistant("Hello!")])
    assert len(data.text(0)[1]) == 3


def test_explicit_conversational_pairs():
    data = Comparisons.load([{"prompt": [user("Hi")], "chosen": [assistant("A b")], "rejected": [assistant("C")]}])
    assert data.text(0) == ([user("Hi")], [assistant("A b")])
    assert data.words.tolist() == [2, 1]
    assert data.items[0]["is_messages"]


def test_string_prompt_of_whole_conversations():
    row = {"prompt": "Hi", "chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    assert Comparisons.load([row]).text(0) == ([user("Hi")], [assistant("A")])
    row = {"prompt": "Hi", "chosen": [assistant("A")], "rejected": [assistant("B")]}
    assert Comparisons.load([row]).text(0) == ([user("Hi")], [assistant("A")])


def test_string_completions_of_messages_become_assistant_messages():
    data = Comparisons.load([{"prompt": [user("Hi")], "chosen": "A", "rejected": "B"}])
    assert data.text(1) == ([user("Hi")], [assistant("B")])


def test_messages_that_differ_by_null_entries_are_equal():
    rows = [
        {"prompt": [user("Hi") | {"name": None}], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": [user("Hi")], "chosen": [{"content": "A", "role": "assistant"}], "rejected": [assistant("C")]},
    ]
    data = Comparisons.load(rows)
    assert (data.num_prompts, data.num_items) == (1, 3)


@pytest.mark.parametrize(
    ("winner", "outcome"),
    [
        ("a", 0),
        ("model_b", 1),
        ("A", 0),
        ("B", 1),
        ("tie", 2),
        ("tie (bothbad)", 2),
        (0, 0),
        (1, 1),
        ("1", 1),
        ("Tie", 2),
    ],
)
def test_verdicts(winner, outcome):
    data = Comparisons.load([{"prompt": "p", "response_a": "x", "response_b": "y", "winner": winner}])
    assert only_group(data).outcome.tolist() == [outcome]
    assert texts(data, 0) == ["x", "y"]


def test_verdict_on_whole_conversations():
    row = {
        "conversation_a": [user("Hi"), assistant("A")],
        "conversation_b": [user("Hi"), assistant("B")],
        "winner": "b",
    }
    renamed = {"response_a": "conversation_a", "response_b": "conversation_b"}
    data = Comparisons.load([row], columns=renamed)
    assert data.text(1) == ([user("Hi")], [assistant("B")])


def test_choice_among_many():
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "choice": 2},
        {"prompt": "p", "responses": ["a", "b", "d"], "choice": "tie"},
        {"prompt": "p", "responses": ["a", "b"], "choice": 1, "margin": -1},
    ]
    pair, triple = Comparisons.load(rows).groups()
    assert (pair.label, triple.label) == ("choice.2", "choice.3")
    assert triple.outcome.tolist() == [2, 3]
    assert triple.rows.tolist() == [0, 1]
    assert pair.comparison.margin.tolist() == [-1.0]
    assert triple.comparison.margin is None


def test_rankings_full_and_partial_are_separate_groups():
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]},
        {"prompt": "q", "responses": ["a", "b", "c"], "ranking": [1]},
        {"prompt": "r", "responses": ["a", "b", "c"], "ranking": [0, 2, 1]},
    ]
    top, full = Comparisons.load(rows).groups()
    assert (top.label, full.label) == ("ranking.3.1", "ranking.3.3")
    assert full.outcome.tolist() == [[2, 0, 1], [0, 2, 1]]
    assert top.outcome.tolist() == [[1]]


@pytest.mark.parametrize("label", [True, 1, "true", "1"])
@pytest.mark.parametrize("name", ["completion", "response"])
def test_unpaired_labels(label, name):
    group = only_group(
        Comparisons.load([{"prompt": "p", name: "a", "label": label}, {"prompt": "p", name: "b", "label": 0}])
    )
    assert group.label == "approval.1"
    assert group.items.tolist() == [[0], [1]]
    assert group.outcome.tolist() == [1, 0]


SCORED = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [3, 5, 3], "weight": 0.5}


def test_scores_become_all_pairs_with_ties_by_default():
    data = Comparisons.load([SCORED])
    group = only_group(data)
    assert group.items.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert group.outcome.tolist() == [1, 2, 0]
    assert group.weight.tolist() == [0.5] * 3
    assert data.num_items == 3


def test_scores_become_rankings():
    data = Comparisons.load([SCORED | {"scores": [3, 5, 4]}], kind="ranking")
    assert only_group(data).outcome.tolist() == [[1, 2, 0]]


def test_scores_with_ties_make_no_ranking():
    with pytest.raises(DataError, match=r'row 0: the scores .* ties.*kind="choice"'):
        Comparisons.load([SCORED], kind="ranking")


def test_scores_become_ratings():
    group = only_group(Comparisons.load([SCORED], kind="rating"))
    assert group.outcome.tolist() == [0, 2, 0]
    assert group.comparison.num_levels == 3
    group = only_group(Comparisons.load([SCORED], kind="rating", levels=(1, 5)))
    assert group.outcome.tolist() == [2, 4, 2]
    assert group.comparison.num_levels == 5


@pytest.mark.parametrize("name", ["overall_score", "score", "rating"])
def test_scored_completions(name):
    row = {
        "instruction": "p",
        "completions": [{"response": "a", name: 7.5}, {"response": "b", name: 8.0, "model": "m"}],
    }
    data = Comparisons.load([row])
    assert only_group(data).outcome.tolist() == [1]
    assert data.text(1) == ("p", "b")


def test_ratings():
    rows = [{"prompt": "p", "response": r, "rating": v} for r, v in (("a", 5), ("b", 1.0), ("c", "3"))]
    group = only_group(Comparisons.load(rows))
    assert group.outcome.tolist() == [4, 0, 2]
    assert group.comparison.num_levels == 5


def test_kind_settles_an_ambiguity():
    rows = [
        {"prompt": "p", "response": "a", "label": 1, "rating": 2},
        {"prompt": "p", "response": "b", "label": 0, "rating": 1},
    ]
    with pytest.raises(DataError, match=r"more than one format: unpaired labels .*; ratings .*`kind`"):
        Comparisons.load(rows)
    assert Comparisons.load(rows, kind="approval").kinds == ("approval",)
    assert Comparisons.load(rows, kind="rating").kinds == ("rating",)


def test_unknown_columns_list_what_is_accepted():
    with pytest.raises(DataError, match=r"\['answer', 'question'\] fit no format.*preference pairs.*ratings.*Rename"):
        Comparisons.load([{"question": "p", "answer": "a"}])


def test_kind_that_the_format_does_not_serve():
    with pytest.raises(ArgumentError, match=r"`kind` is 'rating', but list \(preference pairs\) can be read as choice"):
        Comparisons.load([{"prompt": "p", "chosen": "a", "rejected": "b"}], kind="rating")
    with pytest.raises(ArgumentError, match="`kind` is 'stars'; accepted are 'choice'"):
        Comparisons.load([SCORED], kind="stars")


def test_levels_need_ratings_and_an_order():
    with pytest.raises(ArgumentError, match="`levels` is given, but list is read as choice"):
        Comparisons.load([SCORED], levels=(1, 5))
    with pytest.raises(ArgumentError, match=r"`levels` is \(5, 1\)"):
        Comparisons.load([SCORED], kind="rating", levels=(5, 1))


def test_columns_rename_and_say_what_is_missing():
    rows = [{"q": "p", "good": "a", "bad": "b", "rater": "r", "prompt": 3}]
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data = Comparisons.load(rows, columns=names, annotator_column="rater")
    assert data.text(0) == ("p", "a")
    assert data.annotators == ("r",)
    with pytest.raises(DataError, match=r"maps 'chosen' to the column 'better', which does not exist; found"):
        Comparisons.load(rows, columns=names | {"chosen": "better"})


def test_unused_columns_are_reported():
    data = Comparisons.load([{"prompt": "p", "chosen": "a", "rejected": "b", "source": "x", "lang": "en"}])
    assert "columns not used: lang, source" in data.summary()


def test_hugging_face_datasets_and_splits():
    rows = [{"prompt": [user("Hi")], "chosen": [assistant("A")], "rejected": [assistant(str(i))]} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    assert Comparisons.load(table).text(0) == ([user("Hi")], [assistant("A")])
    both = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert len(Comparisons.load(both, split="test")) == 1
    assert len(Comparisons.load(datasets.DatasetDict({"train": table}))) == 3
    with pytest.raises(DataError, match=r"no split is named; pass `split`, one of 'train', 'test'"):
        Comparisons.load(both)
    with pytest.raises(DataError, match="there is no split 'dev'"):
        Comparisons.load(both, split="dev")


def test_dataset_with_an_indices_mapping_is_read_in_its_order():
    table = datasets.Dataset.from_list([{"prompt": "p", "chosen": f"c{i}", "rejected": "r"} for i in range(5)])
    data = Comparisons.load(table.select([4, 2]))
    assert texts(data, 0) == ["c4", "r"]
    assert texts(data, 1) == ["c2", "r"]


def test_words_count_unicode_white_space():
    data = Comparisons.load([{"prompt": "p", "chosen": " one\u2003two\nthree ", "rejected": "one"}])
    assert data.words.tolist() == [3, 1]
    assert only_group(data).comparison.lengths.tolist() == [[3, 1]]
    assert data.words.dtype == np.int32

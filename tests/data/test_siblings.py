"""Demonstrations, corrections and conversations."""

import json

import pytest

from bayesrm.data import Conversations, Corrections, Demonstrations
from bayesrm.errors import ArgumentError, DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(*texts):
    return [(user, assistant)[place % 2](text) for place, text in enumerate(texts)]


DEMONSTRATION = {"prompt": "p", "completion": "c"}
CORRECTION = {"prompt": "p", "response": "r", "corrected": "c"}
CONVERSATION = {"conversations": [talk("Hi", "A", "more", "B"), talk("Hi", "C"), talk("Hi", "D")], "choice": 1}
CLASSES = [(Demonstrations, DEMONSTRATION), (Corrections, CORRECTION), (Conversations, CONVERSATION)]


def test_demonstrations():
    rows = [
        DEMONSTRATION | {"annotator": "x", "weight": 0},
        {"prompt": [user("Hi")], "response": [assistant("Hello")]},
        DEMONSTRATION,
    ]
    data = Demonstrations.load(rows)
    assert (len(data), data.num_prompts) == (3, 2)
    assert [data.text(row) for row in (0, 2)] == [("p", "c")] * 2
    assert data.text(1) == ([user("Hi")], [assistant("Hello")])
    assert data.annotators == ("x",)
    assert data.annotator.tolist() == [0, -1, -1]
    assert data.weight.tolist() == [0, 1, 1]
    assert data.prompt_of_row.tolist() == [0, 1, 0]


def test_corrections():
    data = Corrections.load([CORRECTION, {"prompt": "q", "response": [assistant("A")], "corrected": [assistant("B")]}])
    assert data.text(0) == ("p", "r", "c")
    assert data.text(1) == ([user("q")], [assistant("A")], [assistant("B")])


def test_conversations():
    data = Conversations.load([CONVERSATION, CONVERSATION | {"choice": "tie"}])
    assert data.start(0) == [user("Hi")]
    assert data.conversations(0) == CONVERSATION["conversations"]
    assert data.turns(0)[0] == [assistant("A"), user("more"), assistant("B")]
    assert data.outcome.tolist() == [1, 3]
    assert data.num_candidates.tolist() == [3, 3]


def test_pairs_of_conversations():
    row = {"chosen": talk("Hi", "A", "so", "B"), "rejected": talk("Hi", "A", "so", "C")}
    data = Conversations.load([row, row | {"tie": True}])
    assert data.start(0) == talk("Hi", "A", "so")
    assert data.turns(0) == [[assistant("B")], [assistant("C")]]
    assert data.outcome.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("cls", "row", "reason"),
    [
        (Demonstrations, DEMONSTRATION | {"completion": " "}, "`completion` is empty"),
        (Demonstrations, DEMONSTRATION | {"weight": "much"}, "`weight` is 'much'"),
        (Demonstrations, {"prompt": None, "completion": "c"}, "`prompt` or `instruction` is null"),
        (Corrections, CORRECTION | {"corrected": None}, "`corrected` is null"),
        (Conversations, CONVERSATION | {"choice": 3}, "`choice` is 3, but there are 3 conversations"),
        (Conversations, CONVERSATION | {"conversations": [talk("Hi", "A")]}, "`conversations` has 1 entries"),
        (Conversations, CONVERSATION | {"conversations": [talk("Hi"), talk("Hi", "A")]}, "has 1 message"),
        (Conversations, CONVERSATION | {"conversations": [talk("Hi", "A"), talk("Ho", "B")]}, "does not begin like"),
        (Conversations, CONVERSATION | {"conversations": [talk("Hi", "A")] * 2}, r"\[1\] repeats `conversations`\[0\]"),
        (Conversations, CONVERSATION | {"conversations": ["Hi", "Ho"]}, "is of type str; give a list of messages"),
    ],
)
def test_bad_rows_are_named_or_skipped(cls, row, reason):
    good = dict(CLASSES)[cls]
    with pytest.raises(DataError, match=rf"list, row 1: .*{reason}"):
        cls.load([good, row])
    data = cls.load([good, row], on_bad_row="skip")
    assert len(data) == 1
    assert data.refused[0][0] == 1
    assert "refused: 1" in data.summary()


@pytest.mark.parametrize(("cls", "row"), CLASSES)
def test_what_all_share(cls, row, tmp_path):
    def under(number):
        return json.loads(json.dumps(row).replace('"Hi"', f'"Hi {number}"').replace('"p"', f'"p {number}"'))

    rows = [under(number % 4) for number in range(8)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = cls.load(tmp_path / "x.jsonl")
    assert (len(data), data.num_prompts) == (8, 4)
    assert repr(data) == f"{cls.__name__}(8 rows, 4 prompts)"
    assert "x.jsonl" in str(data)
    read = cls.conversations if cls is Conversations else cls.text
    train, test = data.split_by_prompt(0.25, seed=1)
    assert (len(train), len(test)) == (6, 2)
    wanted = sorted(repr(read(data, row)) for row in range(8))
    assert sorted(repr(read(part, row)) for part in (train, test) for row in range(len(part))) == wanted
    assert read(data.select([5, 0]), 0) == read(data, 5)
    with pytest.raises(ArgumentError, match="`row` is 8; accepted are 0 to 7"):
        read(data, 8)
    with pytest.raises(DataError, match="fit no format"):
        cls.load([{"x": 1}])

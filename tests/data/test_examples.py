"""The shipped set."""

import json

import pytest

from bayesrm.data import examples, load_quality_rankings, quality_comparisons
from bayesrm.errors import ArgumentError, DataError

LINES = [
    {
        "id": f"{subject}-{number}",
        "subject": subject,
        "out_of_domain": subject == "law",
        "prompt": f"{subject} question {number}?",
        "responses": [f"{rank} answer to {subject} {number}" for rank in ("best", "second", "third", "worst")],
        "flaws": ["x", "y", "z"],
        "hacks": [{"text": "Great question!", "kind": "flattering"}] if number == 0 else [],
    }
    for subject in ("tea", "law")
    for number in range(3)
]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    (tmp_path / "quality_rankings.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n")
    monkeypatch.setattr(examples.importlib.resources, "files", lambda package: tmp_path)
    return tmp_path / "quality_rankings.jsonl"


def test_splits(shipped):
    assert {p.subject for p in load_quality_rankings()} == {"tea"}
    assert {p.subject for p in load_quality_rankings(split="out_of_domain")} == {"law"}
    prompts = load_quality_rankings(split="all", hacks=True)
    assert [p.id for p in prompts] == [line["id"] for line in LINES]
    assert prompts[0].hacks == (("Great question!", "flattering"),)
    assert all(p.hacks == () for p in load_quality_rankings(split="all"))
    with pytest.raises(ArgumentError, match="`split` is 'test'; accepted are 'in_domain'"):
        load_quality_rankings(split="test")


def test_comparisons(shipped):
    prompts = load_quality_rankings()
    pairs = quality_comparisons(prompts)
    (group,) = pairs.groups()
    assert (len(pairs), pairs.num_items, pairs.num_prompts) == (18, 12, 3)
    assert group.outcome.tolist() == [0] * 18
    assert pairs.text(int(group.items[0, 0])) == (prompts[0].prompt, prompts[0].responses[0])
    rankings = quality_comparisons(prompts, kind="ranking")
    assert rankings.groups()[0].outcome.tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(ArgumentError, match="`kind` is 'rating'"):
        quality_comparisons(prompts, kind="rating")
    with pytest.raises(ArgumentError, match="`prompts` is empty"):
        quality_comparisons([])


def test_missing_or_damaged_file(shipped):
    shipped.write_text(json.dumps(LINES[0]) + '\n{"id": "x"}\n')
    with pytest.raises(DataError, match=r"quality_rankings\.jsonl: line 2 cannot be read \(KeyError: 'subject'\)"):
        load_quality_rankings()
    shipped.unlink()
    with pytest.raises(DataError, match="the file is missing; install the package again"):
        load_quality_rankings()

"""Every way in which a row or a file can be unusable is told, with the row or the file and the reason."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayesrm.data import Comparisons
from bayesrm.errors import ArgumentError, DataError

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
VERDICT = {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"}
CHOICE = {"prompt": "p", "responses": ["a", "b", "c"], "choice": 0}
RANKING = {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [0, 1, 2]}
SCORED = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
COMPLETIONS = {"prompt": "p", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]}
LABEL = {"prompt": "p", "completion": "a", "label": True}
RATING = {"prompt": "p", "response": "a", "rating": 3}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

BAD_ROWS = [
    (PAIR, {"rejected": ""}, "`rejected` is empty"),
    (PAIR, {"chosen": " \n "}, "`chosen` is empty"),
    (PAIR, {"chosen": None}, "`chosen` is null"),
    (PAIR, {"prompt": None}, "`prompt` or `instruction` is null"),
    (PAIR, {"chosen": 5}, "`chosen` is of type int; give a string or a list of messages"),
    (PAIR, {"chosen": "b"}, "`chosen` and `rejected` are the same text"),
    (PAIR, {"weight": -1}, r"`weight` is -1.0; give a number of at least 0"),
    (PAIR, {"weight": float("nan")}, "`weight` is nan; give a finite number"),
    (PAIR, {"weight": True}, "`weight` is True; give a number"),
    (PAIR, {"margin": float("nan")}, "`margin` is nan; give a finite number"),
    (PAIR, {"margin": "large"}, "`margin` is 'large'; give a number"),
    (PAIR, {"tie": "perhaps"}, "`tie` is 'perhaps'; give true or false"),
    (PAIR, {"annotator": 1.5}, "`annotator` is 1.5; give a name or an integer"),
    (PAIR, {"chosen": "half \ud800"}, "`chosen` holds half of a surrogate pair at character 5"),
    (
        PAIR,
        {"chosen": [{"role": "robot", "content": "x"}]},
        r"`chosen`\[0\] has the unknown role 'robot'; accepted are",
    ),
    (PAIR, {"chosen": [{"content": "x"}]}, r"`chosen`\[0\] has no `role`"),
    (PAIR, {"chosen": [{"role": "assistant"}]}, r"`chosen`\[0\] has no `content`"),
    (PAIR, {"chosen": [{"role": "assistant", "content": 3}]}, r"`content` of `chosen`\[0\] is of type int"),
    (PAIR, {"chosen": ["x"]}, r"`chosen`\[0\] is of type str; give a message"),
    (PAIR, {"chosen": []}, "`chosen` is empty; give at least one message"),
    (PAIR, {"chosen": [{"role": "assistant", "content": " "}]}, "`chosen` is empty: the content of its last message"),
    (PAIR, {"chosen": TALK}, "mix strings and lists|`rejected`"),
    (VERDICT, {"winner": "left"}, "`winner` is 'left'; accepted are 'a', 'model_a'"),
    (VERDICT, {"winner": 2}, "`winner` is 2; accepted"),
    (VERDICT, {"winner": True}, "`winner` is True; accepted"),
    (VERDICT, {"winner": None}, "`winner` is null"),
    (VERDICT, {"response_b": "a"}, "`response_a` and `response_b` are the same text"),
    (CHOICE, {"choice": 3}, "`choice` is 3, but there are 3 responses; give an index from 0 to 2"),
    (CHOICE, {"choice": -1}, "`choice` is -1"),
    (CHOICE, {"choice": 0.5}, "`choice` is 0.5; give a whole number"),
    (CHOICE, {"choice": "best"}, "`choice` is 'best'; give a number"),
    (CHOICE, {"responses": ["a"]}, "`responses` has 1 entries; a comparison needs at least 2"),
    (CHOICE, {"responses": "a"}, "`responses` is of type str; give a list"),
    (CHOICE, {"responses": ["a", "b", "a"]}, r"`responses`\[2\] repeats `responses`\[0\]"),
    (CHOICE, {"responses": ["a", "", "c"]}, r"`responses`\[1\] is empty"),
    (CHOICE, {"responses": ["a", None, "c"]}, r"`responses`\[1\] is null"),
    (CHOICE, {"margin": 1.0}, "`margin` is 1.0, but there are 3 responses; only a pair has a margin"),
    (RANKING, {"ranking": [0, 3]}, "`ranking` names response 3, but there are 3 responses"),
    (RANKING, {"ranking": [0, 0]}, r"`ranking` is \[0, 0\], which names a response twice"),
    (RANKING, {"ranking": []}, "`ranking` is empty"),
    (RANKING, {"ranking": ["first"]}, r"`ranking`\[0\] is 'first'; give a number"),
    (SCORED, {"scores": [1, 2]}, "`scores` has 2 entries and `responses` has 3"),
    (SCORED, {"scores": [1, 2, float("nan")]}, r"the score of `responses`\[2\] is nan"),
    (COMPLETIONS, {"completions": [{"response": "a"}] * 2}, r"`completions`\[0\]: .*is missing"),
    (COMPLETIONS, {"completions": ["a", "b"]}, r"`completions`\[0\] is of type str; give a mapping"),
    (COMPLETIONS, {"completions": []}, "`completions` has 0 entries"),
    (LABEL, {"label": "maybe"}, "`label` is 'maybe'; give true or false"),
    (LABEL, {"label": 2}, "`label` is 2; give true or false"),
    (LABEL, {"completion": ""}, "`completion` is empty"),
    (RATING, {"rating": float("nan")}, "`rating` is nan; give a finite number"),
    (RATING, {"rating": 2.5}, "`rating` is 2.5; give a whole number"),
    (RATING, {"rating": 10**12}, "the rating 1000000000000 is too large"),
    (RATING, {"response": None}, "`response` or `completion` is null"),
]


def rows_with(good, change):
    """A good row, the changed one, and another good row with a different outcome where ratings need one."""
    last = good | ({"rating": 1} if "rating" in good else {}) | {"prompt": "other"}
    return [good, good | change, last]


@pytest.mark.parametrize(("good", "change", "reason"), BAD_ROWS, ids=[reason[:40] for _, _, reason in BAD_ROWS])
def test_a_bad_row_is_named_with_the_reason(good, change, reason):
    with pytest.raises(DataError, match=reason) as caught:
        Comparisons.load(rows_with(good, change))
    assert caught.value.row == 1
    assert str(caught.value).startswith("list, row 1: ")
    assert 'on_bad_row="skip"' in str(caught.value)


@pytest.mark.parametrize(("good", "change", "reason"), BAD_ROWS, ids=[reason[:40] for _, _, reason in BAD_ROWS])
def test_a_bad_row_is_skipped_and_reported(good, change, reason):
    data = Comparisons.load(rows_with(good, change), on_bad_row="skip")
    clean = Comparisons.load([row for place, row in enumerate(rows_with(good, change)) if place != 1])
    assert [row for row, _ in data.refused] == [1]
    assert "rows read: 3, refused: 1" in data.summary()
    assert f"row 1: {data.refused[0][1]}" in data.summary()
    assert len(data) == len(clean)
    assert data.items.to_dict() == clean.items.to_dict()


def test_a_row_without_a_column_says_which_columns_it_has():
    with pytest.raises(DataError, match=r"row 1: `rejected` is missing; the row has \['chosen', 'prompt'\]"):
        Comparisons.load([PAIR, {"prompt": "p", "chosen": "a"}])


def test_rating_outside_levels_names_the_row():
    with pytest.raises(DataError, match="row 1: the rating 9 is outside `levels`, 1 to 5"):
        Comparisons.load([RATING, RATING | {"rating": 9}], levels=(1, 5))


def test_ratings_need_two_levels_and_not_thousands():
    with pytest.raises(DataError, match="ratings span 3 to 3; that is 1 levels"):
        Comparisons.load([RATING])
    with pytest.raises(DataError, match="ratings span 3 to 30000"):
        Comparisons.load([RATING, RATING | {"rating": 30000}])


def test_summary_lists_the_first_refusals_and_counts_the_rest():
    data = Comparisons.load([PAIR] + [PAIR | {"chosen": ""}] * 5, on_bad_row="skip")
    assert len(data.refused) == 5
    assert "and 2 more" in data.summary()
    assert str(data) == data.summary()


def test_nothing_usable_is_an_error():
    with pytest.raises(DataError, match="none of its 2 rows can be used; the first is row 0: `chosen` is empty"):
        Comparisons.load([PAIR | {"chosen": ""}] * 2, on_bad_row="skip")
    with pytest.raises(DataError, match="holds no rows"):
        Comparisons.load([])


def test_arguments_are_checked():
    with pytest.raises(ArgumentError, match="`on_bad_row` is 'ignore'; accepted are 'raise' and 'skip'"):
        Comparisons.load([PAIR], on_bad_row="ignore")
    with pytest.raises(ArgumentError, match="`source` is of type int; accepted are a path"):
        Comparisons.load(3)
    with pytest.raises(ArgumentError, match="`source` is of type list of dict, str"):
        Comparisons.load([PAIR, "x"])


def test_missing_and_unsupported_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.parquet: there is no such file"):
        Comparisons.load(tmp_path / "none.parquet")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: it is not a file of a known type; accepted are \.parquet"):
        Comparisons.load(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match="it is not a file of a known type"):
        Comparisons.load(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: the file is empty"):
        Comparisons.load(tmp_path / name)


def test_file_without_rows(tmp_path):
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in PAIR}), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "x.jsonl").write_text("\n\n")
    (tmp_path / "x.json").write_text("[]")
    for name in ("x.parquet", "x.csv", "x.jsonl", "x.json"):
        with pytest.raises(DataError, match=f"{name}: it holds no rows"):
            Comparisons.load(tmp_path / name)


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.001])
def test_truncated_parquet(tmp_path, keep):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR | {"prompt": f"prompt {i}"} for i in range(1000)]), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"x\.parquet: it is not a readable Parquet file"):
        Comparisons.load(path)


def test_parquet_damaged_in_the_middle(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR | {"prompt": f"prompt {i}"} for i in range(1000)]), path)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet: it is not a readable Parquet file"):
        Comparisons.load(path)


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR)[:-4] + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl: line 3 is not valid JSON"):
        Comparisons.load(path)
    path.write_text(json.dumps(PAIR) + "\n[1]\n")
    with pytest.raises(DataError, match="line 2 is a JSON list"):
        Comparisons.load(path)
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        Comparisons.load(path)


def test_malformed_json_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR))
    with pytest.raises(DataError, match=r"x\.json: it is not valid JSON .*ending \.jsonl"):
        Comparisons.load(path)
    path.write_text(json.dumps(PAIR))
    with pytest.raises(DataError, match=r"must hold one list of objects"):
        Comparisons.load(path)


def test_csv_problems(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen\np,a\n")
    with pytest.raises(DataError, match=r"x\.csv: the columns \['chosen', 'prompt'\] fit no format"):
        Comparisons.load(path)
    path.write_text("prompt,chosen,rejected\np,a,b\np,a\n")
    with pytest.raises(DataError, match=r"x\.csv: line 3 has 2 cells and the header 3"):
        Comparisons.load(path)
    path.write_text("prompt,chosen,chosen\np,a,b\n")
    with pytest.raises(DataError, match="names a column twice"):
        Comparisons.load(path)
    path.write_text('prompt,chosen,rejected\np,a,"b\n')
    with pytest.raises(DataError, match=r"is not valid CSV"):
        Comparisons.load(path)


def test_damaged_gzip(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode())[:-10])
    with pytest.raises(DataError, match="the compressed file is damaged"):
        Comparisons.load(path)
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="the compressed file is damaged"):
        Comparisons.load(path)


def test_unreachable_hub_id(monkeypatch):
    import datasets

    def refuse(name, split=None):
        raise ConnectionError(f"cannot reach {name}\nlong details")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/name: there is no such file, and loading .* \(ConnectionError: cannot"):
        Comparisons.load("org/name")


def test_hub_id_goes_to_datasets(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([PAIR])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: datasets.DatasetDict({"train": table}))
    assert len(Comparisons.load("org/name")) == 1


def test_row_of_a_later_file_is_named_by_its_place_in_that_file(tmp_path):
    for name, rows in (("a", [PAIR] * 3), ("b", [PAIR, PAIR | {"chosen": ""}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(DataError, match=r"b\.jsonl, row 1: `chosen` is empty"):
        Comparisons.load(paths)
    data = Comparisons.load(paths, on_bad_row="skip")
    assert [row for row, _ in data.refused] == [4]
    assert (len(data), data.num_items) == (4, 2)


def test_files_of_different_formats_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "b.jsonl").write_text(json.dumps(LABEL))
    with pytest.raises(DataError, match=r"b\.jsonl: its format is unpaired labels, but the files before it"):
        Comparisons.load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])

"""The same rows read the same from every kind of source."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayesrm.data import Comparisons
from bayesrm.data.base import BATCH_SIZE, read_batches

ROWS = [
    {"prompt": 'comma, quote " and\nline', "chosen": "NA", "rejected": "null", "weight": 0.5, "annotator": "a"},
    {"prompt": "grüße 你好", "chosen": "1", "rejected": "2", "weight": 1.0, "annotator": "b"},
]


def write(folder: Path, name: str):
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.json", "x.jsonl", "x.jsonl.gz"])
def test_every_file_type_reads_like_the_list(tmp_path, name):
    wanted = Comparisons.load(ROWS)
    found = Comparisons.load(write(tmp_path, name))
    assert found.rows.to_dict() == wanted.rows.to_dict()
    assert [found.text(item) for item in range(4)] == [wanted.text(item) for item in range(4)]
    assert found.text(0) == (ROWS[0]["prompt"], "NA")
    assert name in found.summary()


def test_string_paths_and_lists_of_paths(tmp_path):
    paths = [str(write(tmp_path, name)) for name in ("a.parquet", "b.csv")]
    data = Comparisons.load(paths)
    assert (len(data), data.num_items) == (4, 4)
    assert "2 files from" in data.summary()


def test_csv_cells_may_hold_json(tmp_path):
    path = tmp_path / "x.csv"
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    row = {"prompt": messages, "responses": json.dumps(["a", "b", "c"]), "ranking": "[2, 0]", "weight": ""}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    data = Comparisons.load(path)
    (group,) = data.groups()
    assert group.outcome.tolist() == [[2, 0]]
    assert group.weight.tolist() == [1.0]
    assert data.text(0)[0] == [{"role": "user", "content": "Hi"}]


def test_a_plain_text_that_looks_like_messages_stays_text():
    text = json.dumps([{"role": "user", "content": "Hi"}])
    assert Comparisons.from_pairs([text], ["a"], ["b"]).text(0) == (text, "a")


def test_keys_that_appear_late_in_a_file_are_read(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(BATCH_SIZE + 5)]
    rows[-1] |= {"tie": True, "annotator": "late", "note": "x"}
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = Comparisons.load(path)
    (group,) = data.groups()
    assert group.outcome[-1] == 2
    assert data.annotators == ("late",)
    assert "columns not used: note" in data.summary()


def test_batches_number_rows_within_and_over_sources(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(["{}"] * (BATCH_SIZE + 1)))
    found = [(len(batch.rows), batch.start, batch.offset) for batch in read_batches([path, path])]
    whole = BATCH_SIZE
    assert found == [(whole, 0, 0), (1, whole, whole), (whole, 0, whole + 1), (1, whole, 2 * whole + 1)]


def test_streaming_datasets():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert Comparisons.load(stream).text(0) == (ROWS[0]["prompt"], "NA")

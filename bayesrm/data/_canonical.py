"""The package's own Parquet format: prompts, items and rows in one file, told apart by the column `table`.

Row groups hold one table each, in that order. The metadata of the file has the key `bayesrm.comparisons`, with the
version of the format.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64

from ..errors import ArgumentError, DataError
from ._groups import check_outcomes
from ._report import Report
from ._rows import KINDS, Ragged, RowTable
from ._texts import TemporaryFolder, TextTable, TextWriter

_KEY = b"bayesrm.comparisons"
_VERSION = 1


def items_table(
    items: TextTable,
    prompt_of_item: Int64[np.ndarray, " items"],
    words: Int32[np.ndarray, " items"] | None,
    ids: tuple[str, ...] | None,
) -> pa.Table:
    """Returns the table of items in the form in which users see it."""
    texts = items.to_arrow()
    columns = {
        "prompt_index": pa.array(prompt_of_item),
        "response": texts["text"],
        "is_messages": texts["is_messages"],
    }
    if words is not None:
        columns["words"] = pa.array(words)
    if ids is not None:
        columns["id"] = pa.array(ids, pa.string())
    return pa.table(columns)


def is_canonical(source: Any) -> bool:
    """Whether a source is a Parquet file that `write` made."""
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".parquet" or not Path(source).is_file():
        return False
    import pyarrow.parquet as pq

    try:
        return _KEY in (pq.read_schema(source).metadata or {})
    except (pa.ArrowException, OSError):
        return False  # the ordinary reader says what is wrong with the file


def write(
    path: Path,
    prompts: TextTable,
    items: TextTable,
    prompt_of_item: Int64[np.ndarray, " items"],
    words: Int32[np.ndarray, " items"] | None,
    ids: tuple[str, ...] | None,
    rows: RowTable,
    features: np.ndarray | None,
) -> None:
    """Writes all tables to one file; it appears under its name only once it is complete."""
    import pyarrow.parquet as pq

    if path.suffix != ".parquet":
        raise ArgumentError(f"`path` is {str(path)!r}; it must end in .parquet")
    number = pa.float32() if features is not None and features.dtype == np.float32 else pa.float64()
    details = {
        "version": _VERSION,
        "counts": [len(prompts), len(items), len(rows)],
        "texts": items.has_texts,
        "words": words is not None,
        "features": features is not None,
        "annotators": rows.names,
    }
    schema = _schema(number).with_metadata({_KEY: json.dumps(details).encode()})
    unfinished = path.with_name(path.name + ".part")
    try:
        with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            for batch in prompts.batches():
                writer.write_table(_complete(batch, "prompt", schema))
            start = 0
            for batch in items.batches():
                part = slice(start, start + len(batch))
                columns = {"text": batch["text"], "is_messages": batch["is_messages"]}
                columns["prompt_index"] = pa.array(prompt_of_item[part])
                if words is not None:
                    columns["words"] = pa.array(words[part])
                if ids is not None:
                    columns["id"] = pa.array(ids[part], pa.string())
                if features is not None:
                    flat = pa.array(np.ascontiguousarray(features[part]).reshape(-1), number)
                    starts = np.arange(len(batch) + 1, dtype=np.int32) * features.shape[1]
                    columns["features"] = pa.ListArray.from_arrays(pa.array(starts), flat)
                writer.write_table(_complete(pa.table(columns), "item", schema))
                start = part.stop
            table = rows.to_arrow()
            for start in range(0, len(table), 1 << 16):
                writer.write_table(_complete(table.slice(start, 1 << 16), "row", schema))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path, in_memory_limit: int, cache_dir: str | Path | None) -> tuple[Any, ...]:
    """Reads a file that `write` made; returns the fields of `Comparisons`.

    Raises:
        DataError: The file is damaged, of a newer version, or its tables do not fit each other.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            details = json.loads(file.schema_arrow.metadata[_KEY])
            if details["version"] != _VERSION:
                raise DataError(
                    f"it has version {details['version']} of the format; this release reads {_VERSION}: update bayesrm",
                    source=str(path),
                )
            return _read_tables(file, details, TemporaryFolder(cache_dir), in_memory_limit, str(path))
    except (pa.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"it cannot be read ({type(error).__name__}: {error}); write it again", source=str(path)
        ) from None


def _read_tables(file: Any, details: dict[str, Any], folder: TemporaryFolder, limit: int, name: str) -> tuple[Any, ...]:
    writers = {table: TextWriter(f"{table}s", folder=folder, limit=limit) for table in ("prompt", "item")}
    owners: list[Any] = []
    words: list[Any] = []
    ids: list[str | None] = []
    features: list[Any] = []
    rows: list[RowTable] = []
    for table, batch in _row_groups(file):
        if table == "row":
            rows.append(_read_rows(batch, details["annotators"]))
            continue
        if details["texts"]:
            text = batch["text"].combine_chunks()
            writers[table].append(text, batch["is_messages"].to_pylist())
        if table == "item":
            owners.append(batch["prompt_index"].to_numpy())
            words.append(batch["words"].to_numpy() if details["words"] else None)
            ids += batch["id"].to_pylist()
            if details["features"]:
                flat = batch["features"].combine_chunks().flatten().to_numpy()
                features.append(flat.reshape(len(batch), -1))
    num_prompts, num_items, num_rows = details["counts"]
    texts = [
        writers[table].finish() if details["texts"] else TextTable(None, count)
        for table, count in (("prompt", num_prompts), ("item", num_items))
    ]
    prompt_of_item = np.concatenate([np.empty(0, np.int64), *owners])
    merged = RowTable.concatenate(rows)
    _check(texts, prompt_of_item, merged, (num_prompts, num_items, num_rows), name)
    return (
        *texts,
        prompt_of_item,
        np.concatenate(words).astype(np.int32) if details["words"] else None,
        merged,
        Report(name, "bayesrm's own format", num_rows),
        np.concatenate(features) if details["features"] else None,
        None if None in ids else tuple(str(value) for value in ids),
    )


def _check(
    texts: list[TextTable], prompt_of_item: np.ndarray, rows: RowTable, counts: tuple[int, int, int], name: str
) -> None:
    found = (len(texts[0]), len(texts[1]), len(rows))
    if found != counts or len(prompt_of_item) != counts[1]:
        raise DataError(
            f"it holds {found} prompts, items and rows, but should hold {counts}; write it again", source=name
        )
    pairs = (("prompt", prompt_of_item, counts[0]), ("item", rows.candidates.values, counts[1]))
    for what, values, size in pairs:
        if len(values) and (values.min() < 0 or values.max() >= size):
            raise DataError(f"it names {what} {values.max()}, but holds {size}; write it again", source=name)
    check_outcomes(rows, name)


def _row_groups(file: Any) -> Iterator[tuple[str, pa.Table]]:
    for group in range(file.num_row_groups):
        batch = file.read_row_group(group)
        if len(batch):
            yield batch["table"][0].as_py(), batch


def _read_rows(batch: pa.Table, names: list[str]) -> RowTable:
    lists = []
    for column in ("candidates", "outcome"):
        array = batch[column].combine_chunks()
        lists.append(Ragged.from_lengths(array.flatten().to_numpy(), array.value_lengths().to_numpy()))
    codes = {None: -1} | {name: code for code, name in enumerate(names)}
    kinds = {kind: code for code, kind in enumerate(KINDS)}
    return RowTable(
        kind=np.array([kinds[kind] for kind in batch["kind"].to_pylist()], np.int8),
        candidates=lists[0],
        outcomes=lists[1],
        annotator=np.array([codes[name] for name in batch["annotator"].to_pylist()], np.int32),
        weight=batch["weight"].to_numpy(),
        margin=batch["margin"].cast(pa.float64()).to_numpy(),
        num_levels=batch["num_levels"].fill_null(0).to_numpy(),
        names=tuple(names),
    )


def _schema(number: pa.DataType) -> pa.Schema:
    return pa.schema(
        {
            "table": pa.string(),
            "text": pa.large_string(),
            "is_messages": pa.bool_(),
            "prompt_index": pa.int64(),
            "words": pa.int32(),
            "id": pa.string(),
            "features": pa.list_(number),
            "kind": pa.string(),
            "candidates": pa.list_(pa.int32()),
            "outcome": pa.list_(pa.int32()),
            "annotator": pa.string(),
            "weight": pa.float64(),
            "margin": pa.float64(),
            "num_levels": pa.int32(),
        }
    )


def _complete(batch: pa.Table, table: str, schema: pa.Schema) -> pa.Table:
    """Adds the columns of the other tables as nulls."""
    columns = {name: batch[name] for name in batch.column_names} | {"table": pa.array([table] * len(batch))}
    return pa.table(
        [
            columns[field.name].cast(field.type) if field.name in columns else pa.nulls(len(batch), field.type)
            for field in schema
        ],
        schema=schema,
    )

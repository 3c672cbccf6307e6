"""Reads rows from files, lists, data sets and the hub, in batches, and hands each row to a parser."""

import csv
import dataclasses
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..errors import ArgumentError, DataError
from ._fields import BadRowError, decode_cell

#: A path, a list of paths, a list of dicts, a `datasets.Dataset` (or a dict of splits), or the id of a data set on the
#: hub. Optional packages define some of these types, so the alias cannot name them.
Source: TypeAlias = Any

#: What to do with a row that cannot be used: `"raise"` or `"skip"`.
OnBadRow: TypeAlias = str

BATCH_SIZE = 2048
EXTENSIONS = (".parquet", ".jsonl", ".json", ".csv")

_Parsed = TypeVar("_Parsed")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Consecutive rows of one source.

    Attributes:
        rows: The rows as mappings from column to Python value.
        source: The file, or a short description.
        start: Index of the first row in that source.
        offset: Index of the first row over all sources that are read together.
    """

    rows: Sequence[Mapping[str, Any]]
    source: str
    start: int
    offset: int


def read_batches(
    source: Source, *, columns: Mapping[str, str] | None = None, split: str | None = None
) -> Iterator[Batch]:
    """Reads a source piece by piece, so that only one batch is held as Python objects at a time.

    Args:
        source: Path (`.parquet`, `.jsonl`, `.json`, `.csv`; the text formats also with `.gz`) or list of paths, list of
            dicts, `datasets.Dataset`, or hub id `"org/name"`.
        columns: Renames columns: our name to the source's name.
        split: Split to read, for a data set with several.

    Yields:
        Batches of up to 2,048 rows.

    Raises:
        DataError: A file is missing, damaged or empty, a column to rename does not exist, or a split must be named.
        ArgumentError: The type of the source is not one of the above.

    Example:
        >>> [batch.rows for batch in read_batches([{"text": "a"}], columns={"prompt": "text"})]
        [[{'prompt': 'a'}]]
    """
    offset = 0
    for name, pieces in _open(source, split):
        start = 0
        for rows in pieces:
            if columns:
                rows = _rename(rows, columns, name, check=start == 0)
            yield Batch(rows, name, start, offset)
            start += len(rows)
            offset += len(rows)
        if start == 0:
            raise DataError("it holds no rows; give at least one", source=name)


def parse_batches(
    batches: Iterable[Batch],
    parse: Callable[[Mapping[str, Any]], Iterable[_Parsed]],
    on_bad_row: OnBadRow,
    refused: list[tuple[int, str]],
) -> Iterator[list[_Parsed]]:
    """Parses each row of each batch.

    Args:
        batches: What to read.
        parse: Turns a row into any number of results, or raises the reason why it cannot.
        on_bad_row: `"raise"` stops at the first bad row; `"skip"` notes it in `refused` and goes on.
        refused: Receives (index of the row, reason) of each row left out.

    Yields:
        The results of one batch.

    Raises:
        DataError: A row is bad and `on_bad_row` is `"raise"`.
        ArgumentError: `on_bad_row` is neither.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ArgumentError(f"`on_bad_row` is {on_bad_row!r}; accepted are 'raise' and 'skip'")
    for batch in batches:
        results: list[_Parsed] = []
        for place, row in enumerate(batch.rows):
            try:
                results.extend(list(parse(row)))
            except BadRowError as error:
                if on_bad_row == "raise":
                    hint = '. Repair the row, or pass on_bad_row="skip" to leave such rows out and list them'
                    raise DataError(f"{error}{hint}", source=batch.source, row=batch.start + place) from None
                refused.append((batch.offset + place, str(error)))
        yield results


def describe_source(source: Source) -> str:
    """Returns a short name of a source for summaries."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    if isinstance(source, Sequence):
        if source and isinstance(source[0], (str, os.PathLike)):
            return f"{len(source)} files from {source[0]}"
        return "a list of rows"
    return f"a {type(source).__name__}"


def _open(source: Source, split: str | None) -> Iterator[tuple[str, Iterator[Sequence[Mapping[str, Any]]]]]:
    """Yields the name and the pieces of each part of a source."""
    if isinstance(source, (str, os.PathLike)):
        if _is_hub_id(source):
            yield str(source), _read_hub(str(source), split)
        else:
            yield str(source), _read_file(Path(source))
    elif hasattr(source, "iter") or hasattr(source, "column_names"):
        yield "datasets.Dataset", _read_dataset(source, split, "datasets.Dataset")
    elif isinstance(source, Sequence) and source and all(isinstance(part, (str, os.PathLike)) for part in source):
        for path in source:
            yield str(path), _read_file(Path(path))
    elif isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        yield "list", (source[start : start + BATCH_SIZE] for start in range(0, len(source), BATCH_SIZE))
    else:
        found = type(source).__name__
        if isinstance(source, Sequence):
            found += f" of {', '.join(sorted({type(part).__name__ for part in source}))}"
        raise ArgumentError(
            f"`source` is of type {found}; accepted are a path ({', '.join(EXTENSIONS)}), a list of paths, a list of "
            "dicts, a datasets.Dataset, or the id of a data set on the hub"
        )


def _rename(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], source: str, *, check: bool
) -> list[Mapping[str, Any]]:
    if check:
        found = {name for row in rows for name in row}
        for ours, theirs in columns.items():
            if theirs not in found:
                raise DataError(
                    f"`columns` maps {ours!r} to the column {theirs!r}, which does not exist; found {sorted(found)}",
                    source=source,
                )
    theirs_to_ours = {theirs: ours for ours, theirs in columns.items()}
    # A column that already has the name of a renamed one gives way to it.
    return [
        {
            theirs_to_ours.get(name, name): value
            for name, value in row.items()
            if name in theirs_to_ours or name not in columns
        }
        for row in rows
    ]


def _is_hub_id(source: Any) -> bool:
    text = str(source)
    if not isinstance(source, str) or Path(text).exists() or Path(text.removesuffix(".gz")).suffix in EXTENSIONS:
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")


def _read_file(path: Path) -> Iterator[list[dict[str, Any]]]:
    name = str(path)
    if not path.exists():
        raise DataError("there is no such file; check the path", source=name)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.is_dir() or plain.suffix not in EXTENSIONS or (plain is not path and plain.suffix not in readers):
        raise DataError(f"it is not a file of a known type; accepted are {', '.join(EXTENSIONS)}", source=name)
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes); give at least one row", source=name)
    if plain.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with gzip.open(path, "rb") if plain is not path else path.open("rb") as stream:
            yield from readers[plain.suffix](stream, name)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"the compressed file is damaged ({error}); fetch it again", source=name) from None


def _read_parquet(path: Path) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without pre-buffering and with a small buffer, a file with one huge row group is still read piece by piece.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(BATCH_SIZE, use_threads=False):
                yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"it is not a readable Parquet file ({_first_line(error)}); write it again", source=str(path)
        ) from None


def _read_jsonl(stream: Any, name: str) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"line {number} is not valid JSON ({error}); repair that line", source=name) from None
        if not isinstance(row, dict):
            raise DataError(f"line {number} is a JSON {type(row).__name__}; every line must be an object", source=name)
        rows.append(row)
        if len(rows) == BATCH_SIZE:
            yield rows
            rows = []
    if rows:
        yield rows


def _read_json(stream: Any, name: str) -> Iterator[list[dict[str, Any]]]:
    try:
        rows = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "; one object a line needs the ending .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"it is not valid JSON ({error}){hint}", source=name) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError("a .json file must hold one list of objects", source=name)
    for start in range(0, len(rows), BATCH_SIZE):
        yield rows[start : start + BATCH_SIZE]


def _read_csv(stream: Any, name: str) -> Iterator[list[dict[str, Any]]]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        yield from _read_cells(reader, name)
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "; save such long texts as Parquet or JSON lines" if "field limit" in str(error) else ""
        raise DataError(f"line {reader.line_num} is not valid CSV in UTF-8 ({error}){hint}", source=name) from None
    finally:
        text.detach()  # the caller closes the file


def _read_cells(reader: Any, name: str) -> Iterator[list[dict[str, Any]]]:
    header: list[str] = next(reader, [])
    if len(set(header)) < len(header):
        raise DataError(f"the header {header} names a column twice", source=name)
    rows: list[dict[str, Any]] = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"line {reader.line_num} has {len(cells)} cells and the header {len(header)}; quote cells that hold "
                "commas or line ends",
                source=name,
            )
        rows.append(dict(zip(header, map(decode_cell, cells), strict=True)))
        if len(rows) == BATCH_SIZE:
            yield rows
            rows = []
    if rows:
        yield rows


def _read_dataset(source: Any, split: str | None, name: str) -> Iterator[list[dict[str, Any]]]:
    if isinstance(source, Mapping):
        if split is None and len(source) == 1:
            split = next(iter(source))
        if split not in source:
            found = "no split is named" if split is None else f"there is no split {split!r}"
            raise DataError(f"{found}; pass `split`, one of {', '.join(map(repr, source))}", source=name)
        source = source[split]
    plain = source.with_format(None)
    for batch in plain.iter(BATCH_SIZE):
        names = list(batch)
        yield [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _read_hub(name: str, split: str | None) -> Iterator[list[dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises errors of many unrelated types
        raise DataError(
            f"there is no such file, and loading it from the hub failed ({type(error).__name__}: {_first_line(error)})",
            source=name,
        ) from error
    yield from _read_dataset(loaded, split, name)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]

"""Tables of texts in Arrow: kept in memory while small, written to a memory-mapped file once large."""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

#: Texts above this many bytes a table go to a memory-mapped file.
IN_MEMORY_LIMIT = 64 * 2**20

_SCHEMA = pa.schema({"text": pa.large_string(), "is_messages": pa.bool_()})


class Text(NamedTuple):
    """A text, or a conversation encoded as JSON."""

    value: str
    is_messages: bool = False

    def decode(self) -> str | list[dict[str, Any]]:
        """Returns the text, or the list of messages that it encodes."""
        return json.loads(self.value) if self.is_messages else self.value


class TextTable:
    """An immutable column of texts, `len(table)` long; selecting from it copies no text.

    Args:
        store: Arrow table with columns `text` and `is_messages`, or `None` when every text is empty.
        length: Number of texts.
        index: Row of the store for each text, shape `(length,)`, or `None` for all rows in order.
        folder: Keeps the folder of a memory-mapped store alive.
    """

    def __init__(
        self,
        store: pa.Table | None,
        length: int,
        *,
        index: Int[np.ndarray, " length"] | None = None,
        folder: "TemporaryFolder | None" = None,
    ) -> None:
        self._store = store
        self._length = length
        self._index = index
        self._folder = folder

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Text:
        if not 0 <= position < self._length:
            raise IndexError(f"{position} is outside 0..{self._length - 1}")
        if self._store is None:
            return Text("")
        row = position if self._index is None else int(self._index[position])
        piece = self._store.slice(row, 1)
        return Text(piece["text"][0].as_py(), piece["is_messages"][0].as_py())

    @property
    def has_texts(self) -> bool:
        """Whether texts are known at all."""
        return self._store is not None

    @property
    def is_mapped(self) -> bool:
        """Whether the texts lie in a memory-mapped file."""
        return self._folder is not None

    def select(self, positions: Int[np.ndarray, " selected"]) -> "TextTable":
        """Returns the table of the texts at `positions`."""
        index = None
        if self._store is not None:
            index = positions if self._index is None else self._index[positions]
        return TextTable(self._store, len(positions), index=index, folder=self._folder)

    def batches(self, size: int = 4096) -> Iterator[pa.Table]:
        """Yields Arrow tables (`text`, `is_messages`) of up to `size` texts, in order."""
        for start in range(0, self._length, size):
            count = min(size, self._length - start)
            if self._store is None:
                yield pa.table([pa.array([""] * count, pa.large_string()), pa.array([False] * count)], schema=_SCHEMA)
            elif self._index is None:
                yield self._store.slice(start, count)
            else:
                yield self._store.take(pa.array(self._index[start : start + count]))

    def to_arrow(self) -> pa.Table:
        """Returns the whole table; only a selection or a table without texts is copied."""
        if self._store is not None and self._index is None:
            return self._store
        pieces = list(self.batches(1 << 16))
        return pa.concat_tables(pieces) if pieces else _SCHEMA.empty_table()


class TextWriter:
    """Collects texts in Arrow; beyond `limit` bytes they go to a file in `folder`, and the finished table maps it."""

    def __init__(self, name: str, *, folder: "TemporaryFolder", limit: int = IN_MEMORY_LIMIT) -> None:
        self._name = name
        self._folder = folder
        self._limit = limit
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._length = 0
        self._path: Path | None = None
        self._stream: Any = None

    def append(self, texts: pa.Array, is_messages: Sequence[bool]) -> None:
        """Appends a batch of texts (an Arrow array of large strings)."""
        batch = pa.record_batch([texts, pa.array(is_messages, pa.bool_())], schema=_SCHEMA)
        self._length += len(batch)
        self._bytes += batch.nbytes
        self._batches.append(batch)
        if self._bytes > self._limit and self._stream is None:
            self._path = self._folder.path / f"{self._name}.arrow"
            self._stream = pa.ipc.new_stream(str(self._path), _SCHEMA)
        if self._stream is not None:
            for held in self._batches:
                self._stream.write_batch(held)
            self._batches.clear()

    def finish(self) -> TextTable:
        """Returns the table of everything appended."""
        if self._stream is None:
            return TextTable(pa.Table.from_batches(self._batches, _SCHEMA), self._length)
        self._stream.close()
        with pa.memory_map(str(self._path)) as source:
            store = pa.ipc.open_stream(source).read_all()
        return TextTable(store, self._length, folder=self._folder)


class TemporaryFolder:
    """A folder made on first use and deleted once nothing refers to it any more, at the latest when Python ends."""

    def __init__(self, parent: str | Path | None = None) -> None:
        self._parent = parent
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The folder, made if it does not exist yet."""
        if self._path is None:
            if self._parent is not None:
                Path(self._parent).mkdir(parents=True, exist_ok=True)
            self._path = Path(tempfile.mkdtemp(prefix="bayesrm-", dir=self._parent))
            weakref.finalize(self, _remove, self._path, os.getpid())
        return self._path


def count_words(text: Text) -> int:
    """Counts the whitespace-separated words of a text; of a conversation, those of the contents of its messages."""
    if not text.is_messages:
        return len(text.value.split())
    return sum(len(message["content"].split()) for message in json.loads(text.value))


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked worker that drops its copy must not delete the parent's files
        shutil.rmtree(folder, ignore_errors=True)

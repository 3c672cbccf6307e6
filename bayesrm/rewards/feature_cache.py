"""Embeddings kept on disk, so that each text goes through a model once."""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float32, Integer

from ..errors import PersistenceError

#: Marks a SQLite file as ours ("brmF"), with the version of its layout.
_APPLICATION_ID = 0x62726D46
_VERSION = 1
#: SQLite before 3.32 takes at most 999 placeholders in one statement.
_KEYS_A_QUERY = 900
_CHECKSUM_BYTES = 8
#: What decides the output of a model in a folder: its settings, its own code and its weights.
_MODEL_FILES = ("config.json", "*.py", "*.index.json", "*.safetensors", "pytorch_model*.bin")


def default_cache_dir() -> Path:
    """Folder of the caches: `$BAYESRM_CACHE` where that is set, else `~/.cache/bayesrm/features`.

    Example:
        >>> import os
        >>> from bayesrm.rewards.feature_cache import default_cache_dir
        >>> default_cache_dir().name == Path(os.environ.get("BAYESRM_CACHE", "features")).name
        True
    """
    named = os.environ.get("BAYESRM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "bayesrm" / "features"


def embedding_key(token_ids: Integer[np.ndarray, "tokens"], settings: Mapping[str, Any]) -> bytes:
    """Key of the embedding of one token sequence: 128 bits of all, beside the model, that the embedding depends on.

    Args:
        token_ids: The sequence as the model reads it (rendered, shortened, with special tokens), shape `(tokens,)`.
        settings: How it is embedded (pooling, layer, number format); JSON values.

    Returns:
        16 bytes.

    Example:
        >>> import numpy as np
        >>> from bayesrm.rewards.feature_cache import embedding_key
        >>> ids = np.array([5, 7])
        >>> embedding_key(ids, {"pooling": "mean"}) == embedding_key(ids, {"pooling": "last"})
        False
    """
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    digest.update(b"\0")
    digest.update(np.ascontiguousarray(token_ids, dtype="<i8").tobytes())
    return bytes(digest.digest())


def model_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change (nanoseconds) of the files in `folder` that decide what a model computes."""
    found = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    return {path.name: ((info := path.stat()).st_size, info.st_mtime_ns) for path in found}


def model_digest(folder: Path) -> str:
    """128-bit digest (32 hexadecimal digits) of the contents of a model's settings, code and weights.

    Whole files are read: a fine-tuned layer in the middle of a file leaves its ends, its size and, after a copy, its
    time as they were. Names of folders do not enter, so a model that has only moved keeps its cache.

    Raises:
        PersistenceError: A file of the model cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        for name, (size, _) in model_files(folder).items():
            digest.update(f"{name}\0{size}\0".encode())
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    except OSError as error:
        raise PersistenceError(f"`model`: {folder}: cannot read {error.filename!r}: {error.strerror}") from error
    return str(digest.hexdigest())


class FeatureCache:
    """Embeddings of one model in one SQLite file; use it as a context manager.

    Each call of `put` is one transaction: a run that is killed leaves every finished one behind and nothing half
    written. Several processes may read and write one file at the same time; a writer waits for the others. The rollback
    journal is used, not the write-ahead log: home folders on a cluster are often network file systems, where the log
    fails.

    Args:
        path: The file. It and its folder are made when absent.
        width: Length of every embedding.
        timeout: Seconds to wait for another process that is writing.

    Raises:
        PersistenceError: The file cannot be opened, is not such a cache, is damaged, or stays locked. The message names
            it and says how to go on.

    Example:
        >>> import numpy as np, tempfile
        >>> from pathlib import Path
        >>> from bayesrm.rewards.feature_cache import FeatureCache
        >>> with tempfile.TemporaryDirectory() as folder, FeatureCache(Path(folder) / "model.sqlite", width=2) as cache:
        ...     cache.put({b"a": np.ones(2, np.float32)})
        ...     sorted(cache.get([b"a", b"b"]))
        [b'a']
    """

    def __init__(self, path: Path, *, width: int, timeout: float = 60.0) -> None:
        self.path = path
        self.width = width
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from error
        with self._guarded():
            # Transactions are opened by hand, since a read that turns into a write can meet another that does the same.
            self._connection = sqlite3.connect(path, timeout=timeout, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        if self._pragma("application_id") == 0:
            with self._transaction():
                tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if self._pragma("application_id") == 0 and tables == 0:
                    self._connection.execute("CREATE TABLE embeddings (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
                    self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        if (self._pragma("application_id"), self._pragma("user_version")) != (_APPLICATION_ID, _VERSION):
            raise self._error("it is not a feature cache of this version")

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Float32[np.ndarray, "width"]]:
        """Returns the embeddings that are stored, each of shape `(width,)`; keys that are absent are left out.

        Raises:
            PersistenceError: The file is damaged.
        """
        found: dict[bytes, np.ndarray] = {}
        with self._guarded():
            for start in range(0, len(keys), _KEYS_A_QUERY):
                part = keys[start : start + _KEYS_A_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, value FROM embeddings WHERE key IN ({marks})"
                for key, value in self._connection.execute(query, part):
                    found[key] = self._decode(key, value)
        return found

    def put(self, embeddings: Mapping[bytes, Float32[np.ndarray, "width"]]) -> None:
        """Stores embeddings, each of shape `(width,)`, in one transaction; a key that is there already is replaced.

        Raises:
            PersistenceError: The file cannot be written (disk full, no permission, locked), or is damaged.
        """
        rows = [(key, self._encode(key, vector)) for key, vector in embeddings.items()]
        with self._guarded(), self._transaction():
            self._connection.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

    def __len__(self) -> int:
        with self._guarded():
            return int(self._connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])

    def close(self) -> None:
        """Closes the file; stored embeddings stay."""
        self._connection.close()

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, key: bytes, vector: np.ndarray) -> bytes:
        payload = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        return payload + xxhash.xxh64_digest(key + payload)

    def _decode(self, key: bytes, value: bytes) -> np.ndarray:
        payload, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
        # SQLite does not notice a changed byte inside a value.
        if len(payload) != 4 * self.width or xxhash.xxh64_digest(key + payload) != checksum:
            raise self._error(f"the embedding {key.hex()} is damaged")
        return np.frombuffer(payload, dtype="<f4").astype(np.float32)

    def _pragma(self, name: str) -> int:
        with closing(self._connection.execute(f"PRAGMA {name}")) as cursor:
            return int(cursor.fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, reason: object) -> PersistenceError:
        return PersistenceError(
            f"feature cache {self.path}: {reason}. A damaged or foreign file can be cleared by deleting it (its "
            "features are then computed again); if the folder cannot be written, pass another `cache_dir`, set "
            "BAYESRM_CACHE, or turn the cache off with `cache_dir=False`"
        )

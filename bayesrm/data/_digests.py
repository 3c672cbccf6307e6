"""Finds repeated texts by 128-bit digests held in numpy arrays, so that a million texts cost tens of megabytes."""

from collections.abc import Sequence

import numpy as np
import xxhash
from jaxtyping import Bool, Int64, UInt64

_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def text_digests(texts: Sequence[str], is_messages: Sequence[bool]) -> UInt64[np.ndarray, "texts 2"]:
    """Returns the XXH3 digest of each text; a conversation never equals the plain text of its encoding."""
    digest = xxhash.xxh3_128_digest
    joined = b"".join([digest(text.encode(), seed=int(flag)) for text, flag in zip(texts, is_messages, strict=True)])
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2).astype(np.uint64)


def pair_digests(
    owner: Int64[np.ndarray, " texts"], digests: UInt64[np.ndarray, "texts 2"]
) -> UInt64[np.ndarray, "texts 2"]:
    """Returns digests of (owner, text): the same response under two prompts is two items."""
    mixed = owner.astype(np.uint64) + _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIERS[1]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIERS[2]
    mixed ^= mixed >> np.uint64(31)
    return np.stack([digests[:, 0] + mixed, digests[:, 1] ^ (mixed * _MULTIPLIERS[0])], axis=1)


class DigestIndex:
    """Numbers distinct digests in order of first appearance: an open-addressing hash table over numpy arrays.

    Two different texts share a number with a probability below 1e-25 for a million texts.

    Example:
        >>> index = DigestIndex()
        >>> numbers, first = index.add(text_digests(["a", "b", "a"], [False] * 3))
        >>> numbers.tolist(), first.tolist()
        ([0, 1, 0], [0, 1])
    """

    def __init__(self) -> None:
        self._size = 0
        self._allocate(1 << 10)

    def __len__(self) -> int:
        return self._size

    def add(
        self, digests: UInt64[np.ndarray, "texts 2"]
    ) -> tuple[Int64[np.ndarray, " texts"], Int64[np.ndarray, " new"]]:
        """Adds a batch of digests.

        Args:
            digests: One digest a row, shape `(texts, 2)`.

        Returns:
            The number of each digest, shape `(texts,)`, and the positions in the batch at which a digest appeared for
            the first time ever, in order, shape `(new,)`.
        """
        first, inverse = _unique(digests)
        distinct = digests[first]
        found = self._find(distinct)
        is_new = found < 0
        if not is_new.any():
            return found[inverse], np.empty(0, np.int64)
        appearance = np.argsort(first[is_new])
        numbers = np.empty(int(is_new.sum()), np.int64)
        numbers[appearance] = self._size + np.arange(numbers.size)
        found[is_new] = numbers
        self._size += numbers.size
        if 2 * self._size > self._numbers.size:
            self._grow()
        self._insert(distinct[is_new], numbers)
        return found[inverse], first[is_new][appearance]

    def _allocate(self, capacity: int) -> None:
        self._keys = np.zeros((capacity, 2), np.uint64)
        self._numbers = np.full(capacity, -1, np.int32)

    def _grow(self) -> None:
        used = self._numbers >= 0
        keys, numbers = self._keys[used], self._numbers[used].astype(np.int64)
        capacity = self._numbers.size
        while capacity < 2 * self._size:
            capacity *= 2
        self._allocate(capacity)
        self._insert(keys, numbers)

    def _find(self, keys: UInt64[np.ndarray, "texts 2"]) -> Int64[np.ndarray, " texts"]:
        found = np.full(len(keys), -1, np.int64)
        open_ = np.arange(len(keys))
        slots = self._slots(keys)
        while open_.size:
            held = self._numbers[slots]
            same = (held >= 0) & (self._keys[slots] == keys[open_]).all(axis=1)
            found[open_[same]] = held[same]
            go_on = (held >= 0) & ~same
            open_, slots = open_[go_on], self._next(slots[go_on])
        return found

    def _insert(self, keys: UInt64[np.ndarray, "texts 2"], numbers: Int64[np.ndarray, " texts"]) -> None:
        open_ = np.arange(len(keys))
        slots = self._slots(keys)
        while open_.size:
            free = self._numbers[slots] < 0
            self._numbers[slots[free]] = numbers[open_[free]]
            # Where several keys claimed one free slot, the last write holds it and the others look on.
            won: Bool[np.ndarray, " open"] = free & (self._numbers[slots] == numbers[open_])
            self._keys[slots[won]] = keys[open_[won]]
            open_, slots = open_[~won], self._next(slots[~won])

    def _slots(self, keys: UInt64[np.ndarray, "texts 2"]) -> Int64[np.ndarray, " texts"]:
        return (keys[:, 0] & np.uint64(self._numbers.size - 1)).astype(np.int64)

    def _next(self, slots: Int64[np.ndarray, " texts"]) -> Int64[np.ndarray, " texts"]:
        return (slots + 1) & (self._numbers.size - 1)


def _unique(digests: UInt64[np.ndarray, "texts 2"]) -> tuple[Int64[np.ndarray, " new"], Int64[np.ndarray, " texts"]]:
    """Returns the first position of each distinct digest and, for each digest, which distinct one it is."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so the first of equal digests comes first
    ordered = digests[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(starts) - 1
    return order[starts].astype(np.int64), inverse

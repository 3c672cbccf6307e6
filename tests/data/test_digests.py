"""Numbers of texts agree with a dictionary, however they arrive."""

import numpy as np
import pytest

from bayesrm.data._digests import DigestIndex, pair_digests, text_digests


def digests(texts):
    return text_digests(texts, [False] * len(texts))


@pytest.mark.parametrize("batch", [1, 7, 1000, 20_000])
def test_index_agrees_with_a_dictionary(batch):
    rng = np.random.default_rng(0)
    texts = [f"text {number}" for number in rng.integers(5000, size=20_000)]
    if batch == 1:
        texts = texts[:3000]
    known, index = {}, DigestIndex()
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        before = len(known)
        wanted = [known.setdefault(text, len(known)) for text in part]
        numbers, new = index.add(digests(part))
        assert numbers.tolist() == wanted
        assert [part[position] for position in new] == list(known)[before:]
    assert len(index) == len(known)


def test_keys_that_share_a_slot_are_told_apart():
    index = DigestIndex()
    keys = np.stack([np.zeros(400, np.uint64), np.arange(400, dtype=np.uint64)], axis=1)
    first, _ = index.add(keys[:200])
    second, new = index.add(keys)
    assert first.tolist() == list(range(200))
    assert second.tolist() == list(range(400))
    assert new.tolist() == list(range(200, 400))


def test_empty_batch():
    numbers, new = DigestIndex().add(np.empty((0, 2), np.uint64))
    assert (numbers.size, new.size) == (0, 0)


def test_owner_and_sort_enter_the_digest():
    same = digests(["a"] * 4)
    owned = pair_digests(np.arange(4), same)
    assert len(np.unique(owned, axis=0)) == 4
    assert not np.array_equal(text_digests(["a"], [True]), text_digests(["a"], [False]))

"""Parts of tables: only what the selected rows use, and splits that share no prompt."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from ..errors import ArgumentError, DataError
from ._rows import RowTable
from ._texts import TextTable


def compact(
    prompts: TextTable, items: TextTable, prompt_of_item: Int64[np.ndarray, " items"], rows: RowTable
) -> tuple[TextTable, TextTable, Int64[np.ndarray, " used"], RowTable, Int64[np.ndarray, " used"]]:
    """Drops the items and prompts that no row uses.

    Returns:
        Prompts, items, the prompt of each item and the rows, renumbered; and the old numbers of the items kept.
    """
    used, positions = np.unique(rows.candidates.values, return_inverse=True)
    used = used.astype(np.int64)
    candidates = dataclasses.replace(rows.candidates, values=positions.reshape(-1).astype(np.int32))
    kept, owner = np.unique(prompt_of_item[used], return_inverse=True)
    moved = dataclasses.replace(rows, candidates=candidates)
    return prompts.select(kept), items.select(used), owner.reshape(-1).astype(np.int64), moved, used


def split_prompts(
    prompt_of_row: Int64[np.ndarray, " rows"], test_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Returns the rows of two sides that share no prompt; a seed gives one split."""
    if not 0 < test_fraction < 1:
        raise ArgumentError(f"`test_fraction` is {test_fraction}; give a number between 0 and 1, both excluded")
    prompts = np.unique(prompt_of_row)
    if len(prompts) < 2:
        raise DataError("all rows share one prompt, so none can be held out; split the rows with `select` instead")
    count = min(max(round(test_fraction * len(prompts)), 1), len(prompts) - 1)
    held_out = np.random.default_rng(seed).permutation(prompts)[:count]
    is_test = np.isin(prompt_of_row, held_out)
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)

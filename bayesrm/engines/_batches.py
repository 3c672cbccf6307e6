"""Micro-batches of comparisons: every row once an epoch, one kind and shape a batch, each item of a batch once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..backend import Recorder
from ..data.groups import FeedbackGroup
from ..errors import ArgumentError
from ..rewards import LoRANetwork
from ._density import FeedbackDensity

#: Batches whose rows are sorted by length together; a small part of an epoch, so that batches still vary.
_WINDOW = 50


class MicroBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """The partition of the rows into micro-batches, drawn anew for each epoch from the seed and the epoch's number.

    Rows with weight 0 are in none. The rows of a group are spread evenly, so that batches differ by one row at most,
    and batches are split until their number is a multiple of those in one step.

    Args:
        network: Collates token sequences.
        density: The feedback, on the network's device.
        sequences: Token sequence of each item.
        batch_size: Most rows of a batch.
        step_size: Batches that one step of the optimiser takes, on all processes together.
        group_by_length: Whether rows of similar length come together.
        seed: Seed of the order.
        numbered: Whether batches carry their `number` in the run, from which random numbers can follow that stay the
            same when the run is resumed.

    Raises:
        ArgumentError: There are fewer rows than batches in one step.
    """

    def __init__(
        self,
        network: LoRANetwork,
        density: FeedbackDensity,
        sequences: Sequence[np.ndarray],
        *,
        batch_size: int,
        step_size: int,
        group_by_length: bool,
        seed: int,
        numbered: bool = False,
    ) -> None:
        self._network, self._density, self._sequences, self._seed = network, density, sequences, seed
        self._group_by_length, self._numbered = group_by_length, numbered
        lengths = np.array([len(s) for s in sequences])
        self._items = [g.items.cpu().numpy() for g in density.groups]
        self._rows = [np.flatnonzero((g.weight > 0).cpu().numpy()) for g in density.groups]
        self._lengths = [lengths[items].max(axis=1) for items in self._items]
        self.num_rows = sum(map(len, self._rows))
        self._counts = _batch_counts([len(rows) for rows in self._rows], batch_size, step_size)
        self._companions = _companions(density)
        self.set_epoch(0)

    def __len__(self) -> int:
        return sum(self._counts)

    def set_epoch(self, epoch: int) -> None:
        """Draws the partition of an epoch; accelerate calls this."""
        self._epoch, self.plan = epoch, self._draw(epoch)

    def _draw(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng([self._seed, epoch])
        plan = []
        for group, (rows, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            if not count:
                continue
            order = rng.permutation(rows)
            ends = np.cumsum([len(part) for part in np.array_split(order, count)])
            if self._group_by_length:
                window = max(1, min(_WINDOW, count // 4))
                for part in np.split(order, ends[window - 1 : -1 : window]):
                    part[:] = part[np.argsort(self._lengths[group][part], kind="stable")]
            plan += [(group, part) for part in np.split(order, ends[:-1])]
        return [plan[i] for i in rng.permutation(len(plan))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, rows = self.plan[index]
        items, places = np.unique(self._items[group][rows], return_inverse=True)
        whole = self._density.groups[group]
        device = whole.items.device
        part = select_rows(whole, torch.from_numpy(rows).to(device))
        return {
            "sequences": self._network.collate([self._sequences[i] for i in items]),
            "places": torch.from_numpy(places.reshape(len(rows), -1)).to(device),
            "feedback": self._density.of_groups([part, *self._companions[group]]),
        } | ({"number": self._epoch * len(self) + index} if self._numbered else {})


def select_rows(group: FeedbackGroup, rows: torch.Tensor) -> FeedbackGroup:
    """Some rows of a group, given by their positions in it, shape `(n,)`."""
    part = group.map_arrays(lambda a: a[rows])
    return dataclasses.replace(part, comparison=dataclasses.replace(part.comparison, num_rows=len(rows)))


def _batch_counts(rows: Sequence[int], batch_size: int, step_size: int) -> list[int]:
    """Batches of each group of rows: at least as many as needed, in all a multiple of `step_size`."""
    counts = [-(-n // batch_size) for n in rows]
    missing = -sum(counts) % step_size
    if sum(counts) + missing > sum(rows):
        raise ArgumentError(
            f"one step takes {step_size} micro-batches (processes x `gradient_accumulation_steps`), more than the "
            f"{sum(rows)} rows can fill; lower `gradient_accumulation_steps` or use fewer processes"
        )
    for _ in range(missing):
        fullest = max(range(len(rows)), key=lambda g: rows[g] / counts[g] if counts[g] else 0.0)
        counts[fullest] += 1
    return counts


def _companions(density: FeedbackDensity) -> list[list[FeedbackGroup]]:
    """For each group, single rows of others that declare the latents it does not: their prior counts in every batch."""
    given = density.constrain(density.initial_latents)
    firsts = [select_rows(g, torch.zeros(1, dtype=torch.int64, device=g.items.device)) for g in density.groups]
    seen = []
    for first in firsts:
        rewards = density.initial_latents.new_zeros(first.items.shape)
        with torch.no_grad(), Recorder(given) as recorder:
            density.program.feedback([rewards], [first.comparison])
        seen.append(set(recorder.sites))
    found = []
    for own in seen:
        missing, chosen = set(given) - own, []
        for first, sites in zip(firsts, seen, strict=True):
            if sites & missing:
                chosen.append(first)
                missing -= sites
        found.append(chosen)
    return found

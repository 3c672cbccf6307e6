"""Derivatives of the rewards of all training items in the adapter weights: kept or computed again.

The work is a list of blocks of items of like length. Each process of a distributed run computes its share of them; a
store on disk remembers which are done, so that a run that died goes on at its last block.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..errors import PersistenceError
from ..rewards.jacobians import per_sample_jacobian
from ..rewards.lora_network import LoRANetwork
from ._processes import Processes

#: Sequences of a block, the unit of resumption.
BLOCK = 128
#: Columns of the derivatives are read in float64 by about this many numbers.
_CHUNK = 2**24


class Derivatives:
    """Rewards and derivatives of items at the network's present weights.

    Attributes:
        network: The network.
        sites: Parameter sites to differentiate in.
        sequences: Token sequence of every item.
        prompt: Prompt of every item, shape `(items,)`.
        rewards: Reward of every item, float32 (float64 for a network in float64), shape `(items,)`.
        jacobian: Derivatives, shape `(items, P)`, a tensor in memory or a mapped file; `None` when they are not kept.
    """

    def __init__(
        self,
        network: LoRANetwork,
        sites: Sequence[str],
        sequences: Sequence[np.ndarray],
        prompt: Tensor,
        *,
        batch_size: int,
        keep: bool = True,
        folder: Path | None = None,
        progress: bool = False,
    ) -> None:
        self.network, self.sites, self.sequences, self.prompt = network, list(sites), sequences, prompt
        self._batch_size, self._progress, self._folder = batch_size, progress, folder
        first = network.sites[self.sites[0]]
        self.dtype = first.dtype
        self.columns = sum(network.sites[site].numel() for site in self.sites)
        self.rewards = torch.zeros(len(sequences), dtype=self.dtype)
        self.jacobian: Tensor | None = None
        if keep:
            order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
            blocks = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]
            self._fill(blocks, folder)

    def _fill(self, blocks: list[list[int]], folder: Path | None) -> None:
        processes = Processes.current(self.network.device)
        shape = (len(self.sequences), self.columns)
        done: set[int] = set()
        log: Path | None = None
        if folder is None:
            self.jacobian = torch.zeros(shape, dtype=self.dtype)
        else:
            self.jacobian, log, done = _open(folder, shape, self.dtype, self._identity(), processes)
        mine = [b for b in range(len(blocks)) if b % processes.count == processes.index]
        with tqdm(total=len(mine), unit="block", desc="derivatives", disable=not self._progress) as bar:
            for b in mine:
                bar.update()
                if b in done:
                    continue
                rewards, rows = self._compute(blocks[b])
                self.jacobian[blocks[b]] = rows.cpu()
                self.rewards[blocks[b]] = rewards.cpu()
                if log is not None:
                    _note(log, b, self.rewards[blocks[b]])
        if processes.count > 1:
            processes.wait()
            for b, block in enumerate(blocks):
                owner = b % processes.count
                self.rewards[block] = processes.share(self.rewards[block], owner)
                if folder is None:
                    self.jacobian[block] = processes.share(self.jacobian[block], owner)
        if log is not None:
            _recall(log.parent, blocks, self.rewards)

    def _identity(self) -> str:
        digest = hashlib.sha256()
        digest.update(self.network.theta().cpu().numpy().tobytes())
        digest.update(json.dumps([self.sites, self.network.settings.to_config()], sort_keys=True).encode())
        for sequence in self.sequences:
            digest.update(sequence.tobytes() + b"|")
        return digest.hexdigest()

    def _compute(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rewards and derivatives of some items, in their order."""
        order = sorted(range(len(items)), key=lambda i: -len(self.sequences[items[i]]))
        device = self.network.device
        rewards = torch.zeros(len(items), dtype=self.dtype, device=device)
        rows = torch.zeros(len(items), self.columns, dtype=self.dtype, device=device)
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            batch = self.network.collate([self.sequences[items[i]] for i in part])
            found, block = per_sample_jacobian(self.network, batch, sites=self.sites)
            rewards[part], rows[part] = found.to(self.dtype), block
        return rewards, rows

    def accumulate(
        self, name: str, settings: str, state: Mapping[str, Tensor], update: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Calls `update(items, derivatives)` for this process's blocks of whole prompts; it adds to `state` in place.

        Where derivatives are computed again and a folder is known, `state` is saved there on the way, as often as costs
        a few percent of the time, and a run that died goes on from what was saved last.

        Args:
            name: What is summed.
            settings: All that decides the sums beside the network, the sequences and the prompts: sums that were
                saved with others are of no use.
            state: Tensors that `update` adds to.
            update: Adds a block.
        """
        saved = None
        if self.jacobian is None and self._folder is not None:
            processes = Processes.current(self.network.device)
            share = f"{processes.index} of {processes.count}, blocks of {BLOCK}, prompts {digest(self.prompt)}"
            saved = _PassFile(self._pass_file(name), f"{self._identity()} {name} {settings} {share}")
        state = dict(state) | {"rewards of items": self.rewards}
        skip = 0 if saved is None else saved.load(state)
        done = skip
        for items, rows in self.prompt_blocks(skip):
            update(items, rows)
            done += 1
            if saved is not None and saved.due():
                saved.save(state, done)
        if saved is not None and done > skip:
            saved.save(state, done)

    def forget(self, *names: str) -> None:
        """Removes what passes of these names have saved."""
        if self._folder is not None:
            for name in names:
                self._pass_file(name).unlink(missing_ok=True)

    def _pass_file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.{Processes.current(self.network.device).index}.safetensors"

    def prompt_blocks(self, skip: int = 0, *, share: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """(items, derivatives) of whole prompts at a time, shapes `(n,)` and `(n, P)`; computed where not kept.

        Args:
            skip: Blocks of this process to leave out at the start.
            share: Whether each process of a distributed run gets its share of the blocks alone.
        """
        order = torch.argsort(self.prompt, stable=True)
        _, counts = torch.unique_consecutive(self.prompt[order], return_counts=True)
        processes = Processes.current(self.network.device)
        start, run = 0, 0
        pieces = []
        for count in [*counts.tolist(), 0]:
            if run and (run + count > BLOCK or not count):
                pieces.append(order[start : start + run])
                start, run = start + run, 0
            run += count
        with tqdm(total=len(pieces), unit="block", disable=not self._progress or self.jacobian is not None) as bar:
            for number, items in enumerate(pieces):
                bar.update()
                if share and (number % processes.count != processes.index or number // processes.count < skip):
                    continue
                if self.jacobian is not None:
                    yield items, self.jacobian[items].to(self.network.device)
                else:
                    rewards, rows = self._compute(items.tolist())
                    self.rewards[items] = rewards.cpu()
                    yield items, rows

    def column_blocks(self, rows: Tensor, against: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, derivatives of `rows` minus those of `against`, float64, in these columns), site by site."""
        assert self.jacobian is not None
        width = max(1, _CHUNK // max(1, len(rows)))
        start = 0
        for site in self.sites:
            end = start + self.network.sites[site].numel()
            while start < end:
                stop = min(end, start + width)
                block = self.jacobian[rows, start:stop].double()
                if against is not None:
                    block -= self.jacobian[against, start:stop].double()
                yield start, stop, block
                start = stop


def digest(*tensors: Tensor | None) -> str:
    """What tells tensors from others."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"none" if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class _PassFile:
    """The sums of an unfinished pass, on disk."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._cost, self._last = 0.0, time.monotonic()

    def load(self, state: Mapping[str, Tensor]) -> int:
        """Puts what was saved into `state` and returns the number of blocks it holds, 0 for nothing of use."""
        if not self._path.exists():
            return 0
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                found = file.metadata() or {}
                if found.get("identity") != self._identity:
                    return 0
                for name, tensor in state.items():
                    tensor.copy_(file.get_tensor(name))
                return int(found["blocks"])
        except (OSError, safetensors.SafetensorError) as error:
            raise PersistenceError(
                f"{self._path} cannot be read ({error}); delete it to begin the pass again"
            ) from error

    def due(self) -> bool:
        """Whether so long has passed since the last time that saving costs a few percent at most."""
        return time.monotonic() - self._last >= 20.0 * self._cost

    def save(self, state: Mapping[str, Tensor], blocks: int) -> None:
        """Saves what holds so many blocks."""
        begin = time.monotonic()
        draft = self._path.with_suffix(".draft")
        try:
            metadata = {"identity": self._identity, "blocks": str(blocks)}
            safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in state.items()}, draft, metadata=metadata)
            os.replace(draft, self._path)
        except OSError as error:
            raise PersistenceError(f"cannot write {self._path}: {error}") from error
        self._last = time.monotonic()
        self._cost = self._last - begin


@contextlib.contextmanager
def scratch(folder: str | None) -> Iterator[Path]:
    """`folder` itself, or a temporary one that is gone afterwards."""
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bayesrm-") as temporary:
        yield Path(temporary)


def _open(
    folder: Path, shape: tuple[int, int], dtype: torch.dtype, identity: str, processes: Processes
) -> tuple[Tensor, Path, set[int]]:
    """The mapped file of derivatives in `folder`, this process's log of finished blocks, and those found finished."""
    file, note = folder / "derivatives.bin", folder / "derivatives.json"
    size = shape[0] * shape[1] * torch.empty((), dtype=dtype).element_size()
    wanted = {"identity": identity, "shape": list(shape), "dtype": str(dtype)}
    if processes.index == 0:
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(note.read_text())
        if found != wanted or not file.exists() or file.stat().st_size != size:
            for old in folder.glob("derivatives.*"):
                old.unlink()
            try:
                with file.open("wb") as stream:
                    stream.truncate(size)
            except OSError as error:
                raise PersistenceError(
                    f"cannot write {size / 2**30:.1f} GiB of derivatives to {folder}: {error}"
                ) from error
            note.write_text(json.dumps(wanted))
    processes.wait()
    jacobian = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=dtype).reshape(shape)
    done = {
        int(json.loads(line)["block"]) for log in folder.glob("derivatives.*.log") for line in _lines(log)
    }  # fmt: skip
    processes.wait()
    return jacobian, folder / f"derivatives.{processes.index}.log", done


def _note(log: Path, block: int, rewards: Tensor) -> None:
    with log.open("a") as stream:
        stream.write(json.dumps({"block": block, "rewards": rewards.tolist()}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _recall(folder: Path, blocks: list[list[int]], rewards: Tensor) -> None:
    for log in folder.glob("derivatives.*.log"):
        for line in _lines(log):
            entry = json.loads(line)
            rewards[blocks[entry["block"]]] = torch.tensor(entry["rewards"], dtype=rewards.dtype)


def _lines(log: Path) -> list[str]:
    # The last line may be cut short where the process died.
    return [line for line in log.read_text().split("\n")[:-1] if line.endswith("}")]

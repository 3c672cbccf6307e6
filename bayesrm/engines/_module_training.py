"""Training of any network on a sum over rows, by `transformers.Trainer`, with exact resume."""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from .._typing import Tensor
from ..errors import ArgumentError, EngineError
from ._batches import _batch_counts
from ._processes import Processes
from ._run_folder import _INCIDENTAL, RunFolder
from ._trainer import JointTrainer, trainer_arguments, trainer_session
from .training import Training, TrainingReport

#: Batches whose rows are sorted by length together; a small part of an epoch, so that batches still vary.
_WINDOW = 50


def train_module(
    network: Any,
    loss_of: Callable[[Tensor, int], Tensor],
    lengths: Sequence[int],
    training: Training,
    *,
    seed: int,
    progress: bool,
    identity: Mapping[str, Any],
    prior_loss: Callable[[], Tensor] | None = None,
) -> TrainingReport:
    """Trains a network in place, and leaves it in evaluation mode.

    The loss that the Trainer sees, averaged over the micro-batches of an epoch, is
    `(prior_loss() + sum over all rows of the rows' losses) / N`.

    Args:
        network: A `torch.nn.Module` that is `Trainable`; whatever `loss_of` uses is a part of it. A site `latents` has
            the `latent_learning_rate` of the settings.
        loss_of: Sum of the losses of some rows, given by their numbers, shape `(b,)`, and by the number of the
            micro-batch in the run, from which random numbers can follow that stay the same when the run is resumed.
        lengths: Length of each of the N rows, by which batches are put together.
        training: Settings; `sample_selection` has no meaning here.
        seed: Seed of the order of the rows.
        progress: Show a progress bar and the log.
        identity: What decides the outcome of the run beside `training` and `seed`, JSON values.
        prior_loss: What does not depend on the rows, such as minus the log prior.

    Returns:
        A report without latents.

    Raises:
        ArgumentError: A setting does not fit the data, the device or the installed transformers.
        EngineError: The loss is not finite, or rows are to be selected.
        PersistenceError: `output_dir` holds another run, or cannot be written.
    """
    if training.sample_selection is not None:
        raise EngineError("`sample_selection` is for reward models trained by MAP")
    nothing = torch.zeros(0, dtype=torch.float64)
    if training.epochs == 0 and training.max_steps is None:
        network.eval()
        return TrainingReport(nothing, 0, 0, 0.0, 0.0)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer_session(seed))
        stack.callback(network.eval)
        processes = Processes.current(network.device)
        folder, place = None, training.output_dir
        if place is not None:
            settings = {k: v for k, v in training.to_config().items() if k not in _INCIDENTAL}
            whole = {**identity, **{f"training.{k}": v for k, v in settings.items()}, "seed": seed}
            folder = RunFolder.open(place, json.loads(json.dumps(whole)), processes)
            if (finished := folder.finished(network)) is not None:
                return finished
        else:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bayesrm-"))
        arguments = trainer_arguments(
            training, place, checkpoints=folder is not None, seed=seed, progress=progress, device=network.device,
            processes=processes,
        )  # fmt: skip
        if arguments.device != network.device and processes.count == 1 and network.device.index not in (None, 0):
            raise ArgumentError(
                f"the network is on {network.device}; one process trains on the first GPU: choose it by "
                "CUDA_VISIBLE_DEVICES, and load with device='cuda'"
            )
        network.to(arguments.device)
        batches = RowBatches(
            lengths, batch_size=training.batch_size, group_by_length=training.group_by_length, seed=seed,
            step_size=max(1, arguments.world_size) * training.gradient_accumulation_steps,
        )  # fmt: skip
        loss = RowsLoss(network, loss_of, prior_loss, num_rows=len(lengths), num_batches=len(batches))
        trainer = JointTrainer(
            model=loss, args=arguments, train_dataset=batches, callbacks=list(training.callbacks),
            training=training, folder=folder,
        )  # fmt: skip
        if not progress:
            trainer.remove_callback(transformers.PrinterCallback)
        resumed_from = folder.latest() if folder is not None else None
        result = trainer.train(resume_from_checkpoint=resumed_from)
        finite = all(bool(p.isfinite().all()) for p in network.sites.values())
        if not (math.isfinite(float(result.training_loss)) and finite):
            raise EngineError(
                f"training diverged: the loss is {result.training_loss} and a weight may not be finite; lower "
                f"`learning_rate` ({training.learning_rate})"
            )
        state = trainer.state
        report = TrainingReport(
            latents=nothing,
            steps=state.global_step,
            planned_steps=state.max_steps,
            epochs=float(state.epoch or 0.0),
            seconds=time.perf_counter() - begin,
            log=tuple(entry for entry in state.log_history if "loss" in entry),
            stopped_early=state.global_step < state.max_steps,
            resumed_from=resumed_from,
        )
        if folder is not None:
            folder.finish(network, report)
        return report


class RowsLoss(torch.nn.Module):
    """The loss of a micro-batch: its average over the micro-batches of an epoch is that of the data, over N."""

    constant = 0.0

    def __init__(
        self, network: torch.nn.Module, loss_of: Callable[[Tensor, int], Tensor],
        prior_loss: Callable[[], Tensor] | None, *, num_rows: int, num_batches: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self._loss_of, self._prior_loss = loss_of, prior_loss
        self._num_rows, self._num_batches = num_rows, num_batches

    @property
    def beside(self) -> Tensor:
        """Nothing is trained beside the network's sites."""
        return torch.zeros(0, dtype=torch.float64)

    @beside.setter
    def beside(self, vector: Tensor) -> None:
        pass

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        """What the optimiser trains, with a learning rate of their own for latents."""
        network: Any = self.network
        sites = dict(network.sites)
        latents = sites.pop("latents", None)
        own = [] if latents is None else [{"params": [latents], "lr": training.latent_learning_rate}]
        return [{"params": list(sites.values())}, *own]

    def forward(self, rows: Tensor, number: int) -> Tensor:
        """The loss of the rows of micro-batch `number`, a scalar."""
        total = self._num_batches * self._loss_of(rows, number)
        prior = 0.0 if self._prior_loss is None else self._prior_loss()
        loss: Tensor = (prior + total) / self._num_rows
        return loss


class RowBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """The partition of the rows into micro-batches, drawn anew for each epoch from the seed and the epoch's number.

    Args:
        lengths: Length of each row.
        batch_size: Most rows of a batch.
        step_size: Batches that one step of the optimiser takes, on all processes together.
        group_by_length: Whether rows of similar length come together.
        seed: Seed of the order.

    Raises:
        ArgumentError: There are fewer rows than batches in one step.

    Example:
        >>> batches = RowBatches([5, 9, 7], batch_size=2, step_size=1, group_by_length=True, seed=0)
        >>> sorted(row for i in range(len(batches)) for row in batches[i]["rows"].tolist())
        [0, 1, 2]
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, step_size: int, group_by_length: bool, seed: int
    ) -> None:
        self.num_rows, self._seed = len(lengths), seed
        self._lengths, self._group_by_length = np.asarray(lengths), group_by_length
        (self._count,) = _batch_counts([len(lengths)], batch_size, step_size)
        self.set_epoch(0)

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Draws the partition of an epoch; accelerate calls this."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(self.num_rows)
        ends = np.cumsum([len(part) for part in np.array_split(order, self._count)])
        if self._group_by_length:
            window = max(1, min(_WINDOW, self._count // 4))
            for part in np.split(order, ends[window - 1 : -1 : window]):
                part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        parts = np.split(order, ends[:-1])
        self._epoch, self._parts = epoch, [parts[i] for i in rng.permutation(self._count)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = torch.from_numpy(np.ascontiguousarray(self._parts[index]))
        return {"rows": rows, "number": self._epoch * self._count + index}

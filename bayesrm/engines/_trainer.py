"""The declared log joint under `transformers.Trainer`: the loss as a module, and the run around it."""

import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState

from .._typing import Tensor
from ..backend import seeded
from ..errors import ArgumentError, EngineError
from ..programs import RewardModel
from ..rewards import LoRANetwork
from ._batches import MicroBatches
from ._density import FeedbackDensity, _weighted
from ._processes import Processes
from ._run_folder import RunFolder, load_state, save_state
from ._selected_batches import SelectedBatches
from .training import Objective, Training

_WEIGHTS = "weights.safetensors"


class JointLoss(torch.nn.Module):
    """The loss of a micro-batch: its average over the batches of an epoch is -(log joint)/N.

    Attributes:
        network: The network whose adapters and head are trained.
        latents: Unconstrained latents of the likelihood, shape `(Q,)`; `None` where it has none.
        constant: -(log normalising constant of the weights' prior)/N, a part of the loss.
    """

    def __init__(
        self, network: LoRANetwork, program: RewardModel, density: FeedbackDensity, *, num_rows: int, num_batches: int
    ) -> None:
        super().__init__()
        self.network = network
        start = density.initial_latents
        self.latents = torch.nn.Parameter(start.detach().clone()) if density.num_latents else None
        self._no_latents = start.new_zeros(0)
        self._num_rows, self._num_batches = num_rows, num_batches
        sites = network.sites
        precisions = [program.prior.of(site) for site in sites]
        sizes = [p.numel() for p in sites.values()]
        # Plain attributes: as buffers they would be broadcast between processes.
        self._center = torch.cat([network.initial[s].reshape(-1).to(p) for s, p in sites.items()])
        each = torch.tensor(precisions, dtype=torch.float64)
        self._precision = each.repeat_interleave(torch.tensor(sizes)).to(self._center)
        log_normaliser = sum(
            0.5 * n * math.log(precision / (2 * math.pi)) for n, precision in zip(sizes, precisions, strict=True)
        )
        self.constant = -log_normaliser / num_rows
        self.training = network.training

    @property
    def beside(self) -> Tensor:
        """What is trained beside the network's weights, in one vector, float64, on the CPU: the latents, `(Q,)`."""
        latents = self._no_latents if self.latents is None else self.latents
        return latents.detach().cpu().clone()

    @beside.setter
    def beside(self, vector: Tensor) -> None:
        if self.latents is not None:
            with torch.no_grad():
                self.latents.copy_(vector)

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        """What the optimiser trains, with learning rates that differ from the weights'."""
        groups: list[dict[str, Any]] = [{"params": list(self.network.sites.values())}]
        if self.latents is not None:
            groups.append({"params": [self.latents], "lr": training.latent_learning_rate})
        return groups

    def train(self, mode: bool = True) -> "JointLoss":
        """Sets the mode; the Trainer asks for it before every micro-batch, and the modules are many."""
        if mode != self.training or mode != self.network.training:
            super().train(mode)
        return self

    def forward(self, sequences: Mapping[str, Tensor], places: Tensor, feedback: FeedbackDensity) -> Tensor:
        """The loss, a float64 scalar.

        Args:
            sequences: Collated items of the batch.
            places: Which of them each row compares, shape `(rows, K)`.
            feedback: The rows, and rows of other kinds that complete the latents' prior.
        """
        rewards = self.network(**sequences)[places].double()
        latents = self._no_latents if self.latents is None else self.latents
        others = [latents.new_zeros(g.items.shape) for g in feedback.groups[1:]]
        distributions, log_prior = feedback.distributions([rewards, *others], latents)
        rows = feedback.groups[0]
        total = _weighted(distributions[0].log_prob(rows.outcome), rows.weight).sum()
        away = torch.cat([p.reshape(-1) for p in self.network.sites.values()]) - self._center
        pull = 0.5 * (self._precision * away.square()).sum(dtype=torch.float64)
        return (pull - log_prior - self._num_batches * total) / self._num_rows + self.constant


class JointTrainer(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for a `JointLoss` on `MicroBatches`; it averages over accumulation and processes."""

    loss_is_scaled_for_ga = False
    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, training: Training, folder: RunFolder | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._training, self._folder = training, folder

    def get_train_dataloader(self) -> Any:
        """Batches in the order of the partition, dealt out to the processes one by one."""
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)
        return self.accelerator.prepare(loader)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of an epoch."""
        return int(self.train_dataset.num_rows)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss less its constant, so that the Trainer's float32 sums keep their digits; `log` puts it back."""
        loss = model(**inputs) - self.model.constant
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments, with a learning rate for the latents of their own."""
        if self.optimizer is None:
            loss = self.model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, loss)
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or "params" in settings:
                raise ArgumentError(
                    f"`arguments` sets optim={self.args.optim!r}, which cannot train a LoRA reward here"
                )
            groups = loss.parameter_groups(self._training)
            self.optimizer = kind([group | {"weight_decay": 0.0} for group in groups], **settings)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the loss with its constant, and stops a run that has diverged."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise EngineError(
                    f"training diverged: the loss is {logs['loss']} after step {self.state.global_step}; lower "
                    f"`learning_rate` ({self._training.learning_rate}) or `latent_learning_rate` "
                    f"({self._training.latent_learning_rate})"
                )
            bare = logs["loss"]
            logs = {"loss": bare + self.model.constant, "loss_without_constants": bare} | {
                k: v for k, v in logs.items() if k != "loss"
            }
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_state(folder / _WEIGHTS, self.model.network, self.model.beside)
            if isinstance(self.train_dataset, SelectedBatches):
                self.train_dataset.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.beside = load_state(Path(resume_from_checkpoint) / _WEIGHTS, self.model.network)
        if isinstance(self.train_dataset, SelectedBatches):
            self.train_dataset.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._folder is not None:
            checkpoint = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            self._folder.complete(checkpoint, self._training.save_total_limit)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a Trainer run; attributes as in `TrainingReport`, `loss` is the average over the run."""

    latents: Tensor
    steps: int
    planned_steps: int
    epochs: float
    loss: float
    log: Sequence[Mapping[str, float]]
    resumed_from: str | None
    unselected: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class TrainerRun:
    """One call of the Trainer, in random state and process-wide settings of its own; made by `open`."""

    network: LoRANetwork
    training: Training
    seed: int
    progress: bool
    processes: Processes

    @classmethod
    @contextlib.contextmanager
    def open(cls, network: LoRANetwork, training: Training, *, seed: int, progress: bool) -> Iterator["TrainerRun"]:
        """Inside the block the Trainer may seed, log and set up processes; afterwards all is as before."""
        with trainer_session(seed):
            try:
                yield cls(network, training, seed, progress, Processes.current(network.device))
            finally:
                network.eval()

    def train(
        self,
        program: RewardModel,
        density: FeedbackDensity,
        sequences: Sequence[np.ndarray],
        place: str,
        folder: RunFolder | None,
        *,
        num_rows: int,
        objective: Objective | None = None,
    ) -> Outcome:
        """Trains the network in place; `num_rows` is N, `place` is where the Trainer may write."""
        network, training = self.network, self.training
        arguments = trainer_arguments(
            training, place, checkpoints=folder is not None, seed=self.seed, progress=self.progress,
            device=network.device, processes=self.processes,
        )  # fmt: skip
        device = arguments.device
        if device != network.device and self.processes.count == 1 and network.device.index not in (None, 0):
            raise ArgumentError(
                f"the network is on {network.device}; one process trains on the first GPU: choose it by "
                "CUDA_VISIBLE_DEVICES, and load with device='cuda'"
            )
        network.to(device)
        if density.initial_latents.device != network.device:
            density = FeedbackDensity(program, [g.map_arrays(lambda a: a.to(device)) for g in density.groups])
        step_size = max(1, arguments.world_size) * training.gradient_accumulation_steps
        if training.sample_selection is not None:
            batches: MicroBatches = SelectedBatches(
                network, density, sequences, training=training, step_size=step_size, seed=self.seed,
                processes=self.processes,
            )  # fmt: skip
        else:
            batches = MicroBatches(
                network, density, sequences, batch_size=training.batch_size, seed=self.seed, step_size=step_size,
                group_by_length=training.group_by_length, numbered=objective is not None,
            )  # fmt: skip
        make_loss = JointLoss if objective is None else objective.loss
        loss = make_loss(network, program, density, num_rows=num_rows, num_batches=len(batches))
        if isinstance(batches, SelectedBatches):
            batches.observe(loss.latents)
        trainer = JointTrainer(
            model=loss, args=arguments, train_dataset=batches, callbacks=list(training.callbacks),
            training=training, folder=folder,
        )  # fmt: skip
        if not self.progress:
            trainer.remove_callback(transformers.PrinterCallback)
        resumed_from = folder.latest() if folder is not None else None
        result = trainer.train(resume_from_checkpoint=resumed_from)
        state = trainer.state
        return Outcome(
            latents=loss.beside,
            steps=state.global_step,
            planned_steps=state.max_steps,
            epochs=float(state.epoch or 0.0),
            loss=float(result.training_loss),
            log=state.log_history,
            resumed_from=resumed_from,
            unselected=batches.unselected if isinstance(batches, SelectedBatches) else None,
        )


def trainer_arguments(
    training: Training, place: str, *, checkpoints: bool, seed: int, progress: bool, device: torch.device,
    processes: Processes,
) -> transformers.TrainingArguments:  # fmt: skip
    """What `transformers.Trainer` gets of the settings; it may write into the folder `place`.

    Raises:
        ArgumentError: transformers refuses a setting.
    """
    t = training
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for name in t.arguments:
        if name not in known:
            raise ArgumentError(
                f"`arguments` sets {name!r}, which the installed transformers does not know as a training argument"
            )
    strategy = "no" if not checkpoints else "epoch" if t.save_steps is None else "steps"
    settings: dict[str, Any] = {
        "output_dir": place,
        "per_device_train_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "num_train_epochs": t.epochs,
        "max_steps": -1 if t.max_steps is None else t.max_steps,
        "learning_rate": t.learning_rate,
        "lr_scheduler_type": t.schedule,
        # A value below 1 is a share of the steps.
        "warmup_steps": t.warmup_ratio,
        "weight_decay": 0.0,
        "max_grad_norm": t.max_grad_norm,
        "bf16": t.bf16,
        "save_strategy": strategy,
        "save_steps": t.save_steps or 500,
        # Older checkpoints go only once the new one is whole, see `RunFolder.complete`.
        "save_total_limit": None,
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": t.logging_steps,
        # Its check of every micro-batch would make the CPU wait for the device; `log` looks at the loss instead.
        "logging_nan_inf_filter": False,
        "report_to": list(t.report_to) or "none",
        "disable_tqdm": not progress,
        "log_level": "passive" if progress else "error",
        "log_level_replica": "error",
        "seed": seed % 2**32,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = transformers.TrainingArguments(**(settings | dict(t.arguments)))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"transformers refuses these settings of Training: {error}") from error
    if processes.count == 1 and arguments.n_gpu > 1:
        # Otherwise the Trainer would spread each batch over all visible GPUs by DataParallel.
        arguments._n_gpu = 1
    return arguments


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]


@contextlib.contextmanager
def trainer_session(seed: int) -> Iterator[None]:
    """Inside the block the Trainer may seed, log and set up processes; afterwards all is as before."""
    with seeded(seed), _kept_generators(), _kept_accelerate_state(), _kept_verbosity():
        yield


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """Puts back the generators of Python and NumPy, which the Trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the state that the Trainer sets)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _kept_verbosity() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _kept_accelerate_state() -> Iterator[None]:
    """Puts back accelerate's record of the process, which the Trainer replaces; that of several processes stays."""
    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            for state, values in zip(states, before, strict=True):
                state._shared_state.clear()
                state._shared_state.update(values)

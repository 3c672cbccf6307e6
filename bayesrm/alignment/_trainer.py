"""Rounds of alignment under `transformers.Trainer`: an epoch is a round, and its data are drawn when it begins."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ..engines._run_folder import RunFolder
from ..engines.response_posterior import ResponsePosterior
from ..engines.training import Training
from ..errors import ArgumentError, EngineError
from ..rewards._tokens import TokenSequences
from ._round import Round, by_prompt
from ._rounds import Rounds
from .method import Method
from .policy import Policy
from .projections import RewardedTokens, TokenPaths


class RoundBatches(torch.utils.data.Dataset[Tensor]):
    """The micro-batches of a round, by the places of their prompts; every prompt once a pass.

    Args:
        num_prompts: Prompts of a round.
        batch_size: Most prompts of a micro-batch.
        passes: Passes over the round.
        step_size: Micro-batches of one step of the optimiser, on all processes.
        seed: Seed of the order.
    """

    def __init__(self, num_prompts: int, *, batch_size: int, passes: int, step_size: int, seed: int) -> None:
        self.num_rows, self._passes, self._seed = num_prompts, passes, seed
        count = -(-num_prompts // batch_size)
        self.per_pass = -(-count // step_size) * step_size
        if self.per_pass > num_prompts:
            raise ArgumentError(
                f"one step takes {step_size} micro-batches (processes x `gradient_accumulation_steps`), more than the "
                f"{num_prompts} prompts of a round can fill; lower `gradient_accumulation_steps` or draw more prompts"
            )
        self.begin(0, np.zeros(num_prompts))

    def __len__(self) -> int:
        return self._passes * self.per_pass

    def begin(self, number: int, lengths: np.ndarray) -> None:
        """Deals the prompts of a round out to micro-batches, prompts with candidates of similar length together."""
        rng = np.random.default_rng([self._seed, number])
        self._batches: list[np.ndarray] = []
        for _ in range(self._passes):
            # Noise of a tenth of the length, so that passes and rounds mix their prompts.
            order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)), kind="stable")
            parts = np.array_split(order, self.per_pass)
            self._batches += [parts[i] for i in rng.permutation(self.per_pass)]

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._batches[index]))


class ProjectionLoss(torch.nn.Module):
    """The loss of a micro-batch of prompts; its average over the micro-batches of a pass is that over the prompts."""

    def __init__(self, policy: Policy, method: Method, per_pass: int) -> None:
        super().__init__()
        self.network = policy.model
        self._policy, self._method, self._per_pass = policy, method, per_pass
        self._round: Round | None = None
        self._posterior: ResponsePosterior | None = None

    def begin(self, found: Round, posterior: ResponsePosterior) -> None:
        """From now on the places of prompts mean those of this round."""
        self._round, self._posterior = found, posterior

    def train(self, mode: bool = True) -> "ProjectionLoss":
        """Keeps evaluation mode: there is no dropout, and draws and gradients are of the same distribution."""
        return super().train(False)

    def forward(self, places: Tensor) -> Tensor:
        """The loss, a scalar; `places` are those of the prompts in the round, shape `(b,)`."""
        assert self._round is not None
        assert self._posterior is not None
        found, rows = self._round, places.cpu()
        posterior = _part(self._posterior, rows, self._policy.device)
        sequences, mask = found.sequences_of(rows.tolist()), found.candidates.mask[rows]
        policy: Any
        if self._method.needs_tokens:
            log_probs, normalisers, tokens, values, fixed = self._along(
                sequences, mask, (found.target_values, found.target_log_probs), rows
            )
            policy = TokenPaths(log_probs, values, tokens, normalisers, fixed)
        elif self._method.needs_token_rewards:
            log_probs, _, tokens, rewards, reference = self._along(
                sequences, mask, (found.token_rewards, found.token_reference), rows
            )
            policy = RewardedTokens(log_probs, reference, rewards, tokens)
        else:
            policy = by_prompt(self._policy.log_probs(sequences), mask)
        losses = self._method.loss(policy, posterior)
        return losses.sum() * self._per_pass / len(found.prompts)

    def _along(
        self, sequences: TokenSequences, mask: Tensor, fixed: Sequence[Tensor | None], rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Log-probabilities, log-normalisers and mask of tokens, and what is fixed about them, all `(b, n, T)`."""
        tokens = self._policy.token_log_probs(sequences)
        found = [by_prompt(part, mask) for part in (tokens.log_probs, tokens.log_normalisers, tokens.mask)]
        for values in fixed:
            assert values is not None
            found.append(values[rows, :, : tokens.log_probs.shape[1]].to(tokens.log_probs))
        return tuple(found)


def _part(posterior: ResponsePosterior, rows: Tensor, device: torch.device) -> ResponsePosterior:
    """Some prompts of a posterior, on the policy's device."""
    candidates = posterior.candidates.select(rows).to(device)
    parts = {
        name: getattr(posterior, name)[rows].to(device)
        for name in ("log_density", "log_weights", "log_evidence", "k_hat")
    }
    return dataclasses.replace(posterior, candidates=candidates, **parts)


class RoundTrainer(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on a `ProjectionLoss`; averages over accumulation and processes."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, rounds: Rounds, training: Training, folder: RunFolder | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rounds, self._training, self._folder = rounds, training, folder

    def get_train_dataloader(self) -> Any:
        """Micro-batches in the order of the round, dealt out to the processes one by one."""
        loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)
        return self.accelerator.prepare(loader)

    def num_examples(self, dataloader: Any) -> int:
        """Prompts of a round."""
        return int(self.train_dataset.num_rows)

    def begin_round(self) -> None:
        """Draws and weighs the candidates of the round that now begins, and logs what they look like."""
        number, done = divmod(self.state.global_step, self._steps_per_round)
        step = number * self._steps_per_round
        found, posterior, report = self._rounds.begin(number, step, inside=done > 0)
        lengths = by_prompt(torch.from_numpy(found.sequences.lengths), found.candidates.mask)
        self.train_dataset.begin(number, lengths.amax(1).numpy())
        self.model.begin(found, posterior)
        numbers = {k: float(v) for k, v in report.summary().items() if isinstance(v, int | float) and k != "step"}
        self.log({name: number for name, number in numbers.items() if math.isfinite(number)})

    @property
    def _steps_per_round(self) -> int:
        step_size: int = self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        return len(self.train_dataset) // step_size

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch."""
        loss = model(inputs["places"])
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and stops a run that has diverged."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise EngineError(
                f"training diverged: the loss is {logs['loss']} after step {self.state.global_step}; lower "
                f"`learning_rate` ({self._training.learning_rate})"
            )
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._rounds.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._rounds.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._folder is not None:
            checkpoint = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            self._folder.complete(checkpoint, self._training.save_total_limit)
            self._rounds.prune(self._steps_per_round)


class BeginRound(transformers.TrainerCallback):  # type: ignore[misc]
    """Begins a round with each epoch."""

    def __init__(self) -> None:
        self.trainer: RoundTrainer | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws the round's candidates."""
        assert self.trainer is not None
        self.trainer.begin_round()


def _only(batch: list[Tensor]) -> dict[str, Tensor]:
    return {"places": batch[0]}

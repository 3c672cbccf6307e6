"""`align`: moves a policy towards a target, round by round."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from ..data.rendering import Content
from ..engines._processes import Processes
from ..engines.training import Training
from ..errors import ArgumentError, EngineError
from ..rewards._checks import check_integer
from ._propose import Proposer, check_given
from ._scoring import Predicts, Preferences, Reward
from ._weights import Snapshot
from .method import Method
from .monitor import Budget, RoundReport
from .policy import Policy

if TYPE_CHECKING:
    from ..engines._run_folder import RunFolder
    from ._trainer import Rounds, RoundTrainer

_FINISHED, _TRAINED = "finished.json", "trained.safetensors"
#: Settings that leave the weights at each step as they are.
_INCIDENTAL = ("output_dir", "save_steps", "save_total_limit", "logging_steps", "callbacks", "report_to")
#: Settings of `Training` that say nothing here.
_UNUSED = {"max_steps": None, "sample_selection": None}


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """What a run of `align` did.

    Attributes:
        rounds: What each round's candidates looked like, the last one's if the budget stopped it there too.
        steps: Steps of the optimiser.
        stopped: Why the run ended before its last round, in words; `None` where it did not.
        seconds: Wall time of the call; of a finished run that was loaded, of the call that finished it.
        log: Entries of the Trainer's log with a loss.
        resumed_from: Checkpoint from which an interrupted run went on, or the folder of a finished run.
    """

    rounds: tuple[RoundReport, ...]
    steps: int
    stopped: str | None
    seconds: float
    log: tuple[Mapping[str, float], ...] = ()
    resumed_from: str | None = None


def align(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Content],
    *,
    method: Method,
    rounds: int = 10,
    prompts_per_round: int | None = None,
    training: Training | None = None,
    preferences: Preferences | None = None,
    candidates: Sequence[Sequence[str]] | None = None,
    temperature: float = 1.0,
    generation_batch: int = 64,
    budget: Budget | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AlignmentReport:
    """Moves a policy, in place, towards the target of a method.

    A round draws candidates for its prompts, scores them by the reward belief, weighs them by the target, and takes
    steps on the projection's loss. With `training.output_dir` the candidates and checkpoints are kept there, and the
    same call goes on where an interrupted run stopped, also in the middle of a round. The run may be spread over
    devices with `torchrun` or `accelerate launch`; each then needs room for the whole policy.

    Args:
        policy: The policy; its `reference` is p0.
        reward: A posterior over rewards, or a function with the arguments of its `predict`. A run that is resumed knows
            a posterior by its tensors, and a function by its name and code, not by what it refers to.
        prompts: Prompts, strings or lists of messages.
        method: Target, projection and proposal, for instance `inference/alignment/brain.py`.
        rounds: Rounds.
        prompts_per_round: Prompts of a round; all by default. All prompts are taken in turn.
        training: Settings of the optimiser. `batch_size` counts prompts, with all their candidates, on one device;
            `epochs` the passes over a round (a whole number, 1 by default). `max_steps` and `sample_selection` have no
            meaning here.
        preferences: P(i preferred to j) of the candidates of prompts, for preference games; by default those that the
            rewards imply.
        candidates: Responses to every prompt that are taken instead of draws, `method.num_candidates` each; they count
            as draws of the reference policy. Nothing is generated then.
        temperature: Temperature at which candidates are drawn; their weights take it into account.
        generation_batch: Responses drawn side by side.
        budget: When to stop early.
        seed: Seed of the draws and of the order. No global random state is touched.
        progress: Show a progress bar and the log.

    Raises:
        ArgumentError: The arguments do not fit together.
        EngineError: Training diverged.
        PersistenceError: `output_dir` holds another run, or cannot be written.

    Example:
        >>> from bayesrm.alignment import align  # see tutorials/brain_with_an_uncertain_reward.ipynb
    """
    training = Training(epochs=1.0, batch_size=4) if training is None else training
    per_round = _checked(policy, reward, prompts, method, rounds, prompts_per_round, training, candidates, budget)
    from ..engines._run_folder import RunFolder
    from ..engines._trainer import trainer_session
    from ._trainer import BudgetReached, Rounds

    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer_session(seed))
        processes = Processes.current(policy.device)
        folder, place = None, training.output_dir
        if place is not None:
            identity = _identity(
                policy, reward, prompts, method, rounds, per_round, training, candidates, temperature, budget, seed
            )
            folder = RunFolder.open(place, identity, processes)
            if (finished := _finished(folder, policy)) is not None:
                return finished
        else:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bayesrm-"))
        proposer = Proposer(
            policy, method, reward, preferences, candidates, temperature, generation_batch, processes
        )  # fmt: skip
        state = Rounds(policy, method, proposer, prompts, per_round, seed, budget, folder)
        trainer = _trainer(state, training, place, processes, rounds, seed=seed, progress=progress)
        resumed_from = folder.latest() if folder is not None else None
        stopped = None
        try:
            trainer.train(resume_from_checkpoint=resumed_from)
        except BudgetReached as reached:
            stopped = str(reached)
        policy.model.eval()
        policy.model.zero_grad(set_to_none=True)
        if not all(bool(p.isfinite().all()) for p in policy.trainable.values()):
            raise EngineError(
                f"training diverged: a weight is not finite; lower `learning_rate` ({training.learning_rate})"
            )
        steps = trainer.state.global_step
        if stopped is None and steps < trainer.state.max_steps:
            stopped = "a callback asked for it"
        report = AlignmentReport(
            rounds=tuple(state.reports),
            steps=steps,
            stopped=stopped,
            seconds=time.perf_counter() - begin,
            log=tuple(entry for entry in trainer.state.log_history if "loss" in entry),
            resumed_from=resumed_from,
        )
        if folder is not None:
            _finish(folder, policy, report)
        return report


def _trainer(
    state: "Rounds", training: Training, place: str, processes: Processes, rounds: int, *, seed: int, progress: bool
) -> "RoundTrainer":
    import transformers

    from ..engines._trainer import trainer_arguments
    from ._trainer import BeginRound, ProjectionLoss, RoundBatches, RoundTrainer

    policy = state.policy
    arguments = trainer_arguments(
        dataclasses.replace(training, epochs=float(rounds)), place, checkpoints=state.folder is not None, seed=seed,
        progress=progress, device=policy.device, processes=processes,
    )  # fmt: skip
    if arguments.device != policy.device and processes.count == 1 and policy.device.index not in (None, 0):
        raise ArgumentError(
            f"the policy is on {policy.device}; one process trains on the first GPU: choose it by CUDA_VISIBLE_DEVICES"
        )
    policy.model.to(arguments.device)
    batches = RoundBatches(
        state.per_round,
        batch_size=training.batch_size,
        passes=int(training.epochs),
        step_size=max(1, arguments.world_size) * training.gradient_accumulation_steps,
        seed=seed,
    )
    begin_round = BeginRound()
    trainer = RoundTrainer(
        model=ProjectionLoss(policy, state.method, batches.per_pass), args=arguments, train_dataset=batches,
        callbacks=[begin_round, *training.callbacks], rounds=state, training=training, folder=state.folder,
    )  # fmt: skip
    begin_round.trainer = trainer
    if not progress:
        trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _checked(
    policy: Policy, reward: Reward, prompts: Sequence[Content], method: Method, rounds: int,
    prompts_per_round: int | None, training: Training, candidates: Sequence[Sequence[str]] | None,
    budget: Budget | None,
) -> int:  # fmt: skip
    """Prompts of a round, once all arguments fit together."""
    if not isinstance(policy, Policy):
        raise ArgumentError(f"`policy` is a {type(policy).__name__}; make one by Policy.from_pretrained(...)")
    if not isinstance(method, Method):
        raise ArgumentError(f"`method` is {method!r}; it is a Method(...)")
    if isinstance(reward, type) or not (isinstance(reward, Predicts) or callable(reward)):
        raise ArgumentError(f"`reward` is {reward!r}; it is a posterior, or a function like its `predict`")
    if isinstance(prompts, str) or not len(prompts):
        raise ArgumentError("`prompts` must be a list of at least one prompt")
    if not isinstance(budget, Budget | None):
        raise ArgumentError(f"`budget` is {budget!r}; it is a Budget(...) or None")
    check_integer("rounds", rounds, 1)
    per_round = len(prompts) if prompts_per_round is None else prompts_per_round
    check_integer("prompts_per_round", per_round, 1)
    if not isinstance(training, Training):
        raise ArgumentError(f"`training` is {training!r}; it is a Training(...)")
    if training.epochs != int(training.epochs) or training.epochs < 1:
        raise ArgumentError(f"`training.epochs` is {training.epochs}; a round takes a whole number of passes")
    for name, unset in _UNUSED.items():
        if getattr(training, name) != unset:
            raise ArgumentError(f"`training` sets `{name}`, which has no meaning for rounds; use `rounds` and `epochs`")
    if not policy.trainable:
        raise ArgumentError("`policy` has no trainable weights; load it whole, or with `lora`")
    if candidates is not None:
        check_given(candidates, prompts, method)
    return per_round


def _identity(
    policy: Policy, reward: Reward, prompts: Sequence[Content], method: Method, rounds: int, per_round: int,
    training: Training, candidates: Sequence[Sequence[str]] | None, temperature: float, budget: Budget | None,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What decides the outcome of a run, as a flat mapping of JSON values."""
    digest = xxhash.xxh3_128()
    for snapshot in (policy.snapshot(device="cpu"), policy.reference):
        for name, value in sorted(snapshot.values.items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    texts = xxhash.xxh3_128_hexdigest(json.dumps([list(prompts), candidates]).encode())
    settings = {k: v for k, v in training.to_config().items() if k not in _INCIDENTAL}
    return {
        "policy": str(digest.hexdigest()),
        "limits": [policy.max_prompt_tokens, policy.max_new_tokens],
        "reward": _reward_identity(reward),
        "prompts": texts,
        # Functions print with their address, which differs from one process to the next.
        "method": _described(method),
        "rounds": rounds,
        "prompts_per_round": per_round,
        "temperature": temperature,
        "budget": _described(budget),
        "seed": seed,
    } | {f"training.{name}": value for name, value in settings.items()}


def _reward_identity(reward: Any) -> str:
    """A name for the reward that stays the same in another process, with a digest of a posterior's tensors."""
    state = getattr(reward, "_state", None)
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    digest = xxhash.xxh3_128()
    if not callable(state):
        code = getattr(reward, "__code__", None)
        if code is None:
            return str(name)
        digest.update(code.co_code + repr([c for c in code.co_consts if not hasattr(c, "co_code")]).encode())
        return f"{name} {digest.hexdigest()}"
    for key, value in sorted(state().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return f"{name} {digest.hexdigest()}"


def _described(value: Any) -> Any:
    """Nested settings as JSON values; functions by their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"": type(value).__qualname__} | parts
    if isinstance(value, list | tuple):
        return [_described(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _finish(folder: "RunFolder", policy: Policy, report: AlignmentReport) -> None:
    """Writes the final weights, then the report, which makes them count."""
    from ..engines._run_folder import _write_json

    if folder.processes.index == 0:
        policy.snapshot().save(folder.path / _TRAINED)
        values = dataclasses.asdict(report) | {"log": [dict(entry) for entry in report.log]}
        _write_json(folder.path / _FINISHED, values)
    folder.processes.wait()


def _finished(folder: "RunFolder", policy: Policy) -> AlignmentReport | None:
    """The report of a finished run, whose weights are put into the policy; `None` where there is none."""
    from ..engines._run_folder import _read_json

    file = Path(folder.path) / _FINISHED
    if not file.exists():
        return None
    policy.assign(Snapshot.load(folder.path / _TRAINED))
    stored = _read_json(file)
    rounds = tuple(RoundReport(**values) for values in stored.pop("rounds"))
    stored |= {"log": tuple(stored["log"]), "resumed_from": str(folder.path)}
    return AlignmentReport(rounds=rounds, **stored)

"""`align`: moves a policy towards a target, round by round."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data.rendering import Content
from ..engines._processes import Processes
from ..engines.training import Training
from ..errors import ArgumentError, EngineError
from ..rewards._checks import check_integer
from ._propose import Proposer, check_given
from ._report import AlignmentReport, finish, load_finished
from ._run_identity import run_identity
from ._scoring import Predicts, Preferences, Reward
from ._token_rewards import PredictsTokens
from .method import Method
from .monitor import Budget
from .policy import Policy

if TYPE_CHECKING:
    from ._rounds import Rounds
    from ._trainer import RoundTrainer

#: Settings of `Training` that say nothing here.
_UNUSED = {"max_steps": None, "sample_selection": None}


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
    candidate_log_probs: Sequence[Sequence[float]] | None = None,
    temperature: float = 1.0,
    generation_batch: int = 64,
    budget: Budget | None = None,
    keep_rounds: int | None = 0,
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
        reward: A posterior over rewards, or a function with the arguments of its `predict`; one that predicts tokens
            where the method's projection takes their rewards. A run that is resumed knows a posterior by its tensors,
            and a function by its name and code, not by what it refers to.
        prompts: Prompts, strings or lists of messages.
        method: Target, projection and proposal, for instance `inference/alignment/brain.py`.
        rounds: Rounds.
        prompts_per_round: Prompts of a round; all by default. All prompts are taken in turn.
        training: Settings of the optimiser. `batch_size` counts prompts, with all their candidates, on one device;
            `epochs` the passes over a round (a whole number, 1 by default). `max_steps` and `sample_selection` have no
            meaning here.
        preferences: P(i preferred to j) of the candidates of prompts, for preference games; by default those that the
            rewards imply.
        candidates: Responses to every prompt that are taken instead of draws, as many for each as there are; losses of
            pairs and with baselines need 2, some methods a given number. Nothing is generated then.
        candidate_log_probs: Their log-probabilities under what drew them, as `bayesrm propose` writes them; without,
            they count as draws of the reference policy.
        temperature: Temperature at which candidates are drawn; their weights take it into account.
        generation_batch: Responses drawn side by side.
        budget: When to stop early. The policy stays as it was when it exceeded a limit.
        keep_rounds: Files with the candidates of rounds that stay in `training.output_dir` although no resuming needs
            them, the last ones; `None` for all.
        seed: Seed of the draws and of the order. No global random state is touched.
        progress: Show a progress bar and the log.

    A response without words, of which nothing can be believed, counts as its prompt's response with the lowest mean
    reward, and as 0 where none has words. An interrupted call leaves the policy as it was given.

    Raises:
        ArgumentError: The arguments do not fit together.
        DataError: A given response is longer than the policy may write.
        EngineError: Training diverged.
        PersistenceError: `output_dir` holds another run, or cannot be written.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> import transformers, bayesrm as brm
        >>> raw = Tokenizer(models.WordLevel({"<eos>": 0, "no": 1, "yes": 2, "why": 3}, unk_token="why"))
        >>> raw.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
        >>> config = transformers.GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=16,
        ...                                  bos_token_id=0, eos_token_id=0)
        >>> policy = Policy(transformers.GPT2LMHeadModel(config), tokenizer, max_prompt_tokens=8, max_new_tokens=4)
        >>> def counts_yes(prompts, candidates):  # a posterior in earnest
        ...     mean = torch.zeros(len(candidates), max(map(len, candidates)))
        ...     for row, texts in enumerate(candidates):
        ...         mean[row, : len(texts)] = torch.tensor([float(t.split().count("yes")) for t in texts])
        ...     return brm.RewardBelief(mean, torch.zeros(*mean.shape, 1))
        >>> brain = Method(brm.GoodnessPosterior(), brm.alignment.projections.ListwiseCrossEntropy())
        >>> report = align(policy, counts_yes, ["why"], method=brain, rounds=2,
        ...                training=brm.Training(epochs=1.0, batch_size=1))
        >>> report.steps, len(report.rounds), abs(report.rounds[0].kl_to_reference) < 1e-5
        (2, 2, True)
    """
    training = Training(epochs=1.0, batch_size=4) if training is None else training
    per_round = _checked(policy, reward, prompts, method, rounds, prompts_per_round, keep_rounds, training, budget)
    if candidates is not None:
        check_given(candidates, candidate_log_probs, prompts, method)
    from ..engines._run_folder import RunFolder
    from ..engines._trainer import trainer_session
    from ._rounds import BudgetReached, Rounds, prune_rounds

    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer_session(seed))
        processes = Processes.current(policy.device)
        folder, place = None, training.output_dir
        if place is not None:
            identity = run_identity(
                policy, place=Path(place), training=training, prompts=list(prompts), candidates=candidates,
                candidate_log_probs=candidate_log_probs, reward=reward, preferences=preferences, method=method,
                rounds=rounds, prompts_per_round=per_round, temperature=temperature, budget=budget, seed=seed,
            )  # fmt: skip
            folder = RunFolder.open(place, identity, processes)
            if (finished := load_finished(folder, policy)) is not None:
                return finished
        else:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="bayesrm-"))
        proposer = Proposer(
            policy, method, reward, preferences, candidates, candidate_log_probs, temperature, generation_batch,
            processes,
        )  # fmt: skip
        state = Rounds(policy, method, proposer, prompts, per_round, seed, budget, folder, keep_rounds)
        trainer = _trainer(state, training, place, processes, rounds, seed=seed, progress=progress)
        resumed_from = folder.latest() if folder is not None else None
        start, stopped = policy.snapshot(), None
        try:
            trainer.train(resume_from_checkpoint=resumed_from)
        except BudgetReached as reached:
            stopped = str(reached)
        except BaseException:
            # The same call, with the same policy object, then finds the run that it began.
            policy.assign(start)
            raise
        policy.model.eval()
        policy.model.zero_grad(set_to_none=True)
        if not all(bool(p.isfinite().all()) for p in policy.trainable.values()):
            raise EngineError(
                f"training diverged: a weight is not finite; lower `learning_rate` ({training.learning_rate})"
            )
        steps = trainer.state.global_step
        if stopped is None and steps < trainer.state.max_steps:
            stopped = "a callback asked for it"
        if stopped is None:
            state.read_earlier(rounds)
        final = state.reports[-1] if state.exceeded else state.measure(rounds, steps)
        report = AlignmentReport(
            rounds=tuple(state.reports),
            final=final,
            steps=steps,
            stopped=stopped,
            seconds=time.perf_counter() - begin,
            log=tuple(entry for entry in trainer.state.log_history if "loss" in entry),
            resumed_from=resumed_from,
        )
        if folder is not None:
            finish(folder, policy, report)
            # Every process has read the last round by now.
            prune_rounds(folder, keep_rounds)
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
    prompts_per_round: int | None, keep_rounds: int | None, training: Training, budget: Budget | None,
) -> int:  # fmt: skip
    """Prompts of a round, once all arguments fit together."""
    if not isinstance(policy, Policy):
        raise ArgumentError(f"`policy` is a {type(policy).__name__}; make one by Policy.from_pretrained(...)")
    if not isinstance(method, Method):
        raise ArgumentError(f"`method` is {method!r}; it is a Method(...)")
    if isinstance(reward, type) or not (isinstance(reward, Predicts) or callable(reward)):
        raise ArgumentError(f"`reward` is {reward!r}; it is a posterior, or a function like its `predict`")
    if method.needs_token_rewards and not isinstance(reward, PredictsTokens):
        raise ArgumentError(
            f"`reward` is a {type(reward).__name__}, which does not predict rewards of tokens, and "
            f"{type(method.projection).__name__} takes them; give a posterior with `predict_tokens`, such as that of "
            "InverseRL, or a projection of whole responses"
        )
    if isinstance(prompts, str) or not len(prompts):
        raise ArgumentError("`prompts` must be a list of at least one prompt")
    if not isinstance(budget, Budget | None):
        raise ArgumentError(f"`budget` is {budget!r}; it is a Budget(...) or None")
    check_integer("rounds", rounds, 1)
    per_round = len(prompts) if prompts_per_round is None else prompts_per_round
    check_integer("prompts_per_round", per_round, 1)
    if keep_rounds is not None:
        check_integer("keep_rounds", keep_rounds, 0)
    if not isinstance(training, Training):
        raise ArgumentError(f"`training` is {training!r}; it is a Training(...)")
    if training.epochs != int(training.epochs) or training.epochs < 1:
        raise ArgumentError(f"`training.epochs` is {training.epochs}; a round takes a whole number of passes")
    for name, unset in _UNUSED.items():
        if getattr(training, name) != unset:
            raise ArgumentError(f"`training` sets `{name}`, which has no meaning for rounds; use `rounds` and `epochs`")
    if not policy.trainable:
        raise ArgumentError("`policy` has no trainable weights; load it whole, or with `lora`")
    half = [name for name, p in policy.trainable.items() if p.dtype not in (torch.float32, torch.float64)]
    if half:
        raise ArgumentError(
            f"`policy` has trainable weights in half precision ({half[0]}), which small steps would leave as they are; "
            "load it in float32 and compute in bfloat16 by Training(bf16=True), or train adapters (lora=...)"
        )
    return per_round

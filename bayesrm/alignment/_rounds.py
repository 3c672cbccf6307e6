"""The rounds of a run: each is made when it begins, or found on disk, and goes when no resuming needs it any more."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.rendering import Content
from ..engines._run_folder import RunFolder, _read_json, _write_json
from ..engines.response_posterior import ResponsePosterior
from ..errors import PersistenceError
from ._propose import Proposer
from ._round import Round
from ._weights import Snapshot
from .method import Method
from .monitor import Budget, RoundReport
from .policy import Policy

_log = logging.getLogger(__name__)
_POLICY, _ANCHOR, _REPORTS = "policy.safetensors", "anchor.safetensors", "rounds.json"


class BudgetReached(Exception):  # noqa: N818 (not an error: it ends the Trainer's loop)
    """A round exceeds a limit and is not learnt from."""


@dataclasses.dataclass
class Rounds:
    """Makes each round when it begins, or finds it on disk; holds the moving anchor.

    A round's candidates cannot be drawn again once the policy has learnt from some of them, so that they stay on disk
    while a checkpoint is left from which the round would go on.

    Attributes:
        keep: Files of rounds that stay although no checkpoint needs them, the last ones; `None` for all.
        reports: One for each round begun.
        exceeded: Whether the last of them went beyond the budget.
    """

    policy: Policy
    method: Method
    proposer: Proposer
    prompts: Sequence[Content]
    per_round: int
    seed: int
    budget: Budget | None
    folder: RunFolder | None
    keep: int | None = 0
    reports: list[RoundReport] = dataclasses.field(default_factory=list)
    exceeded: bool = False

    def __post_init__(self) -> None:
        self._moving = self.method.anchor_rate < 1.0 or self.method.anchor_every > 1
        self.anchor: Snapshot | None = self.policy.snapshot() if self._moving else None
        self._moves = 0

    def begin(self, number: int, step: int, *, inside: bool) -> tuple[Round, ResponsePosterior, RoundReport]:
        """The round, drawn with the policy as it is now; `inside` one that has begun it must be on disk.

        Raises:
            BudgetReached: The policy has gone too far.
            PersistenceError: The candidates of a round that has begun are gone.
        """
        self.read_earlier(number)
        if inside and self.folder is not None and not self._file(self.folder, number).exists():
            raise PersistenceError(
                f"{self._file(self.folder, number)} is missing: the checkpoint stopped while learning from its "
                "candidates. Remove that checkpoint to go on from an earlier one, or the folder to begin anew"
            )
        found, posterior, report = self._round(number, step)
        self.reports.append(report)
        self._write_reports()
        reason = None if self.budget is None else self.budget.exceeded(report)
        if reason is not None:
            self.exceeded = True
            raise BudgetReached(reason)
        return found, posterior, report

    def measure(self, number: int, step: int) -> RoundReport:
        """What the policy is like after the last round, on the candidates of one more that is not learnt from."""
        return self._round(number, step)[2]

    def read_earlier(self, number: int) -> None:
        """The reports of rounds that an interrupted run has made before this one.

        Raises:
            PersistenceError: They are not on disk.
        """
        if self.folder is None or len(self.reports) >= number:
            return
        stored = _read_json(self.folder.path / _REPORTS)["rounds"][:number]
        if len(stored) < number:
            raise PersistenceError(
                f"{self.folder.path / _REPORTS} tells of {len(stored)} rounds, the checkpoint of {number}; remove the "
                "folder to begin anew"
            )
        self.reports = [RoundReport.from_summary(values) for values in stored]

    def _write_reports(self) -> None:
        if self.folder is not None and self.folder.processes.index == 0:
            _write_json(self.folder.path / _REPORTS, {"rounds": [report.summary() for report in self.reports]})

    def prune(self, steps_per_round: int) -> None:
        """Removes the files of rounds from which no checkpoint goes on."""
        if self.folder is not None and (checkpoints := self.folder._checkpoints()):
            oldest = int(checkpoints[0].name.rpartition("-")[2])
            prune_rounds(self.folder, self.keep, before=oldest // steps_per_round)

    @staticmethod
    def _file(folder: RunFolder, number: int) -> Path:
        return folder.path / f"round-{number:05d}.safetensors"

    def _round(self, number: int, step: int) -> tuple[Round, ResponsePosterior, RoundReport]:
        self._move_anchor(number)
        file = None if self.folder is None else self._file(self.folder, number)
        if file is not None and file.exists():
            found = Round.load(file)
        else:
            seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
            found = self.proposer.propose(self.prompts, self._chosen(number), self.anchor, seed)
            if self.folder is not None and file is not None:
                if self.folder.processes.index == 0:
                    found.save(file)
                self.folder.processes.wait()
        posterior = self.method.weigh(found.candidates)
        return found, posterior, RoundReport.of(found, posterior, number=number, step=step)

    def _move_anchor(self, number: int) -> None:
        if self.anchor is None:
            return
        # Counted, so that a run that is resumed between two rounds moves it once.
        due = number // self.method.anchor_every
        if self._moves < due:
            self.anchor = self.anchor.moved_towards(self.policy, self.method.anchor_rate)
            self._moves = due

    def _chosen(self, number: int) -> list[int]:
        """Places of the round's prompts: all prompts in turn, in an order that is drawn anew for each pass."""
        chosen: list[int] = []
        first = number * self.per_round
        while len(chosen) < self.per_round:
            cycle, offset = divmod(first + len(chosen), len(self.prompts))
            order = np.random.default_rng([self.seed, 1, cycle]).permutation(len(self.prompts))
            chosen += order[offset : offset + self.per_round - len(chosen)].tolist()
        return chosen

    def save(self, folder: Path) -> None:
        """Writes the policy's trainable weights and the anchor."""
        self.policy.snapshot().save(folder / _POLICY)
        if self.anchor is not None:
            moves = {"moves": torch.tensor(self._moves)}
            Snapshot({**self.anchor.values, **moves}).save(folder / _ANCHOR)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.policy.assign(Snapshot.load(folder / _POLICY))
        if self.anchor is not None:
            values = dict(Snapshot.load(folder / _ANCHOR, device=self.policy.device).values)
            self._moves = int(values.pop("moves"))
            self.anchor = Snapshot(values)


def prune_rounds(folder: RunFolder, keep: int | None, *, before: int | None = None) -> None:
    """Removes the files of rounds, but for the last `keep` (all with `None`) and those from number `before` on."""
    if keep is None or folder.processes.index:
        return
    files = sorted(folder.path.glob("round-*.safetensors"))
    for file in files[: max(0, len(files) - keep)]:
        if before is None or int(file.stem.rpartition("-")[2]) < before:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                # A file too many is no reason to lose a run.
                _log.warning("%s cannot be removed: %s", file, error)

"""What a run of `align` did, in memory and on disk."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import PersistenceError
from ._run_identity import weights_digest
from ._weights import Snapshot
from .monitor import RoundReport
from .policy import Policy

if TYPE_CHECKING:
    from ..engines._run_folder import RunFolder

FINISHED, TRAINED = "finished.json", "trained.safetensors"


@dataclasses.dataclass(frozen=True)
class AlignmentReport:
    """What a run of `align` did.

    Attributes:
        rounds: What each round's candidates looked like, the last one's if the budget stopped it there too.
        final: The same of the policy as it is returned, on the candidates of one more round.
        steps: Steps of the optimiser.
        stopped: Why the run ended before its last round, in words; `None` where it did not.
        seconds: Wall time of the call; of a finished run that was loaded, of the call that finished it.
        log: Entries of the Trainer's log with a loss.
        resumed_from: Checkpoint from which an interrupted run went on, or the folder of a finished run.
    """

    rounds: tuple[RoundReport, ...]
    final: RoundReport
    steps: int
    stopped: str | None
    seconds: float
    log: tuple[Mapping[str, float], ...] = ()
    resumed_from: str | None = None


def finish(folder: "RunFolder", policy: Policy, report: AlignmentReport) -> None:
    """Writes the final weights, then the report, which makes them count."""
    from ..engines._run_folder import _write_json

    if folder.processes.index == 0:
        policy.snapshot().save(folder.path / TRAINED)
        values = dataclasses.asdict(report) | {"log": [dict(entry) for entry in report.log]}
        _write_json(folder.path / FINISHED, values | {"trained": weights_digest(policy.snapshot(device="cpu"))})
    folder.processes.wait()


def load_finished(folder: "RunFolder", policy: Policy) -> AlignmentReport | None:
    """The report of a finished run, whose weights are put into the policy; `None` where there is none.

    Raises:
        PersistenceError: The run is not finished and was on another number of processes.
    """
    from ..engines._run_folder import _read_json

    file = folder.path / FINISHED
    if not file.exists():
        if not folder.same_processes:
            raise PersistenceError(
                f"`output_dir` {folder.path} holds an unfinished run on another number of processes than "
                f"{folder.processes.count}; go on with as many as it had, or give another folder"
            )
        return None
    policy.assign(Snapshot.load(folder.path / TRAINED))
    stored = _read_json(file)
    stored.pop("trained", None)
    stored |= {
        "rounds": tuple(RoundReport.from_summary(values) for values in stored["rounds"]),
        "final": RoundReport.from_summary(stored["final"]),
        "log": tuple(stored["log"]),
        "resumed_from": str(folder.path),
    }
    return AlignmentReport(**stored)

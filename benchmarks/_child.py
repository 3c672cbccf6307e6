"""A contender in a process of its own, which does what it is asked and measures its time and memory."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_GIB_IN_KIB = 2**20


class Child:
    """A process of a benchmark's script, called with `--child` and the arguments; one line is asked, one answered.

    Attributes:
        kind: What its messages call it.
    """

    def __init__(self, kind: str, script: str, *arguments: str, threads: int) -> None:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        }  # fmt: skip
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, script, "--child", kind, *arguments], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to a line, JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.kind!r} died at {question!r}; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def reset_peak() -> None:
    """Lets the peak of resident memory start anew, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Peak resident memory of this process since the last reset."""
    return _status("VmHWM")


def resident_gib() -> float:
    """Resident memory of this process."""
    return _status("VmRSS")


def _status(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / _GIB_IN_KIB

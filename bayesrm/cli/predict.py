"""`bayesrm predict`: feedback predicted and scored, or rewards of candidates."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jsonargparse import Namespace
from numpy.typing import NDArray

from ..beliefs import RewardBelief
from ..data import Comparisons, Trajectories
from ..diagnostics import Estimate, bootstrap, credit_html, score
from ..diagnostics._actions import action_scores, without_ties
from ..engines import FeedbackPrediction, NetworkDraws, TokenPosterior, TrajectoryPosterior
from ..errors import ArgumentError
from ..rewards import ProjectedHead
from ..rewards._checks import plain
from . import _files, _parser
from ._candidates import Candidates, holds_candidates, read_candidates
from ._console import Console, dump
from ._runs import add_run, load_run
from ._trajectories import show_trajectory, trajectory_rows
from .fit import add_data, describe, load_data


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser(
        "predict",
        "Predicts feedback and scores the prediction, with 95% intervals over prompts; for prompts with candidates "
        "(columns `prompt` and `responses`), gives what is believed about each candidate's reward. With a run on "
        "trajectories, does both for trajectories: predicts their actions and preferences, and gives their rewards.",
    )
    add_run(parser)
    add_data(parser)
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", help="file for the predictions, one row a line")
    parser.add_argument(
        "--credit", metavar="FILE.html", help="page that shows which words of the candidates earned the reward"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of the integration points and the bootstrap")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Predicts, scores and writes."""
    if settings.output is not None:
        _files.check_output_file(settings.output, ".jsonl", overwrite=settings.overwrite)
    if settings.credit is not None:
        _files.check_output_file(settings.credit, ".html", overwrite=settings.overwrite)
    posterior = load_run(settings)
    if settings.credit is not None and not isinstance(posterior, TokenPosterior):
        raise ArgumentError(
            f"`--credit` needs rewards of tokens, as `ava` and `language_feedback` have them; the run {settings.run} "
            f"holds a {type(posterior).__name__}"
        )
    record: dict[str, Any] = {"command": "predict", "run": settings.run, "output": settings.output}
    reading = {name: settings.data[name] for name in ("columns", "split")}
    if isinstance(posterior, TrajectoryPosterior):
        trajectories = load_data(settings, posterior.program.data_type)
        console.say(f"{trajectories.summary()}\n")
        rows = list(trajectory_rows(posterior, trajectories))
        scores = trajectory_metrics(posterior, trajectories, settings.seed)
        record |= {"data": describe(trajectories), "metrics": scores}
        if settings.output is None:
            record["predictions"] = rows
        lines = [] if settings.output is not None else [*map(show_trajectory, rows), ""]
        lines += [f"{name:20} {_estimate(value, 'cluster of trajectories')}" for name, value in scores.items()]
        text = "\n".join(lines)
    elif settings.data.kind is None and holds_candidates(settings.data_source, **reading):
        candidates, refused = read_candidates(settings.data_source, on_bad_row=settings.data.on_bad_row, **reading)
        belief = posterior.predict(candidates.prompts, candidates.responses, progress=True)
        rows = list(candidate_rows(candidates, belief))
        if settings.credit is not None:
            assert isinstance(posterior, TokenPosterior)
            _write_credit(posterior, candidates, settings.credit)
            console.say(f"rewards of words written to {settings.credit}")
            record["credit"] = settings.credit
        record |= {"prompts": len(rows), "refused": [{"row": row, "reason": reason} for row, reason in refused]}
        if settings.output is None:
            record["predictions"] = rows
        text = f"{len(rows)} prompts, {sum(len(r['mean']) for r in rows)} candidates, {len(refused)} rows refused"
        if settings.output is None:
            text = "\n".join([_show(row) for row in rows] + [text])
    else:
        if settings.credit is not None:
            raise ArgumentError("`--credit` shows candidates: data with the columns `prompt` and `responses`")
        data = load_data(settings)
        console.say(f"{data.summary()}\n")
        if not isinstance(posterior.program.head, ProjectedHead | NetworkDraws):
            # Those make features of their own; for others, this shows progress.
            data = data.with_features(posterior.program.encode(data, progress=True).numpy())
        prediction = posterior.predict_feedback(data, seed=settings.seed)
        rows = list(feedback_rows(data, prediction))
        scores = metrics(data.prompt_of_row, prediction, settings.seed)
        record |= {"data": describe(data), "metrics": scores}
        text = "\n".join(f"{name:9} {_estimate(value)}" for name, value in scores.items())
    if settings.output is not None:
        with _files.complete_files(_files.check_output_file(settings.output, ".jsonl", overwrite=True)) as (file,):
            file.write_text("".join(f"{dump(row)}\n" for row in rows), encoding="utf-8")
        text += f"\nwritten to {settings.output}"
    console.say(text)
    console.result(record)


def _write_credit(posterior: TokenPosterior, candidates: Candidates, path: str) -> None:
    """Writes the page of the rewards of all candidates' tokens."""
    prompts = [p for p, texts in zip(candidates.prompts, candidates.responses, strict=True) for _ in texts]
    belief = posterior.predict_tokens(prompts, [text for texts in candidates.responses for text in texts])
    page = credit_html(belief, prompts=[plain(prompt) for prompt in prompts])
    with _files.complete_files(_files.check_output_file(path, ".html", overwrite=True)) as (file,):
        file.write_text(page, encoding="utf-8")


def candidate_rows(candidates: Candidates, belief: RewardBelief) -> Iterator[dict[str, Any]]:
    """What is believed about the candidates of each prompt.

    `mean` is the expected reward. `deviation` is the expected difference from the mean of the prompt's candidates,
    which is what comparisons identify, and `std` its standard deviation.
    """
    deviations = belief.differences("mean")
    best = belief.prob_best()
    for index, row in enumerate(candidates.rows):
        size = len(candidates.responses[index])
        yield {
            "row": row,
            "prompt": candidates.prompts[index],
            "mean": belief.mean[index, :size].tolist(),
            "deviation": deviations.mean[index, :size].tolist(),
            "std": deviations.std[index, :size].tolist(),
            "prob_best": best[index, :size].tolist(),
        }


def feedback_rows(data: Comparisons, prediction: FeedbackPrediction) -> Iterator[dict[str, Any]]:
    """Predictive probabilities of each row of feedback; `null` where the outcomes are too many to list."""
    place = {int(row): (group, i) for group in prediction.groups for i, row in enumerate(group.rows.tolist())}
    for row in range(len(data)):
        group, i = place[row]
        log_prob = float(prediction.log_prob[row])
        outcomes = probs = observed = None
        if group.probs is not None and group.outcomes is not None and group.observed is not None:
            outcomes, probs = group.outcomes.tolist(), group.probs[i].tolist()
            # An impossible answer, which only a masked row may hold, is none of the outcomes.
            observed = group.outcomes[group.observed[i]].tolist() if math.isfinite(log_prob) else None
        yield {
            "row": row,
            "kind": group.label.split(".")[0],
            "comparison": data.describe_row(row),
            "outcomes": outcomes,
            "probs": probs,
            "observed": observed,
            "log_prob": log_prob if math.isfinite(log_prob) else None,
        }


def trajectory_metrics(
    posterior: TrajectoryPosterior, data: Trajectories, seed: int
) -> dict[str, dict[str, float | None]]:
    """Scores of the actions of demonstrations and of preferences, as far as the data hold any."""
    scores = {f"action_{name}": _numbers(e) for name, e in action_scores(posterior, data, seed=seed).items()}
    if len(data.preferences):
        clusters, prediction = data.clusters[data.preferences[:, 0]], posterior.predict_feedback(data, seed=seed)
        found, decided = metrics(clusters, prediction, seed), without_ties(prediction)
        if "ece" in found and bool((decided.weight > 0).any()):
            found["ece"] = metrics(clusters, decided, seed)["ece"]
        scores |= {f"preference_{name}": value for name, value in found.items()}
    return scores


def metrics(
    prompts: NDArray[np.int64], prediction: FeedbackPrediction, seed: int
) -> dict[str, dict[str, float | None]]:
    """Accuracy, NLL, Brier score and ECE with intervals over prompts.

    Without intervals where all rows have one prompt, and the NLL alone where the outcomes of no row can be listed.
    """
    listed = any(group.probs is not None for group in prediction.groups)
    if len(np.unique(prompts)) < 2:
        values = {"accuracy": prediction.accuracy} if listed else {}
        values["nll"] = prediction.nll
        return {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    if not listed:
        loss = -prediction.log_prob.numpy()
        return {"nll": _numbers(bootstrap(lambda rows: float(loss[rows].mean()), prompts, seed=seed))}
    scores = score(prediction, prompts, seed=seed)
    return {name: _numbers(getattr(scores, name)) for name in ("accuracy", "nll", "brier", "ece")}


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    low, high = (None if math.isnan(end) else end for end in (estimate.low, estimate.high))
    return {"value": estimate.value, "low": low, "high": high}


def _estimate(numbers: Mapping[str, float | None], cluster: str = "prompt") -> str:
    if numbers["low"] is None:
        return f"{numbers['value']:.4f} (one {cluster}, no interval)"
    return f"{numbers['value']:.4f} [{numbers['low']:.4f}, {numbers['high']:.4f}]"


def _show(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
    lines = [f"row {row['row']}: {' '.join(prompt.split())[:80]}"]
    for index, (mean, std, best) in enumerate(zip(row["deviation"], row["std"], row["prob_best"], strict=True)):
        lines.append(f"  [{index}] {mean:+.3f} +- {std:.3f}, best with probability {best:.2f}")
    return "\n".join(lines)

"""Scores of predictions over several splits, with intervals over prompts, and the tables that show them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _contenders import LEVELS, Contender, Pairs, Prediction, note
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.diagnostics import Estimate, check_calibration, predicted_events, score
from bayesrm.engines import FeedbackPrediction, GroupPrediction


@dataclasses.dataclass(frozen=True)
class Record:
    """Predictions of one contender on all splits, test rows in the order of the splits.

    Attributes:
        probability: That the first is chosen, shape `(rows,)`; NaN in splits where it gave no posterior.
        covered: Whether the interval at each of `LEVELS` holds the true difference, shape `(levels, rows)`; NaN where
            there is no truth, or no posterior.
        prompt: Prompt of each row, shape `(rows,)`.
        parts: The prediction of each split, or why there is none.
    """

    probability: NDArray[np.float64]
    covered: NDArray[np.float64]
    prompt: NDArray[np.int64]
    parts: list[Prediction | str]

    @classmethod
    def of(cls, parts: Sequence[Prediction | str], tests: Sequence[Pairs]) -> "Record":
        """Puts the splits together."""
        probability, covered = [], []
        for part, test in zip(parts, tests, strict=True):
            inside = np.full((len(LEVELS), len(test.pairs)), np.nan)
            if isinstance(part, Prediction) and test.truth is not None:
                inside = ((part.lower <= test.truth) & (test.truth <= part.upper)).astype(np.float64)
            covered.append(inside)
            missing = np.full(len(test.pairs), np.nan)
            probability.append(part.probability if isinstance(part, Prediction) else missing)
        prompt = np.concatenate([test.prompt for test in tests])
        return cls(np.concatenate(probability), np.concatenate(covered, axis=1), prompt, list(parts))

    @property
    def log_prob(self) -> NDArray[np.float64]:
        """Log probability of what was chosen, shape `(rows,)`."""
        return np.log(np.clip(self.probability, 1e-300, None))

    def mean(self, values: NDArray[np.float64]) -> Estimate:
        """The mean of one number a row, with its bootstrap interval over prompts."""
        known = ~np.isnan(values)
        cluster = np.unique(self.prompt[known], return_inverse=True)[1]
        sums, sizes = np.bincount(cluster, values[known]), np.bincount(cluster)
        # Means are sums over prompts, so that thousands of redrawn samples are one product of matrices.
        copies = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 2000)
        low, high = np.quantile((copies @ sums) / (copies @ sizes), [0.025, 0.975])
        return Estimate(float(values[known].mean()), float(low), float(high))

    def gain(self, other: "Record | None") -> Estimate:
        """Mean log probability minus that of another contender, or of a coin, over the rows that both predicted."""
        return self.mean(self.log_prob - (np.log(0.5) if other is None else other.log_prob))

    @functools.cached_property
    def scores(self) -> dict[str, Estimate]:
        """NLL, Brier score, accuracy and calibration errors of the choices, coverage of the reward differences."""
        known = ~np.isnan(self.probability)
        prediction, prompt = as_prediction(np.round(self.probability[known], 9)), self.prompt[known]
        # One half up to rounding is one half.
        p = np.round(self.probability, 9)
        found = {
            "accuracy": self.mean(np.where(known, (p > 0.5) + 0.5 * (p == 0.5), np.nan)),
            "nll": self.mean(-self.log_prob),
            "brier": self.mean(2 * (1 - self.probability) ** 2),
        }
        check = check_calibration(predicted_events(prediction)["choice: likeliest answer"], prompt)
        absolute = score(prediction, prompt, num_resamples=200).ece
        found |= {"ece": absolute, "debiased error": check.error}
        found["p if calibrated"] = Estimate(check.p_value, check.p_value, check.p_value)
        if not np.isnan(self.covered).all():
            for level, inside in zip(LEVELS, self.covered, strict=True):
                found[f"coverage {level:.0%}"] = self.mean(inside)
            widths = [np.median(x.upper[-1] - x.lower[-1]) for x in self.parts if isinstance(x, Prediction)]
            found[f"median width {LEVELS[-1]:.0%}"] = Estimate(float(np.mean(widths)), min(widths), max(widths), 1.0)
        return found

    def seconds(self, what: str) -> float:
        """Median over the splits of `"fit_seconds"` or `"predict_seconds"`."""
        return float(np.median([getattr(part, what) for part in self.parts if isinstance(part, Prediction)]))


def as_prediction(probability: NDArray[np.float64]) -> FeedbackPrediction:
    """Predictions of choices, the chosen response put first or second by chance.

    Always first, a prediction of one half would count as right wherever a tie goes to the first outcome.
    """
    p = torch.from_numpy(probability)
    rows, outcomes = torch.arange(len(p)), torch.arange(2)
    chosen = torch.from_numpy(np.random.default_rng(0).integers(2, size=len(p)))
    probs = torch.where(chosen[:, None] == outcomes, p[:, None], 1 - p[:, None])
    group = GroupPrediction("choice.2", rows, outcomes, probs, chosen)
    return FeedbackPrediction(p.clamp_min(1e-300).log(), (group,), torch.ones_like(p))


def compare(
    contenders: Mapping[str, Contender], data: Sequence[tuple[Pairs, Pairs]], *, cache: Path | None, label: str
) -> dict[str, Record]:
    """Predictions of every contender on every split; contenders take turns, so that times are comparable.

    Args:
        contenders: By name, a function of training pairs, test pairs and the number of the split.
        data: Training and test pairs of each split.
        cache: Where finished predictions are kept.
        label: Name of the comparison in the cache.
    """
    found: dict[str, list[Prediction | str]] = {name: [] for name in contenders}
    for k, (train, test) in enumerate(data):
        for name, contender in contenders.items():
            path = cache / f"{label}, {name}, {k}.npz" if cache else None
            if path is not None and path.exists():
                found[name].append(Prediction.load(path))
                continue
            try:
                part: Prediction | str = contender(train, test, k)
            except brm.errors.EngineError as error:
                part = str(error)
            if path is not None and isinstance(part, Prediction):
                part.save(path)
            found[name].append(part)
            told = part if isinstance(part, str) else f"{part.fit_seconds:.2f} s"
            note(f"{label}, split {k}, {name}: {told}")
    tests = [test for _, test in data]
    return {name: Record.of(parts, tests) for name, parts in found.items()}


def markdown(records: Mapping[str, Record], base: Record) -> str:
    """The scores as a table in Markdown, gains over `base`."""
    scores = {name: record.scores for name, record in records.items() if not np.isnan(record.probability).all()}
    columns = list(dict.fromkeys(key for found in scores.values() for key in found))
    lines = ["| " + " | ".join(["", *columns, "gain over a coin", "gain over the base", "fit s", "predict s"]) + " |"]
    lines.append("|---" * (len(columns) + 5) + "|")
    for name, record in records.items():
        refused = [part for part in record.parts if isinstance(part, str)]
        if name not in scores:
            lines.append(f"| {name} | refused: {refused[0]} |" + " |" * (len(columns) + 3))
            continue
        cells = [_cell(scores[name][key]) if key in scores[name] else "" for key in columns]
        gains = [_signed(record.gain(None)), "" if record is base else _signed(record.gain(base))]
        times = [f"{record.seconds(what):.3g}" for what in ("fit_seconds", "predict_seconds")]
        told = f"{name} ({len(refused)} of {len(record.parts)} splits refused)" if refused else name
        lines.append("| " + " | ".join([told, *cells, *gains, *times]) + " |")
    return "\n".join(lines)


def _cell(e: Estimate) -> str:
    return f"{e.value:.3f}" if e.low == e.high else str(e)


def _signed(e: Estimate) -> str:
    return f"{e.value:+.4f} [{e.low:+.4f}, {e.high:+.4f}]"


def records_of(records: Mapping[str, Record]) -> dict[str, Any]:
    """Scores, times and notes for the JSON file."""
    found: dict[str, Any] = {}
    for name, record in records.items():
        parts = [part if isinstance(part, str) else part.notes for part in record.parts]
        found[name] = {"parts": parts}
        if not np.isnan(record.probability).all():
            found[name] |= {key: dataclasses.asdict(value) for key, value in record.scores.items()}
            found[name] |= {what: record.seconds(what) for what in ("fit_seconds", "predict_seconds")}
    return found

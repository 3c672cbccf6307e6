"""Do rewards of tokens point at words that people marked as wrong? Answers with marked errors, scores, baselines."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

import bayesrm as brm
from bayesrm.diagnostics import Estimate, auroc, bootstrap
from bayesrm.token_beliefs import TokenBelief

CATEGORIES = ("Irrelevant", "Wrong-Grounding", "Unverifiable", "Redundant", "Incoherent")
#: Responses that are differentiated together.
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with the errors that people marked in it.

    Attributes:
        question: Number of the question.
        prompt: The question.
        response: The answer.
        errors: Spans of characters that are wrong, first and one after the last, with a category.
    """

    question: int
    prompt: str
    response: str
    errors: tuple[tuple[int, int, str], ...]

    def __post_init__(self) -> None:
        for start, stop, category in self.errors:
            if not 0 <= start < stop <= len(self.response):
                raise brm.errors.DataError(
                    f"question {self.question}: an error span is [{start}, {stop}], and the answer has "
                    f"{len(self.response)} characters"
                )
            if category not in CATEGORIES:
                raise brm.errors.DataError(
                    f"question {self.question}: an error is {category!r}; known are {CATEGORIES}"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """The tokens of an answer with a score that should be high where something is wrong.

    Tokens without characters take no part.

    Attributes:
        question: Number of the question.
        score: Shape `(T,)`.
        wrong: Whether the token lies in an error span, shape `(T,)`.
    """

    question: int
    score: NDArray[np.float64]
    wrong: NDArray[np.bool_]

    @classmethod
    def of(cls, answer: Answer, spans: NDArray[np.int64], score: NDArray[np.float64]) -> "Scored":
        """The tokens of an answer, at spans of shape `(T, 2)`."""
        visible = spans[:, 1] > spans[:, 0]
        return cls(answer.question, np.asarray(score)[visible], token_labels(spans, answer.errors)[visible])

    @property
    def mixed(self) -> bool:
        """Whether some tokens are wrong and some are not."""
        return bool(self.wrong.any() and not self.wrong.all())

    def without_trend(self) -> "Scored":
        """The same with the straight line through the scores along the answer taken off."""
        if len(self.score) < 3:
            return dataclasses.replace(self, score=np.zeros_like(self.score))
        place = np.arange(len(self.score)) - (len(self.score) - 1) / 2
        slope = float(place @ self.score / (place @ place))
        return dataclasses.replace(self, score=self.score - self.score.mean() - slope * place)

    def shuffled(self, rng: np.random.Generator) -> "Scored":
        """The same scores on the answer's tokens in another order: what chance does."""
        return dataclasses.replace(self, score=rng.permutation(self.score))


def load(folder: Path, num_questions: int | None = None) -> tuple[list[Answer], list[dict[str, Any]]]:
    """The first answer to each question with its marked errors, and the records with all answers and preferences."""
    records = pq.read_table(folder / "qa_feedback.parquet").slice(0, num_questions).to_pylist()
    answers = [
        Answer(
            number,
            record["question"],
            record["responses"][0],
            tuple((e["start"], e["end"], e["type"]) for e in record["errors"]),
        )
        for number, record in enumerate(records)
    ]
    return answers, records


def split(count: int, sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Questions at random in parts of these sizes, and the rest, each in ascending order."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))]


def token_labels(spans: NDArray[np.int64], errors: Sequence[tuple[int, int, str]]) -> NDArray[np.bool_]:
    """Whether at least half of a token's characters are wrong, shape `(T,)`; tokens without characters are not.

    Args:
        spans: Offsets of each token's first character and the one after its last, shape `(T, 2)`.
        errors: Spans of wrong characters; they may overlap.

    Example:
        >>> token_labels(np.array([[0, 3], [3, 8], [8, 8]]), [(5, 8, "Irrelevant")]).tolist()
        [False, True, False]
    """
    wrong = np.zeros(max([int(spans.max(initial=0)), *(stop for _, stop, _ in errors)]) + 1)
    for start, stop, _ in errors:
        wrong[start:stop] = 1.0
    before = np.concatenate([[0.0], np.cumsum(wrong)])
    length = spans[:, 1] - spans[:, 0]
    return (length > 0) & (2 * (before[spans[:, 1]] - before[spans[:, 0]]) >= length)


def within(scored: Sequence[Scored]) -> NDArray[np.float64]:
    """AUROC of each answer that has both kinds of tokens, NaN for others, shape `(answers,)`."""
    return np.array([auroc(s.score[~s.wrong], s.score[s.wrong]) if s.mixed else math.nan for s in scored])


def within_estimate(scored: Sequence[Scored], baseline: Sequence[Scored] | None = None) -> Estimate:
    """Mean of `within` over answers, or its gain over a baseline on the same answers, intervals over questions."""
    values = within(scored) - (0.0 if baseline is None else within(baseline))
    known = ~np.isnan(values)
    questions = np.array([s.question for s in scored])[known]
    return bootstrap(lambda rows: float(values[known][rows].mean()), questions, num_resamples=2000)


def overall_estimate(scored: Sequence[Scored]) -> Estimate:
    """AUROC over the tokens of all answers together, its interval over questions."""
    sizes = [len(s.score) for s in scored]
    questions = np.repeat([s.question for s in scored], sizes)
    score, wrong = (np.concatenate([getattr(s, name) for s in scored]) for name in ("score", "wrong"))

    def statistic(rows: NDArray[np.int64]) -> float:
        return auroc(score[rows][~wrong[rows]], score[rows][wrong[rows]])

    return bootstrap(statistic, questions, num_resamples=500)


def chance(scored: Sequence[Scored], seed: int = 0) -> list[Scored]:
    """Every answer's scores in random order; of equal scores the order does not matter."""
    rng = np.random.default_rng(seed)
    return [s.shuffled(rng) for s in scored]


def of_belief(answers: Sequence[Answer], belief: TokenBelief, score: Callable[[TokenBelief], Any]) -> list[Scored]:
    """Answers scored by their belief, in their order; `score` gives shape `(N, T)`."""
    values = np.asarray(score(belief), dtype=np.float64)
    return [
        Scored.of(answer, belief.spans[row].numpy()[keep], values[row][keep])
        for row, (answer, keep) in enumerate(zip(answers, belief.mask.numpy(), strict=True))
    ]


def gradient_times_input(
    network: brm.rewards.LoRANetwork, answers: Sequence[Answer]
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """What each token of an answer adds to the reward to first order (Shrikumar et al., 1605.01713).

    The gradient of the reward with respect to the token's word embedding, times that embedding.

    Returns:
        Spans of the tokens in the answer, shape `(T, 2)`, and their attributions, shape `(T,)`, for each answer.
    """
    embedding = network.model.get_input_embeddings()
    found: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    for begin in range(0, len(answers), _BATCH):
        part = answers[begin : begin + _BATCH]
        sequences = network.tokenize([a.prompt for a in part], [a.response for a in part])
        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1]

        handle = embedding.register_forward_hook(keep)
        try:
            rewards = network(**network.collate(sequences))
        finally:
            handle.remove()
        (embedded,) = seen
        (gradient,) = torch.autograd.grad(rewards.sum(), embedded)
        values = (gradient * embedded.detach()).sum(-1).double().cpu().numpy()
        for row, (answer, sequence) in enumerate(zip(part, sequences, strict=True)):
            place, spans = response_place(network, sequence, answer.response)
            found.append((spans, values[row, place : place + len(spans)]))
    return found


def response_place(
    network: brm.rewards.LoRANetwork, sequence: NDArray[np.int64], response: str
) -> tuple[int, NDArray[np.int64]]:
    """Where the response begins in a token sequence, and the spans of its tokens, of which the end may be cut."""
    tokenizer = network._encoder.tokenizer
    encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = (np.array(encoded[name], dtype=np.int64) for name in ("input_ids", "offset_mapping"))
    closing = int(np.isin(sequence[-1], tokenizer.all_special_ids))
    for count in range(min(len(ids), len(sequence) - closing), 0, -1):
        place = len(sequence) - closing - count
        if (sequence[place : place + count] == ids[:count]).all() and (count == len(ids) or place <= 1):
            return place, spans[:count]
    raise brm.errors.DataError(f"the tokens of {response[:60]!r} are not at the end of its sequence")


def rarity(texts: Sequence[str], tokenizer: Any) -> Callable[[Answer], tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Tokens of an answer scored by minus the logarithm of how often they occur in `texts`, which are other answers."""
    counts = collections.Counter(
        token for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] for token in ids
    )
    total = sum(counts.values()) + len(counts)

    def score(answer: Answer) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        encoded = tokenizer(answer.response, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        values = [-math.log((counts[token] + 1) / total) for token in encoded["input_ids"]]
        return np.array(encoded["offset_mapping"], dtype=np.int64), np.array(values)

    return score

"""The formats of feedback that can be read: which columns tell each one, and how one of its rows is understood."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, DataError
from ._fields import (
    BadRowError,
    Row,
    present,
    read_annotator,
    read_choice,
    read_flag,
    read_integer,
    read_list,
    read_margin,
    read_number,
    read_weight,
    shorten_repr,
)
from ._prompts import split_prompt
from ._texts import Text


@dataclasses.dataclass(slots=True)
class Judgement:
    """One row of feedback, still with its texts.

    Attributes:
        kind: Kind of feedback.
        prompt: The prompt.
        responses: The candidates.
        outcome: Encoded as in `FeedbackGroup`; a rating is the raw integer, its levels are known once all are read.
        annotator: Name of the annotator, if known.
        weight: Weight of the row.
        margin: Handicap of candidate 0 against candidate 1, if any.
    """

    kind: str
    prompt: Text
    responses: Sequence[Text]
    outcome: Sequence[int]
    annotator: str | None = None
    weight: float = 1.0
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """How one published format is told and read.

    Attributes:
        name: What the format is called in summaries and errors.
        columns: Sets of alternative column names; a source needs one of each set.
        kinds: Kinds of feedback it can be read as, the default first.
        parse: Turns one row into judgements: `parse(row, kind)`.
        optional: Further columns that it uses, besides `annotator` and `weight`.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    parse: Callable[[Row, str], Iterator[Judgement]]
    optional: tuple[str, ...] = ()

    def matches(self, columns: Sequence[str]) -> bool:
        """Whether a source with these columns has the format."""
        return all(any(name in columns for name in names) for names in self.columns)

    def describe(self) -> str:
        """Returns the name and the columns needed."""
        return f"{self.name} ({', '.join('|'.join(names) for names in self.columns)})"

    @property
    def used(self) -> set[str]:
        """Every column that it uses if present."""
        return {name for names in self.columns for name in names} | {*self.optional, "annotator", "weight"}


PROMPT = ("prompt", "instruction")
_VERDICTS: Mapping[str, int] = (
    dict.fromkeys(("a", "model_a", "response_a", "assistant_a", "0", "0.0"), 0)
    | dict.fromkeys(("b", "model_b", "response_b", "assistant_b", "1", "1.0"), 1)
    | dict.fromkeys(("tie", "tie (bothbad)", "tie(bothbad)", "bothbad", "both_bad", "both", "draw", "equal"), 2)
)


def detect(columns: Sequence[str], kind: str | None, source: str, formats: Sequence[Format]) -> tuple[Format, str]:
    """Finds the format that a source's columns tell.

    Args:
        columns: Column names, after renaming.
        kind: Kind of feedback that the user asks for, or `None`.
        source: Name of the source, for errors.
        formats: Formats to choose from.

    Returns:
        The format, and the kind of feedback to read it as.

    Raises:
        DataError: No format, or more than one, fits the columns.
        ArgumentError: The format cannot be read as `kind`.
    """
    fitting = [form for form in formats if form.matches(columns)]
    accepted = "; ".join(form.describe() for form in formats)
    if not fitting:
        raise DataError(
            f"the columns {sorted(columns)} fit no format. Accepted: {accepted}. "
            'Rename with `columns={"our name": "your name"}`',
            source=source,
        )
    # The implicit prompt is the fallback of its own format where there is no prompt column.
    fitting = [form for form in fitting if not any(set(form.columns) < set(other.columns) for other in fitting)]
    serving = [form for form in fitting if kind is None or kind in form.kinds]
    if len(serving) > 1:
        raise DataError(
            f"the columns {sorted(columns)} fit more than one format: {'; '.join(f.describe() for f in serving)}. "
            "Pass `kind`, or remove the columns that are not the feedback",
            source=source,
        )
    if not serving:
        kinds = sorted({name for form in fitting for name in form.kinds})
        raise ArgumentError(f"`kind` is {kind!r}, but {source} ({fitting[0].name}) can be read as {', '.join(kinds)}")
    return serving[0], kind or serving[0].kinds[0]


def _extras(row: Row) -> dict[str, Any]:
    return {"annotator": read_annotator(row), "weight": read_weight(row)}


def _parse_pair(row: Row, kind: str) -> Iterator[Judgement]:
    texts = [row[present(row, name)] for name in ("chosen", "rejected")]
    implicit = not any(name in row for name in PROMPT)
    prompt = None if implicit else row[present(row, *PROMPT)]
    prompt_text, responses = split_prompt(prompt, texts, ("`chosen`", "`rejected`"))
    if responses[0] == responses[1]:
        raise BadRowError("`chosen` and `rejected` are the same text, so the row says nothing; remove it")
    tie = row.get("tie")
    outcome = 2 if tie not in (None, "") and read_flag(tie, "`tie`") else 0
    yield Judgement(kind, prompt_text, responses, (outcome,), margin=read_margin(row), **_extras(row))


def _parse_verdict(row: Row, kind: str) -> Iterator[Judgement]:
    names = ("response_a", "response_b")
    texts = [row[present(row, name)] for name in names]
    prompt = None if not any(name in row for name in PROMPT) else row[present(row, *PROMPT)]
    prompt_text, responses = split_prompt(prompt, texts, ("`response_a`", "`response_b`"))
    if responses[0] == responses[1]:
        raise BadRowError("`response_a` and `response_b` are the same text, so the row says nothing; remove it")
    winner = row[present(row, "winner")]
    verdict = None if isinstance(winner, bool) else _VERDICTS.get(str(winner).strip().lower())
    if verdict is None:
        raise BadRowError(f"`winner` is {shorten_repr(winner)}; accepted are {', '.join(map(repr, _VERDICTS))}")
    yield Judgement(kind, prompt_text, responses, (verdict,), margin=read_margin(row), **_extras(row))


def _candidates(row: Row, values: Sequence[Any], name: str) -> tuple[Text, list[Text]]:
    """Reads the prompt and at least two different candidates."""
    if len(values) < 2:
        raise BadRowError(f"{name} has {len(values)} entries; a comparison needs at least 2")
    prompt = row[present(row, *PROMPT)]
    prompt_text, responses = split_prompt(prompt, values, [f"{name}[{place}]" for place in range(len(values))])
    if len(set(responses)) < len(responses):
        first = next(place for place, text in enumerate(responses) if text in responses[:place])
        raise BadRowError(f"{name}[{first}] repeats {name}[{responses.index(responses[first])}]; remove one of them")
    return prompt_text, responses


def _parse_choice(row: Row, kind: str) -> Iterator[Judgement]:
    prompt, responses = _candidates(row, read_list(row[present(row, "responses")], "`responses`"), "`responses`")
    outcome = read_choice(row, len(responses), "responses")
    margin = read_margin(row)
    if margin is not None and len(responses) > 2:
        raise BadRowError(f"`margin` is {margin}, but there are {len(responses)} responses; only a pair has a margin")
    yield Judgement(kind, prompt, responses, (outcome,), margin=margin, **_extras(row))


def _parse_ranking(row: Row, kind: str) -> Iterator[Judgement]:
    prompt, responses = _candidates(row, read_list(row[present(row, "responses")], "`responses`"), "`responses`")
    places = read_list(row[present(row, "ranking")], "`ranking`")
    ranking = [read_integer(value, f"`ranking`[{place}]") for place, value in enumerate(places)]
    if not ranking:
        raise BadRowError("`ranking` is empty; give the indices of `responses`, best first")
    for value in ranking:
        if not 0 <= value < len(responses):
            raise BadRowError(
                f"`ranking` names response {value}, but there are {len(responses)} responses; "
                f"give indices from 0 to {len(responses) - 1}, best first"
            )
    if len(set(ranking)) < len(ranking):
        raise BadRowError(f"`ranking` is {ranking}, which names a response twice; name each at most once")
    yield Judgement(kind, prompt, responses, ranking, **_extras(row))


def _parse_approval(row: Row, kind: str) -> Iterator[Judgement]:
    prompt, response = read_single(row, ("completion", "response"))
    label = read_flag(row[present(row, "label")], "`label`")
    yield Judgement(kind, prompt, (response,), (int(label),), **_extras(row))


def _parse_rating(row: Row, kind: str) -> Iterator[Judgement]:
    prompt, response = read_single(row, ("response", "completion"))
    rating = read_integer(row[present(row, "rating")], "`rating`")
    yield Judgement(kind, prompt, (response,), (rating,), **_extras(row))


def read_single(row: Row, names: tuple[str, ...]) -> tuple[Text, Text]:
    """Reads the prompt and the one response of a row, which has one of `names`."""
    name = present(row, *names)
    prompt = row[present(row, *PROMPT)]
    prompt_text, responses = split_prompt(prompt, [row[name]], [f"`{name}`"])
    return prompt_text, responses[0]


def _parse_scored_completions(row: Row, kind: str) -> Iterator[Judgement]:
    completions = read_list(row[present(row, "completions")], "`completions`")
    responses, scores = [], []
    for place, completion in enumerate(completions):
        if not isinstance(completion, Mapping):
            raise BadRowError(f"`completions`[{place}] is of type {type(completion).__name__}; give a mapping")
        where = f"`completions`[{place}]"
        try:
            responses.append(completion[present(completion, "response", "completion", "text")])
            scores.append(completion[present(completion, "overall_score", "score", "rating")])
        except BadRowError as error:
            raise BadRowError(f"{where}: {error}") from None
    yield from _scored(row, kind, responses, scores, "`completions`")


def _parse_scored_lists(row: Row, kind: str) -> Iterator[Judgement]:
    responses = read_list(row[present(row, "responses")], "`responses`")
    scores = read_list(row[present(row, "scores")], "`scores`")
    if len(scores) != len(responses):
        raise BadRowError(f"`scores` has {len(scores)} entries and `responses` has {len(responses)}; give one each")
    yield from _scored(row, kind, responses, scores, "`responses`")


def _scored(row: Row, kind: str, values: list[Any], raw_scores: list[Any], name: str) -> Iterator[Judgement]:
    prompt, responses = _candidates(row, values, name)
    read = read_integer if kind == "rating" else read_number
    scores = [read(score, f"the score of {name}[{place}]") for place, score in enumerate(raw_scores)]
    extras = _extras(row)
    if kind == "rating":
        for response, score in zip(responses, scores, strict=True):
            yield Judgement(kind, prompt, (response,), (int(score),), **extras)
    elif kind == "ranking":
        if len(set(scores)) < len(scores):
            raise BadRowError(f'the scores {scores} have ties, which no ranking holds; pass kind="choice"')
        yield Judgement(kind, prompt, responses, sorted(range(len(scores)), key=lambda k: -scores[k]), **extras)
    else:
        for i, j in itertools.combinations(range(len(scores)), 2):
            outcome = 2 if scores[i] == scores[j] else int(scores[j] > scores[i])
            yield Judgement(kind, prompt, (responses[i], responses[j]), (outcome,), **extras)


#: Every format, in the order in which errors list them. Scored lists are read as choices by default, because all pairs
#: with equal scores as ties lose nothing of the order; a ranking cannot hold ties and a rating needs whole numbers.
FORMATS = (
    Format("preference pairs", (PROMPT, ("chosen",), ("rejected",)), ("choice",), _parse_pair, ("margin", "tie")),
    Format(
        "preference pairs with implicit prompt",
        (("chosen",), ("rejected",)),
        ("choice",),
        _parse_pair,
        ("margin", "tie"),
    ),
    Format(
        "pairs with a verdict",
        (("response_a",), ("response_b",), ("winner",)),
        ("choice",),
        _parse_verdict,
        ("margin", *PROMPT),
    ),
    Format("choice among responses", (PROMPT, ("responses",), ("choice",)), ("choice",), _parse_choice, ("margin",)),
    Format("ranked responses", (PROMPT, ("responses",), ("ranking",)), ("ranking",), _parse_ranking),
    Format(
        "scored completions", (PROMPT, ("completions",)), ("choice", "ranking", "rating"), _parse_scored_completions
    ),
    Format(
        "scored responses", (PROMPT, ("responses",), ("scores",)), ("choice", "ranking", "rating"), _parse_scored_lists
    ),
    Format("unpaired labels", (PROMPT, ("completion", "response"), ("label",)), ("approval",), _parse_approval),
    Format("ratings", (PROMPT, ("response", "completion"), ("rating",)), ("rating",), _parse_rating),
)

"""`bayesrm acquire`: the comparisons to label next."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jsonargparse import Namespace

from ..data import Comparisons
from ..data._fields import BadRowError, present
from ..data._prompts import split_prompt
from ..data.base import read_batches
from ..data.formats import PROMPT
from ..engines import NetworkDraws, Posterior
from ..errors import ArgumentError, DataError
from ..rewards import FeatureExtractor, ProjectedHead
from ..selection import (
    BALD,
    BestOptionUtility,
    DoubleThompson,
    Infomax,
    Pool,
    PredictiveEntropy,
    PromptEntropy,
    Random,
    Strategy,
    acquire,
    unlabelled_pairs,
)
from . import _files, _parser
from ._candidates import Candidates, holds_candidates, read_candidates, read_rows
from ._console import Console, dump
from ._runs import add_run, load_run

_STRATEGIES: Mapping[str, type[Any]] = {
    "bald": BALD,
    "infomax": Infomax,
    "predictive_entropy": PredictiveEntropy,
    "best_option_utility": BestOptionUtility,
    "double_thompson": DoubleThompson,
    "prompt_entropy": PromptEntropy,
    "random": Random,
}
_PAIRS = (("response_a", "response_b"), ("chosen", "rejected"))


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser(
        "acquire",
        "Chooses the comparisons to label next. Each line of the output holds `prompt`, `response_a` and `response_b`; "
        "with a column `winner` (a, b or tie) added, `bayesrm fit` reads it.",
    )
    add_run(parser)
    parser.add_argument(
        "pool",
        metavar="POOL",
        help="file with the columns `prompt` and `responses`, of which every pair may be chosen; or with one pair a "
        "row in `response_a` and `response_b` (or `chosen` and `rejected`), whose answers are not looked at",
    )
    parser.add_argument("-n", "--number", type=int, metavar="N", required=True, help="comparisons to choose")
    parser.add_argument(
        "--strategy", choices=list(_STRATEGIES), default="bald", help="what makes a comparison worth it"
    )
    parser.add_argument("--labelled", metavar="DATA", help="the comparisons labelled so far; they are not chosen again")
    parser.add_argument("--annotator", metavar="NAME", help="who will answer, where the likelihood tells raters apart")
    parser.add_argument("--beta", type=float, help="weight of the prompts' entropy in prompt_entropy")
    parser.add_argument("--num_neighbors", type=int, help="neighbours of a prompt in prompt_entropy")
    parser.add_argument("--num_draws", type=int, help="posterior draws by which comparisons are scored")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of the draws and of strategies that draw")
    parser.add_argument("--on-bad-row", choices=("raise", "skip"), default="raise", help="what to do with a bad row")
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", help="file for the comparisons, one a line")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Chooses, shows and writes."""
    strategy = make_strategy(settings.strategy, settings.beta, settings.num_neighbors)
    if settings.output is not None:
        _files.check_output_file(settings.output, ".jsonl", overwrite=settings.overwrite)
    posterior = load_run(settings)
    candidates, refused = read_pool(settings.pool, on_bad_row=settings.on_bad_row)
    try:
        data = unlabelled_pairs(candidates.prompts, candidates.responses, annotator=settings.annotator)
    except ArgumentError as error:
        # What it refuses is what the file holds.
        raise DataError(str(error), source=settings.pool) from error
    places = list(_places(candidates))
    labelled = None if settings.labelled is None else Comparisons.load(settings.labelled)
    rows = _open_rows(data, labelled)
    if not 1 <= settings.number <= len(rows):
        raise ArgumentError(f"`-n` is {settings.number}, and {len(rows)} comparisons of {settings.pool} can be chosen")
    data = data.select(rows)
    pool = make_pool(posterior, data, labelled, strategy, num_draws=settings.num_draws, seed=settings.seed)
    found = acquire(pool, strategy, settings.number, seed=settings.seed)
    chosen = [
        _shown(candidates, places[rows[row]], score)
        for row, score in zip(found.rows.tolist(), found.scores.tolist(), strict=True)
    ]
    if settings.output is not None:
        with _files.complete_files(_files.check_output_file(settings.output, ".jsonl", overwrite=True)) as (file,):
            file.write_text("".join(f"{dump(line)}\n" for line in chosen), encoding="utf-8")
    for line in chosen:
        console.say(_line(line))
    if refused:
        console.say(f"{len(refused)} rows refused; the first is row {refused[0][0]}: {refused[0][1]}")
    console.say(f"{len(chosen)} of {len(rows)} comparisons chosen by {settings.strategy}")
    if settings.output is not None:
        console.say(f"written to {settings.output}")
    console.result(
        {
            "command": "acquire",
            "run": settings.run,
            "strategy": settings.strategy,
            "comparisons": len(rows),
            "output": settings.output,
            "refused": [{"row": row, "reason": reason} for row, reason in refused],
            "chosen": chosen,
        }
    )


def make_strategy(name: str, beta: float | None, num_neighbors: int | None) -> Strategy:
    """The strategy with its settings.

    Raises:
        ArgumentError: A setting is not one of the strategy's, or has a value that is not accepted.

    Example:
        >>> make_strategy("prompt_entropy", 0.1, None).beta
        0.1
    """
    given = {k: v for k, v in (("beta", beta), ("num_neighbors", num_neighbors)) if v is not None}
    if given and name != "prompt_entropy":
        flag = next(iter(given))
        raise ArgumentError(
            f"`--{flag}` is {given[flag]}, but the strategy is {name}; it is a setting of --strategy prompt_entropy"
        )
    strategy: Strategy = _STRATEGIES[name](**given)
    return strategy


def read_pool(source: str, *, on_bad_row: str = "raise") -> tuple[Candidates, list[tuple[int, str]]]:
    """Reads what may be compared: prompts with candidates, or pairs as prompts with two candidates.

    Returns:
        The candidates, and index and reason of each row left out.

    Raises:
        DataError: The file or a row cannot be used; the message names them.
    """
    first = next(read_batches(source))
    columns = set().union(*first.rows)
    names = next((names for names in _PAIRS if columns.issuperset(names)), None)
    if names is None:
        if not holds_candidates(source):
            raise DataError(
                f"the columns {sorted(columns)} hold no comparisons; accepted are `prompt` and `responses` (a list, "
                "without feedback), or `response_a` and `response_b`, or `chosen` and `rejected`",
                source=source,
            )
        return read_candidates(source, on_bad_row=on_bad_row)

    def pair(row: Mapping[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
        prompt = row[present(row, *PROMPT)] if any(name in row for name in PROMPT) else None
        texts = [row[present(row, name)] for name in names]
        text, responses = split_prompt(prompt, texts, [f"`{name}`" for name in names])
        if responses[0] == responses[1]:
            raise BadRowError(f"`{names[0]}` and `{names[1]}` are the same text, so there is nothing to compare")
        yield text.decode(), [response.decode() for response in responses]

    kept, found, refused = read_rows(source, read_batches(source), pair, on_bad_row)
    return Candidates(kept, [prompt for prompt, _ in found], [responses for _, responses in found]), refused


def make_pool(
    posterior: Posterior,
    data: Comparisons,
    labelled: Comparisons | None,
    strategy: Strategy,
    *,
    num_draws: int | None,
    seed: int,
) -> Pool:
    """The pool with what the strategy needs to know of its prompts.

    Raises:
        ArgumentError: The strategy needs features of prompts, and the run has no encoder.
    """
    prompts: dict[str, Any] = {}
    if isinstance(strategy, PromptEntropy):
        extractor = getattr(posterior.program.reward, "features", None)
        if not isinstance(extractor, FeatureExtractor):
            raise ArgumentError("--strategy prompt_entropy needs features of the prompts, and the run has no encoder")
        alone = dataclasses.replace(extractor, inputs=("prompt",))
        prompts["prompt_features"] = _prompt_features(alone, data)
        if labelled is not None:
            prompts["labelled_features"] = _prompt_features(alone, labelled)[labelled.prompt_of_row]
    if not isinstance(posterior.program.head, ProjectedHead | NetworkDraws):
        # Those make features of their own; for others, this shows progress.
        data = data.with_features(posterior.program.encode(data, progress=True).numpy())
    return Pool.of(posterior, data, num_draws=num_draws, seed=seed, **prompts)


def _prompt_features(extractor: FeatureExtractor, data: Comparisons) -> np.ndarray:
    """Features of the prompts, read off one item of each."""
    items = np.unique(data.prompt_of_item, return_index=True)[1]
    texts = [data.text(int(item)) for item in items]
    return extractor.extract([prompt for prompt, _ in texts], [response for _, response in texts])


def _places(candidates: Candidates) -> Iterator[tuple[int, int, int]]:
    """Prompt and the two candidates of each row of `unlabelled_pairs`."""
    for prompt, responses in enumerate(candidates.responses):
        for i, j in itertools.combinations(range(len(responses)), 2):
            if responses[i] != responses[j]:
                yield prompt, i, j


def _open_rows(data: Comparisons, labelled: Comparisons | None) -> list[int]:
    """Rows whose pair was not labelled yet, whichever response came first."""
    if labelled is None:
        return list(range(len(data)))
    done = {key for group in labelled.groups() if group.label == "choice.2" for key in _keys(labelled, group.items)}
    return [row for row, key in enumerate(_keys(data, data.groups()[0].items)) if key not in done]


def _keys(data: Comparisons, items: Any) -> Iterator[tuple[str, frozenset[str]]]:
    for pair in items.tolist():
        texts = [data.text(item) for item in pair]
        yield json.dumps(texts[0][0]), frozenset(json.dumps(response) for _, response in texts)


def _shown(candidates: Candidates, place: tuple[int, int, int], score: float) -> dict[str, Any]:
    """One chosen comparison."""
    prompt, i, j = place
    return {
        "row": candidates.rows[prompt],
        "indices": [i, j],
        "prompt": candidates.prompts[prompt],
        "response_a": candidates.responses[prompt][i],
        "response_b": candidates.responses[prompt][j],
        "score": score,
    }


def _line(entry: Mapping[str, Any]) -> str:
    i, j = entry["indices"]
    prompt = entry["prompt"] if isinstance(entry["prompt"], str) else json.dumps(entry["prompt"], ensure_ascii=False)
    return f"row {entry['row']}: [{i}] against [{j}], score {entry['score']:.4f}  {' '.join(prompt.split())[:80]}"

"""The preference set that comes with the package: prompts with four responses ranked by hand."""

import dataclasses
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError, DataError
from .comparisons import Comparisons

_FILE = "quality_rankings.jsonl"
_SPLITS = ("in_domain", "out_of_domain", "all")


@dataclasses.dataclass(frozen=True)
class QualityPrompt:
    """One prompt of the shipped set.

    Attributes:
        id: Name of the prompt.
        subject: What it is about.
        out_of_domain: Whether its subject is held out to test how a model behaves away from its training data.
        prompt: The prompt.
        responses: Four responses from best to worst; length does not tell the rank.
        flaws: For each response but the best, why it is worse than the one before it.
        hacks: Long responses that please a naive reward model and help nobody: (text, kind).
    """

    id: str
    subject: str
    out_of_domain: bool
    prompt: str
    responses: tuple[str, ...]
    flaws: tuple[str, ...]
    hacks: tuple[tuple[str, str], ...] = ()


def load_quality_rankings(*, split: str = "in_domain", hacks: bool = False) -> list[QualityPrompt]:
    """Reads the shipped set.

    Args:
        split: `"in_domain"` for the subjects to train on, `"out_of_domain"` for those held out, or `"all"`.
        hacks: Whether to include the reward-hacking responses, which some prompts have; without, `hacks` is empty.

    Raises:
        ArgumentError: `split` is none of the three.
        DataError: The package was installed without the file, or the file is damaged.
    """
    if split not in _SPLITS:
        raise ArgumentError(f"`split` is {split!r}; accepted are {', '.join(map(repr, _SPLITS))}")
    file = importlib.resources.files(__package__) / _FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError("the file is missing; install the package again", source=_FILE) from None
    prompts = [_parse(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    wanted = [prompt for prompt in prompts if split == "all" or prompt.out_of_domain == (split == "out_of_domain")]
    return wanted if hacks else [dataclasses.replace(prompt, hacks=()) for prompt in wanted]


def quality_comparisons(prompts: Sequence[QualityPrompt], kind: str = "choice") -> Comparisons:
    """Turns ranked prompts into feedback.

    Args:
        prompts: What `load_quality_rankings` returns.
        kind: `"choice"` for all pairs of a prompt's responses (the better first), or `"ranking"` for one full ranking
            a prompt.

    Raises:
        ArgumentError: `kind` is neither, or there is no prompt.

    Example:
        >>> prompt = QualityPrompt("tea", "kitchen", False, "Tea?", ("Steep it.", "Boil it.", "Buy it."), ("a", "b"))
        >>> len(quality_comparisons([prompt])), len(quality_comparisons([prompt], kind="ranking"))
        (3, 1)
    """
    if kind not in ("choice", "ranking"):
        raise ArgumentError(f"`kind` is {kind!r}; accepted are 'choice' and 'ranking'")
    if not prompts:
        raise ArgumentError("`prompts` is empty; give at least one")
    rows = [
        {
            "prompt": prompt.prompt,
            "responses": list(prompt.responses),
            "scores": list(range(len(prompt.responses), 0, -1)),
        }
        for prompt in prompts
    ]
    return Comparisons.load(rows, kind=kind)


def _parse(line: str, number: int) -> QualityPrompt:
    try:
        row: dict[str, Any] = json.loads(line)
        return QualityPrompt(
            id=row["id"],
            subject=row["subject"],
            out_of_domain=row["out_of_domain"],
            prompt=row["prompt"],
            responses=tuple(row["responses"]),
            flaws=tuple(row["flaws"]),
            hacks=tuple((hack["text"], hack["kind"]) for hack in row["hacks"]),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"line {number} cannot be read ({type(error).__name__}: {error})", source=_FILE) from None

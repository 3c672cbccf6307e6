"""The arguments POLICY and PROMPTS: a language model with its flags, and a file of prompts."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from ..alignment import Policy, PolicyLoRA
from ..data._fields import BadRowError, present
from ..data._prompts import split_prompt
from ..data.base import read_batches
from ..data.formats import PROMPT
from ..errors import DataError
from . import _parser
from ._candidates import parse_candidates, read_rows

_NOT_FLAGS = ("path", "lora", "seed", "reference", "trust_remote_code")


def add_policy(parser: Any, *, trainable: bool) -> None:
    """Adds POLICY, `--reference` and the flags `--policy.*`; with `trainable`, those of new adapters too."""
    parser.add_argument("policy_source", metavar="POLICY", help="folder or hub id of a causal language model")
    parser.add_argument(
        "--reference", metavar="MODEL",
        help="folder or hub id of another model of the same kind as reference, for instance the one that an aligned "
        "policy came from; by default the policy itself, as it is at the start",
    )  # fmt: skip
    _parser.add_flags(parser, Policy.from_pretrained, "policy", "flags of the policy", skip=_NOT_FLAGS)
    if trainable:
        for field in dataclasses.fields(PolicyLoRA):
            if field.name in ("rank", "alpha", "dropout"):
                parser.add_argument(
                    f"--lora-{field.name}", type=int if field.name == "rank" else float,
                    help=f"{field.name} of new adapters; without --lora-rank the whole model is trained",
                )  # fmt: skip


def load_policy(settings: Namespace) -> Policy:
    """The policy that the command line names.

    Raises:
        ArgumentError: It cannot be loaded.
    """
    given = {name: settings.get(f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    lora = None
    if given["rank"] is not None:
        lora = PolicyLoRA(**{name: value for name, value in given.items() if value is not None})
    return Policy.from_pretrained(
        settings.policy_source, lora=lora, reference=settings.reference, seed=settings.seed,
        **settings.policy.as_dict(),
    )  # fmt: skip


def read_prompts(source: str, *, on_bad_row: str = "raise") -> tuple[list[Any], list[tuple[int, str]]]:
    """The prompts of a file with a column `prompt`, each once, and index and reason of each row left out.

    Raises:
        DataError: The file or a row cannot be used; the message names them.
    """
    _, found, refused = read_rows(source, _batches(source, "prompt"), _parse_prompt, on_bad_row)
    distinct: list[Any] = []
    seen = set()
    for prompt in found:
        key = repr(prompt)
        if key not in seen:
            seen.add(key)
            distinct.append(prompt)
    return distinct, refused


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Prompts with given responses.

    Attributes:
        prompts: Strings or lists of messages.
        responses: For each prompt, its responses.
        log_probs: Their log-probabilities under what drew them; `None` where the file has none.
        refused: Index and reason of each row left out.
    """

    prompts: list[Any]
    responses: list[list[Any]]
    log_probs: list[list[float]] | None
    refused: list[tuple[int, str]]


def read_proposals(source: str, *, on_bad_row: str = "raise") -> Proposals:
    """Reads the columns `prompt`, `responses` and, as `bayesrm propose` writes them, `log_probs`.

    Raises:
        DataError: The file or a row cannot be used; the message names them.
    """
    _, found, refused = read_rows(source, _batches(source, "responses"), _parse_proposals, on_bad_row)
    log_probs = [values for _, _, values in found]
    known = [values for values in log_probs if values is not None]
    if known and len(known) < len(found):
        raise DataError("some rows have `log_probs` and some have none; give them for all or for none", source=source)
    return Proposals([row[0] for row in found], [row[1] for row in found], known or None, refused)


def _parse_proposals(row: Mapping[str, Any]) -> Iterator[tuple[Any, list[Any], list[float] | None]]:
    for prompt, responses in parse_candidates(row):
        values = row.get("log_probs")
        if values is not None and (
            len(values) != len(responses) or not all(isinstance(v, int | float) and v <= 1e-3 for v in values)
        ):
            raise BadRowError("`log_probs` must hold a number of at most 0 for each of `responses`")
        yield prompt, responses, None if values is None else [float(v) for v in values]


def _batches(source: str, needed: str) -> Iterator[Any]:
    for batch in read_batches(source):
        named = set().union(*batch.rows)
        if batch.start == 0 and not (named & set(PROMPT) and (needed == "prompt" or needed in named)):
            raise DataError(
                f"the columns {sorted(named)} hold no prompts"
                + (" with responses" if needed == "responses" else "")
                + f"; accepted are `prompt`{' and `responses` (a list)' if needed == 'responses' else ''}",
                source=batch.source,
            )
        yield batch


def _parse_prompt(row: Mapping[str, Any]) -> Iterator[Any]:
    prompt, _ = split_prompt(row[present(row, *PROMPT)], ["-"], ["`prompt`"])
    yield prompt.decode()

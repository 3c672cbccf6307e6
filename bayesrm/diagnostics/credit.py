"""Which words earned the reward: credit of tokens as arrays, as a table in the terminal, and as a page."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ArgumentError, PersistenceError
from ..token_beliefs import TokenBelief
from ._credit_html import fragment, page


@dataclasses.dataclass(frozen=True, eq=False)
class Credit:
    """What each token of N responses is believed to have earned, padded to the longest of T tokens.

    In a notebook it shows itself as `credit_html` does, as text it is `credit_table`.

    Attributes:
        texts: The responses.
        tokens: Texts of the tokens of each response; those without characters are empty.
        spans: Offsets of each token's first character and the one after its last, shape `(N, T, 2)`.
        mean: Expected rewards, shape `(N, T)`, NaN at padding.
        std: Standard deviations, shape `(N, T)`, NaN at padding.
        positive: Probability that the reward is above 0, shape `(N, T)`, NaN at padding; 0.5 where it is 0 for certain.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    spans: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    positive: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def certainty(self) -> NDArray[np.float64]:
        """How certain the sign of each reward is, `|2 P(reward > 0) - 1|`, between 0 and 1, shape `(N, T)`."""
        values: NDArray[np.float64] = np.abs(2.0 * self.positive - 1.0)
        return values

    @property
    def has_uncertainty(self) -> bool:
        """Whether any reward is uncertain; a single fit, a mode, says nothing of how sure it is."""
        return bool(np.nanmax(self.std, initial=0.0) > 0.0)

    def __str__(self) -> str:
        return "\n\n".join(_table(self, row) for row in range(len(self)))

    def _repr_html_(self) -> str:
        return fragment(self, range(len(self)), _scale(self, range(len(self)), None))


def credit(belief: TokenBelief) -> Credit:
    """Credit of the tokens of responses.

    Args:
        belief: From a posterior's `predict_tokens`, or its `redistribute`.

    Raises:
        ArgumentError: It is a belief of another kind.

    Example:
        >>> belief = TokenBelief(
        ...     texts=("good bad",), spans=torch.tensor([[[0, 4], [4, 8]]]), mean=torch.tensor([[1.0, -2.0]]),
        ...     std=torch.tensor([[1.0, 1.0]]), mask=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> credit(belief).positive.round(3)
        array([[0.841, 0.023]])
    """
    if not isinstance(belief, TokenBelief):
        raise ArgumentError(
            f"`belief` is of type {type(belief).__name__}; give a TokenBelief, from a posterior's `predict_tokens`"
        )
    padding = ~belief.mask.numpy()
    values = (belief.mean, belief.total_std, _probability_positive(belief))
    mean, std, positive = (np.where(padding, np.nan, v.double().numpy()) for v in values)
    tokens = tuple(tuple(belief.tokens(row)) for row in range(len(belief)))
    return Credit(belief.texts, tokens, belief.spans.numpy(), mean, std, positive)


def _probability_positive(belief: TokenBelief) -> torch.Tensor:
    """P(reward > 0), averaged over the draws of what tokens share."""
    expected = belief.mean[None] if belief.draws is None else belief.draws
    certain = belief.std == 0
    z = expected.double() / torch.where(certain, 1.0, belief.std.double())
    # Keeps its digits far below 0, where `ndtr` of torch returns 0.
    tail = 0.5 * torch.special.erfc(-z / math.sqrt(2.0))
    return torch.where(certain, 0.5 * (1.0 + expected.double().sign()), tail).mean(0)


def credit_table(belief: TokenBelief, row: int = 0) -> str:
    """The tokens of a response with their rewards, one a line, for a terminal.

    A token is printed as Python writes a string, so that spaces and line ends show. The bar has a length in proportion
    to the mean, to the left of the axis below 0.

    Args:
        belief: From a posterior's `predict_tokens`.
        row: Which response.

    Raises:
        ArgumentError: There is no such response.

    Example:
        >>> belief = TokenBelief(
        ...     texts=("good bad",), spans=torch.tensor([[[0, 4], [4, 8]]]), mean=torch.tensor([[1.0, -2.0]]),
        ...     std=torch.tensor([[1.0, 1.0]]), mask=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> print(credit_table(belief))
        token      mean    std  P(>0)
        'good'   +1.000  1.000  0.841            |-----
        ' bad'   -2.000  1.000  0.023  ----------|
    """
    found = credit(belief)
    _rows(found, [row])
    return _table(found, row)


def _table(found: Credit, row: int, half: int = 10) -> str:
    names = [repr(token) if token else "(no text)" for token in found.tokens[row]]
    width = max([5, *map(len, names)])
    lines = [f"{'token':<{width}}  {'mean':>7}  {'std':>5}  {'P(>0)':>5}"]
    largest = _scale(found, [row], None)
    for t, name in enumerate(names):
        mean, std, positive = (float(values[row, t]) for values in (found.mean, found.std, found.positive))
        length = round(half * abs(mean) / largest)
        bar = f"{'-' * length:>{half}}|" if mean < 0 else f"{'':>{half}}|{'-' * length}"
        lines.append(f"{name:<{width}}  {mean:>+7.3f}  {std:>5.3f}  {positive:>5.3f}  {bar}")
    last = int(found.spans[row, len(names) - 1, 1]) if names else 0
    if found.texts[row][last:].strip():
        lines.append(f"(cut here: {len(found.texts[row]) - last} more characters were not read)")
    if not found.has_uncertainty:
        lines.append("(no uncertainty in this belief: the signs are not certain, their doubt was not computed)")
    return "\n".join(lines)


def credit_html(
    belief: TokenBelief,
    rows: Sequence[int] | None = None,
    *,
    title: str = "Which words earned the reward?",
    prompts: Sequence[str] | None = None,
    scale: float | None = None,
) -> str:
    """A page that shows the rewards of tokens over the text of each response; it fetches and runs nothing.

    The colour of a token is its mean reward, from orange (below 0) over white to blue, and its opacity is the certainty
    of the sign, `|2 P(reward > 0) - 1|`: what could as well be good as bad stays white. Tokens below 0 are underlined,
    so that the sign is not a matter of colour alone. Numbers show under the pointer and in a table below each response.
    A token without characters, such as the end of the sequence, is a mark of its own.

    Args:
        belief: From a posterior's `predict_tokens`.
        rows: Which responses, in this order; all by default.
        title: Heading of the page.
        prompts: What the responses of the belief answer, shown above them.
        scale: Mean reward of full colour; by default the largest absolute mean of the rows shown.

    Raises:
        ArgumentError: There is no such response, the prompts are of another number, or the scale is not positive.

    Example:
        >>> belief = TokenBelief(
        ...     texts=("good bad",), spans=torch.tensor([[[0, 4], [4, 8]]]), mean=torch.tensor([[1.0, -2.0]]),
        ...     std=torch.tensor([[1.0, 1.0]]), mask=torch.ones(1, 2, dtype=torch.bool),
        ... )
        >>> credit_html(belief).startswith("<!doctype html>")
        True
    """
    found = credit(belief)
    shown = _rows(found, rows)
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(found)):
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise ArgumentError(f"`prompts` has {count} entries for {len(found)} responses; give one for each")
    return page(title, fragment(found, shown, _scale(found, shown, scale), prompts))


def save_credit_html(
    belief: TokenBelief,
    path: str | os.PathLike[str],
    rows: Sequence[int] | None = None,
    *,
    title: str = "Which words earned the reward?",
    prompts: Sequence[str] | None = None,
    scale: float | None = None,
) -> Path:
    """Writes the page of `credit_html` to a file, whose folder is made where it is missing.

    Returns:
        The file.

    Raises:
        ArgumentError: As `credit_html`.
        PersistenceError: The file cannot be written.
    """
    source, file = credit_html(belief, rows, title=title, prompts=prompts, scale=scale), Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    except OSError as error:
        raise PersistenceError(f"cannot write {file}: {error}") from error
    return file


def _rows(found: Credit, rows: Any) -> list[int]:
    if rows is not None and (isinstance(rows, str) or not isinstance(rows, Iterable)):
        raise ArgumentError(f"`rows` is {rows!r}; give a list of responses, such as [0], or None for all")
    shown = list(range(len(found)) if rows is None else rows)
    for row in shown:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise ArgumentError(f"there is no response {row!r}; responses are counted from 0")
        if not 0 <= row < len(found):
            raise ArgumentError(f"there is no response {row}; the belief is about {len(found)}, counted from 0")
    return shown


def _scale(found: Credit, rows: Sequence[int], scale: float | None) -> float:
    if scale is None:
        means = np.abs(found.mean[list(rows)])
        scale = float(np.nanmax(means)) if np.isfinite(means).any() else 0.0
        # Where every mean is 0, nothing is coloured by any scale.
        return scale or 1.0
    if not 0.0 < scale < np.inf:
        raise ArgumentError(f"`scale` is {scale}; the mean reward of full colour is a positive number")
    return scale

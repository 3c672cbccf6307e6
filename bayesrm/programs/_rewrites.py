"""From comparisons and corrections to what a corrector should write."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64

from ..data import Comparisons, Corrections
from ..data.groups import FeedbackGroup
from ..data.rendering import Content
from ..errors import DataError

#: A response to be rewritten, what it should become, its prompt, and the row's weight; texts by their numbers.
_Mapping = tuple[int, int, int, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Rewrites:
    """Responses, and what a corrector should write when it reads them; equal ones are one row with their weights' sum.

    Attributes:
        prompts: The prompt of each of the N rows.
        responses: The response that is read.
        targets: The response that should be written.
        weight: Weight of each row's log-likelihood, shape `(N,)`, above 0.
        prompt_index: Prompt of each row as the data number them, shape `(N,)`.
        corrections: Rows whose target is another text than the response.
        tied_rows: Rows of the data that name no better response.
        masked_rows: Rows of the data with weight 0.
    """

    prompts: Sequence[Content]
    responses: Sequence[Content]
    targets: Sequence[Content]
    weight: Float64[np.ndarray, "n"]
    prompt_index: Int64[np.ndarray, "n"]
    corrections: int
    tied_rows: int
    masked_rows: int

    def __len__(self) -> int:
        return len(self.weight)


def rewrites_of(data: Comparisons | Corrections, *, correction_weight: float, identity_weight: float) -> Rewrites:
    """Correction mappings (worse response to better one) and identity mappings (better one to itself) of data.

    Raises:
        DataError: A row is of a kind that names no better response, there are no texts, or nothing is left to learn.
    """
    prompts = np.asarray(data.prompt_of_row)
    weights: dict[tuple[int, int, int], float] = {}
    tied = 0
    if isinstance(data, Comparisons):
        texts = [data.text(item) for item in range(data.num_items)]
        if not any(response for _, response in texts):
            raise DataError("the data are features without texts; a corrector reads and writes texts")
        groups = data.groups()
        tied = sum(
            int(((g.outcome == g.items.shape[1]) & (g.weight > 0)).sum()) for g in groups if g.outcome.dim() == 1
        )
        found = [pair for g in groups for pair in _pairs(g)]
    else:
        texts, found = _corrections(data)
    for worse, better, row, weight in found:
        mappings = [(worse, correction_weight), (better, identity_weight)]
        # A response that was left as it is shows what to keep, and nothing to correct.
        for source, factor in mappings[1:] if worse == better else mappings:
            if weight * factor > 0.0:
                key = (int(prompts[row]), source, better)
                weights[key] = weights.get(key, 0.0) + weight * factor
    if not weights:
        raise DataError(
            f"no row names a better response with a positive weight ({tied} of {len(data)} rows are ties); there is "
            "nothing to learn to write"
        )
    return Rewrites(
        [texts[source][0] for _, source, _ in weights],
        [texts[source][1] for _, source, _ in weights],
        [texts[better][1] for _, _, better in weights],
        np.array(list(weights.values())),
        np.array([prompt for prompt, _, _ in weights], dtype=np.int64),
        sum(source != better for _, source, better in weights),
        tied,
        _masked(data),
    )


def _pairs(group: FeedbackGroup) -> Iterator[_Mapping]:
    """Each worse candidate of a row with the row's best one."""
    kind, count = group.comparison.kind, group.items.shape[1]
    if kind not in ("choice", "ranking"):
        raise DataError(
            f"row {int(group.rows[0])} is a {kind}, which names no better response to the same prompt; give choices, "
            "rankings or corrections (scored responses can be read as choices)"
        )
    best = group.outcome if kind == "choice" else group.outcome[:, 0]
    for candidates, chosen, row, weight in zip(
        group.items.tolist(), best.tolist(), group.rows.tolist(), group.weight.tolist(), strict=True
    ):
        if chosen == count:
            continue
        for place, item in enumerate(candidates):
            if place != chosen:
                yield item, candidates[chosen], row, weight


def _corrections(data: Corrections) -> tuple[list[tuple[Content, Content]], list[_Mapping]]:
    """The distinct texts with their prompts, and each response with its corrected form."""
    texts: list[tuple[Content, Content]] = []
    numbers: dict[str, int] = {}
    found = []
    for row in range(len(data)):
        prompt, *both = data.text(row)
        places = []
        for text in both:
            # Messages cannot be keys.
            places.append(numbers.setdefault(repr((prompt, text)), len(texts)))
            if places[-1] == len(texts):
                texts.append((prompt, text))
        found.append((places[0], places[1], row, float(data.weight[row])))
    return texts, found


def _masked(data: Comparisons | Corrections) -> int:
    if isinstance(data, Corrections):
        return int((data.weight == 0).sum())
    return sum(int(torch.count_nonzero(g.weight == 0)) for g in data.groups())

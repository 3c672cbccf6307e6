"""An approximate structure against the full posterior, on comparisons that are given to neither.

Directions of a sketch and the mode are those of all comparisons, the asked ones too, so that the check is a little
kinder than comparisons of new prompts would be. Latents are held at their mode on both sides.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from .._typing import Tensor
from ..data.groups import FeedbackGroup
from ..rewards._subspaces import Covariance, Subspace
from ._curvature import Curvature

#: Comparisons that both posteriors are conditioned on, and comparisons they are asked about.
_GIVEN, _ASKED = 768, 256


@dataclasses.dataclass(frozen=True)
class CheckedRows:
    """Rows drawn for the check, as items of a small table.

    Attributes:
        items: Items of the rows, shape `(n,)`: what to take the derivatives of.
        groups: The rows that are given, items numbered by their place in `items`.
        blocks: Their curvature.
        first: Places of the first items of the rows that are asked about.
        second: Places of the second items, -1 for a row of one item.
    """

    items: Tensor
    groups: list[FeedbackGroup]
    blocks: list[Tensor]
    first: Tensor
    second: Tensor

    @classmethod
    def draw(cls, groups: Sequence[FeedbackGroup], c: Curvature, limit: int, seed: int) -> "CheckedRows":
        """At most `limit` rows at random, three quarters of them given and the rest asked about."""
        generator = torch.Generator().manual_seed(seed)
        counts = [min(len(g.items), max(2, limit // len(groups)), (_GIVEN + _ASKED) // len(groups)) for g in groups]
        given, blocks, pairs, items = [], [], [], []
        for g, block, count in zip(groups, c.rewards, counts, strict=True):
            live = (g.weight > 0).nonzero()[:, 0]
            rows = live[torch.randperm(len(live), generator=generator)[:count]]
            count = len(rows)
            asked, kept = rows[: max(1, count // 4)], rows[max(1, count // 4) :]
            given.append(dataclasses.replace(g, items=g.items[kept], outcome=g.outcome[kept], weight=g.weight[kept]))
            blocks.append(block[kept])
            chosen = g.items[asked]
            if chosen.shape[1] > 1:
                places = torch.rand(chosen.shape, generator=generator).argsort(1)[:, :2]
                pairs.append(chosen.gather(1, places))
            else:
                pairs.append(torch.stack([chosen[:, 0], torch.full_like(chosen[:, 0], -1)], dim=1))
            items += [g.items[rows].reshape(-1)]
        unique = torch.unique(torch.cat(items))
        place = torch.full((int(unique.max()) + 2,), -1)
        place[unique] = torch.arange(len(unique))
        asked_pairs = torch.cat(pairs)
        second = torch.where(asked_pairs[:, 1] >= 0, place[asked_pairs[:, 1]], torch.full_like(asked_pairs[:, 1], -1))
        return cls(
            unique,
            [dataclasses.replace(g, items=place[g.items]) for g in given],
            blocks,
            place[asked_pairs[:, 0]],
            second,
        )

    def information(self) -> Tensor:
        """Curvature of the given rows in the rewards of all items, shape `(n, n)`."""
        total = torch.zeros(len(self.items), len(self.items), dtype=torch.float64)
        for g, block in zip(self.groups, self.blocks, strict=True):
            k = g.items.shape[1]
            rows = g.items[:, :, None].expand(-1, k, k).reshape(-1)
            columns = g.items[:, None, :].expand(-1, k, k).reshape(-1)
            total.index_put_((rows, columns), block.reshape(-1), accumulate=True)
        return total

    def variances(self, covariance: Tensor) -> Tensor:
        """Variances of the differences (or rewards) asked about, from the covariance of all items."""
        diagonal = covariance.diagonal()
        single = self.second < 0
        second = self.second.clamp_min(0)
        pair = diagonal[self.first] + diagonal[second] - 2 * covariance[self.first, second]
        return torch.where(single, diagonal[self.first], pair)


def check_structure(
    rows: CheckedRows,
    whitened: Tensor,
    subspace: Subspace | None,
    make_rest: Callable[[Tensor, Sequence[FeedbackGroup], Sequence[Tensor]], Covariance] | None,
) -> dict[str, float]:
    """Compares variances of the asked rows under the structure and under `full`, both given the same rows.

    Args:
        rows: The rows.
        whitened: Whitened derivatives of `rows.items`, shape `(n, P)`.
        subspace: Directions of a sketch, or `None`.
        make_rest: Makes the covariance of a structure without coordinates from derivatives, groups and blocks.

    Returns:
        `variance_ratio` (median of structure over full), `rank_correlation`, `correlation` and `num_probes`.
    """
    information = rows.information()
    double = whitened.double()
    gram = (double @ double.T).cpu()
    exact = rows.variances(_conditioned(gram, information))
    if make_rest is not None:
        approximate = rows.variances(make_rest(whitened, rows.groups, rows.blocks).covariance(whitened).cpu())
    else:
        assert subspace is not None
        inside = subspace.coordinates(whitened).double().cpu()
        inner = inside @ inside.T
        approximate = rows.variances(_conditioned(inner, information) + gram - inner)
    ranks = torch.stack([v.argsort().argsort() for v in (exact, approximate)]).double()
    several = len(exact) > 2
    return {
        "variance_ratio": float((approximate / exact).median()),
        "rank_correlation": float(torch.corrcoef(ranks)[0, 1]) if several else float("nan"),
        "correlation": float(torch.corrcoef(torch.stack([exact, approximate]))[0, 1]) if several else float("nan"),
        "num_probes": float(len(exact)),
    }


def _conditioned(gram: Tensor, information: Tensor) -> Tensor:
    """Posterior covariance of rewards with prior covariance `gram`, given curvature `information`."""
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0.0).sqrt()
    precision = torch.eye(len(gram), dtype=gram.dtype) + root.T @ information @ root
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(precision), root.T, upper=False)
    covariance: Tensor = solved.T @ solved
    return covariance

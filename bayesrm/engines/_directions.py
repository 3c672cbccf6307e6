"""Leading directions, on either side of every weight matrix, of the derivatives of whole comparisons."""

from collections.abc import Iterator, Sequence

import torch

from .._typing import Tensor
from ..rewards._subspaces import Sketch
from ._processes import Processes

#: Up to this size of a side its second moment is kept whole; above, its product with random test vectors.
_WHOLE = 1024


class _Side:
    """Second moment of the rows that pass by, or enough of it for its leading eigenvectors.

    Above `_WHOLE` rows this is the single-pass Nystroem sketch of a positive semi-definite matrix (Tropp et al.,
    "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", 1706.05736).
    """

    def __init__(self, size: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        self.rank = min(rank, size)
        self.test: Tensor | None = None
        if size > _WHOLE:
            drawn = torch.randn(size, 2 * self.rank + 8, generator=generator, dtype=torch.float64)
            self.test = torch.linalg.qr(drawn)[0].to(device)
        width = size if self.test is None else self.test.shape[1]
        self.sum = torch.zeros(size, width, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Adds rows' rows, shape `(n, size)`."""
        moment = rows.T @ (rows if self.test is None else rows @ self.test.to(rows.dtype))
        self.sum += moment.double()

    def directions(self) -> Tensor:
        """Orthonormal columns, shape `(size, rank)`."""
        if self.rank == len(self.sum):
            return torch.eye(self.rank, dtype=self.sum.dtype, device=self.sum.device)
        if self.test is None:
            leading: Tensor = torch.linalg.eigh(0.5 * (self.sum + self.sum.T))[1][:, -self.rank :]
            return leading
        core = self.test.T @ self.sum
        values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
        kept = values > 1e-12 * values.amax().clamp_min(1e-300)
        factor = (self.sum @ vectors[:, kept]) / values[kept].sqrt()
        found: Tensor = torch.linalg.svd(factor, full_matrices=False)[0][:, : self.rank]
        return found


def leading_directions(
    shapes: Sequence[tuple[int, ...]],
    differences: Iterator[Tensor],
    rank: int,
    *,
    processes: Processes,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Sketch:
    """The sketch of weight matrices with the given shapes.

    A side no longer than `rank` is kept whole; the other side of a matrix with one row gets up to `rank**2` directions,
    as many as a larger matrix has in all.

    Args:
        shapes: Shapes of the parameter sites, in order; a vector counts as a matrix with one row.
        differences: Derivatives of comparisons, shape `(n, P)` each, of this process.
        rank: Directions on each side.
        processes: Processes to sum over.
        device: Where the derivatives are.
        dtype: Number format of the result.
        seed: Seed of the random test vectors of long sides.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [shape if len(shape) == 2 else (1, int(torch.Size(shape).numel())) for shape in shapes]
    sides = []
    for m, n in matrices:
        ranks = (rank**2 if n == 1 else rank), (rank**2 if m == 1 else rank)
        sides.append((_Side(m, ranks[0], generator, device), _Side(n, ranks[1], generator, device)))
    sizes = [m * n for m, n in matrices]
    for block in differences:
        for part, (m, n), (left, right) in zip(block.split(sizes, dim=1), matrices, sides, strict=True):
            stack = part.reshape(-1, m, n)
            if left.rank < m:
                left.add(stack.transpose(1, 2).reshape(-1, m))
            if right.rank < n:
                right.add(stack.reshape(-1, n))
    for pair in sides:
        for side in pair:
            side.sum = processes.total(side.sum)
    return Sketch([u.directions().to(dtype) for u, _ in sides], [v.directions().to(dtype) for _, v in sides])

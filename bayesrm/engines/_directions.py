"""Leading directions, on either side of every weight matrix, of the derivatives of whole comparisons."""

from collections.abc import Sequence

import torch

from .._typing import Tensor
from ..rewards._subspaces import Sketch
from ._processes import Processes

#: Up to this size of a side its second moment is kept whole; above, its product with random test vectors.
_WHOLE = 1024


def side_numbers(size: int, rank: int) -> int:
    """Numbers that the sums of a side of length `size` take."""
    return size * size if size <= _WHOLE else 2 * size * (2 * min(rank, size) + 8)


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


class LeadingDirections:
    """Sums from which the sketch of weight matrices comes.

    A side no longer than `rank` is kept whole; the other side of a matrix with one row gets up to `rank**2` directions,
    as many as a larger matrix has in all.

    Args:
        shapes: Shapes of the parameter sites, in order; a vector counts as a matrix with one row.
        rank: Directions on each side.
        device: Where the derivatives are.
        seed: Seed of the random test vectors of long sides.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int, *, device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._matrices = [shape if len(shape) == 2 else (1, int(torch.Size(shape).numel())) for shape in shapes]
        self._sides = []
        for m, n in self._matrices:
            ranks = (rank**2 if n == 1 else rank), (rank**2 if m == 1 else rank)
            self._sides.append((_Side(m, ranks[0], generator, device), _Side(n, ranks[1], generator, device)))

    @property
    def state(self) -> dict[str, Tensor]:
        """The sums, by name."""
        return {f"{i}.{kind}": s.sum for i, p in enumerate(self._sides) for kind, s in zip("uv", p, strict=True)}

    def add(self, block: Tensor) -> None:
        """Adds derivatives of comparisons, shape `(n, P)`."""
        sizes = [m * n for m, n in self._matrices]
        for part, (m, n), (left, right) in zip(block.split(sizes, dim=1), self._matrices, self._sides, strict=True):
            stack = part.reshape(-1, m, n)
            if left.rank < m:
                left.add(stack.transpose(1, 2).reshape(-1, m))
            if right.rank < n:
                right.add(stack.reshape(-1, n))

    def sketch(self, processes: Processes, dtype: torch.dtype) -> Sketch:
        """The sketch, from the sums of all processes."""
        for pair in self._sides:
            for side in pair:
                side.sum = processes.total(side.sum)
        left, right = zip(*((u.directions().to(dtype), v.directions().to(dtype)) for u, v in self._sides), strict=True)
        return Sketch(left, right)

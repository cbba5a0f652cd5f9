"""What a pack's factors say of its edits, in numbers: how alike and how crowded its rows are.

In: an update Delta = B A, whose rows of A are projected keys. Out: :class:`RowFigures`, from
G = A A^T in float64, for the first ``MAX_ROWS`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta

MAX_ROWS = 2000  # an eigendecomposition of n x n beyond it takes minutes


@dataclass(frozen=True, eq=False)
class RowFigures:
    """The rows of A at one module.

    Args:
        rows: how many were looked at.
        rank: how many of them are independent.
        condition: largest by smallest eigenvalue of A A^T; inf where rows are dependent, 1 without
            rows.
        cosines: (rows, rows), float64; 0 for a row of zeros.
        in_common: (rows,), the share of each row that the others span, |Pi a|^2 / |a|^2: what
            removing its edit from the pack alone leaves in force.
    """

    rows: int
    rank: int
    condition: float
    cosines: Tensor
    in_common: Tensor

    def closest(self, number: int) -> list[tuple[float, int, int]]:
        """The pairs of rows with the largest cosines: (cosine, row, row), the largest first."""
        i, j = torch.triu_indices(self.rows, self.rows, offset=1)
        values = self.cosines[i, j]
        found = values.topk(min(number, len(values)))
        pairs = zip(i[found.indices].tolist(), j[found.indices].tolist(), strict=True)
        return [(value, *pair) for value, pair in zip(found.values.tolist(), pairs, strict=True)]


def row_figures(delta: LowRankDelta) -> RowFigures:
    """Figures of the first ``MAX_ROWS`` rows of an update.

    The distance of row i from the others' span is 1 / (G^-1)_ii, so that it shares
    1 - 1 / (G_ii (G^-1)_ii) with them.
    """
    A = delta.A[:MAX_ROWS].double()
    G = A @ A.T  # (n, n)
    size = G.diagonal()
    values, vectors = torch.linalg.eigh(_unit(G, size))  # of the rows at length 1
    zeros = int((size == 0).sum())
    bound = len(A) * torch.finfo(torch.float32).eps  # what float32 rows can tell from 0
    rank = int((values > bound).sum())
    inverse = (vectors.square() / values.clamp_min(bound)).sum(1)
    alone = torch.where(size > 0, 1 / inverse.clamp_min(1.0), 1.0)
    full = torch.linalg.eigvalsh(G) if len(G) else torch.ones(1)
    dependent = rank < len(A) or zeros > 0
    condition = float("inf") if dependent else float(full[-1] / full[0])
    return RowFigures(len(A), rank, condition, _unit(G, size), 1 - alone)


def histogram(values: Tensor, low: float, high: float, bins: int) -> list[tuple[str, int]]:
    """How many values lie in each of equal parts of low..high, with the parts' names."""
    counts = torch.histc(values.double().clamp(low, high), bins, low, high)
    step = (high - low) / bins
    names = [f"{low + i * step:.1f} to {low + (i + 1) * step:.1f}" for i in range(bins)]
    return list(zip(names, map(int, counts.tolist()), strict=True))


def _unit(G: Tensor, size: Tensor) -> Tensor:
    """Cosines from G = A A^T, with zeros for rows of zeros."""
    scale = torch.where(size > 0, size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt(), 0.0)
    return G * scale[:, None] * scale[None, :]

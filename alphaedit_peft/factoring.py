"""The Cholesky factor of G + D, kept from batch to batch and extended by each new one.

In: rows of A batch by batch, their Gram matrix, one ridge a row. Out: :class:`KeptFactor`, a value
that solves (G + D) S = E^T for the last batch's rows. With n rows in place, u new ones cost
n u d_in for their products with the others (the caller's) and n^2 u here, instead of n^2 d_in and
n^3 anew. Equation: with M = G + D in blocks, one for each batch,

    L21 = M21 L11^-T,    L22 L22^T = M22 - L21 L21^T,

so that the factor of the first batches never changes while their rows and ridges stay. It is always
made block by block: what is kept and what is made anew from the same rows have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from alphaedit_peft import algebra


@dataclass(frozen=True)
class KeptFactor:
    """G + D = L L^T for the rows of one layer, in float64.

    Args:
        rows: A, (n, d_in), that the rest belongs to.
        blocks: how many rows each batch has, n in all.
        gram: G, (n, n).
        ridges: D, (n,); infinity takes a row out: its part of L is the identity's.
        lower: L, (m, m): of the blocks before the first one where G + D is not positive definite.
    """

    rows: Tensor
    blocks: tuple[int, ...]
    gram: Tensor
    ridges: Tensor
    lower: Tensor

    @classmethod
    def empty(cls, rows: Tensor) -> KeptFactor:
        """Of no row yet; ``rows`` (n, d_in) tells device, dtype and width."""
        none = torch.zeros(0, 0, dtype=torch.float64, device=rows.device)
        return cls(rows[:0], (), none, none.new_zeros(0), none)

    def gram_of(self, rows: Tensor) -> Tensor | None:
        """G where it is that of exactly these rows (n, d_in), else None."""
        whole = self.matching(rows, self.blocks)
        return whole.gram if len(whole.ridges) == len(rows) else None

    def matching(self, rows: Tensor, blocks: Sequence[int]) -> KeptFactor:
        """The leading blocks that are also those of ``rows`` (n, d_in), bit for bit."""
        if (rows.device, rows.dtype) != (self.rows.device, self.rows.dtype):
            return KeptFactor.empty(rows)
        count = min(len(rows), len(self.rows))
        same = (rows[:count] == self.rows[:count]).all(1)
        equal = count if bool(same.all()) else int((~same).nonzero()[0])
        kept = 0
        for end, mine, theirs in zip(accumulate(blocks), self.blocks, blocks, strict=False):
            if mine != theirs or end > equal:
                break
            kept += 1
        n = sum(blocks[:kept])
        return KeptFactor(
            rows[:n],
            tuple(blocks[:kept]),
            self.gram[:n, :n],
            self.ridges[:n],
            self.lower[:n, :n],
        )

    def extended(self, rows: Tensor, cross: Tensor, gram: Tensor) -> KeptFactor:
        """One more block, whose ridges ``factored`` is to say.

        Args:
            rows: (n + u, d_in), all rows with the new ones last.
            cross: (n, u), the products of the rows so far with them.
            gram: (u, u), their own.
        """
        n, u = cross.shape
        whole = gram.new_empty(n + u, n + u)
        whole[:n, :n], whole[:n, n:], whole[n:, :n], whole[n:, n:] = self.gram, cross, cross.T, gram
        ridges = torch.cat([self.ridges, self.ridges.new_full((u,), torch.nan)])
        return KeptFactor(rows, (*self.blocks, u), whole, ridges, self.lower)

    def factored(self, ridges: Tensor) -> KeptFactor:
        """The same rows with these ridges, (n,); blocks are made anew from the first change on."""
        changed = (ridges != self.ridges).nonzero()
        first = int(changed[0]) if len(changed) else len(ridges)
        ends = list(accumulate(self.blocks))
        starts = [0, *ends[:-1]]
        done = max((end for end in ends if end <= min(first, len(self.lower))), default=0)
        lower = torch.zeros_like(self.gram)
        lower[:done, :done] = self.lower[:done, :done]
        for start, end in zip(starts, ends, strict=True):
            if start < done:
                continue
            if not _factor_block(lower, self.gram, ridges, start, end):
                break
            done = end
        return replace(self, ridges=ridges, lower=lower[:done, :done])

    def at_once(self, ridges: Tensor) -> KeptFactor:
        """As ``factored``, as one block: faster where every ridge changes, and not to be kept."""
        none = self.lower[:0, :0]
        return replace(self, blocks=(len(ridges),), lower=none).factored(ridges)

    def columns(self, count: int) -> Tensor:
        """S = (G + D)^-1 E^T, (n, count), where E picks the last ``count`` rows: the last block.

        Where G + D is singular, or so nearly that float64 cannot tell, it is the least-norm
        solution, from an eigen-decomposition.
        """
        n = len(self.ridges)
        chosen = torch.zeros(n, count, dtype=torch.float64, device=self.gram.device)
        chosen[n - count :] = torch.eye(count, dtype=torch.float64, device=self.gram.device)
        active = self.ridges.isfinite()
        if self._is_sound(active):
            # the first rows of L^-1 E^T are zero, as those of E^T are
            corner = self.lower[n - count :, n - count :]
            chosen[n - count :] = torch.linalg.solve_triangular(
                corner, chosen[n - count :], upper=False
            )
            return torch.linalg.solve_triangular(self.lower.T, chosen, upper=True)
        matrix = self.gram[active][:, active] + self.ridges[active].diag()
        found = torch.zeros_like(chosen)
        found[active] = algebra.solve_symmetric(matrix, chosen[active])
        return found

    def _is_sound(self, active: Tensor) -> bool:
        if len(self.lower) < len(self.ridges):
            return False
        scale = (self.gram.diagonal() + self.ridges)[active]
        pivots = self.lower.diagonal()[active].square()
        return bool((pivots > algebra.SMALL_PIVOT * scale.amax()).all()) if len(scale) else True


def _factor_block(lower: Tensor, gram: Tensor, ridges: Tensor, start: int, end: int) -> bool:
    """Fill rows ``start`` to ``end`` of L; false where the block is not positive definite."""
    active = ridges[:end].isfinite()
    within, before = active[start:].double(), active[:start].double()
    left = gram[start:end, :start] * within[:, None] * before  # M21
    corner = gram[start:end, start:end] * within[:, None] * within
    corner.diagonal().add_(torch.where(active[start:], ridges[start:end], 1.0))  # M22
    left = torch.linalg.solve_triangular(lower[:start, :start], left.T, upper=False).T
    found, info = torch.linalg.cholesky_ex(corner - left @ left.T)
    if int(info) != 0:
        return False
    lower[start:end, :start], lower[start:end, start:end] = left, found
    return True

"""The Cholesky factor of G + D, kept from batch to batch and extended by each new one.

In: rows of A batch by batch, their products, one ridge a row. Out: :class:`KeptFactor`, a value
that solves (G + D) S = E^T for the last batch's rows. With n rows in place, u new ones cost
n u d_in for their products with the others (the caller's) and n^2 u here, instead of n^2 d_in and
n^3 anew. Equation: with M = G + D in blocks, one for each batch,

    L21 = M21 L11^-T,    L22 L22^T = M22 - L21 L21^T,

so that the factor of the first batches never changes while their rows and ridges stay. G and L are
held as the rows of each batch up to its own diagonal: a batch adds its own and copies no other, and
what is kept and what is made anew from the same rows take the same steps and have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from alphaedit_peft import algebra

PART = 64  # rows: smaller blocks of L are put together until they are as many


@dataclass(frozen=True)
class KeptFactor:
    """G + D = L L^T for the rows of one layer, in float64.

    Args:
        rows: A, (n, d_in), that the rest belongs to.
        grams: the rows of G that each batch of u rows has, (u, end), up to its own last column.
        ridges: D, (n,); infinity takes a row out: its part of L is the identity's.
        lowers: L likewise, in parts of one or more whole batches, up to the first batch where
            G + D is not positive definite.
    """

    rows: Tensor
    grams: tuple[Tensor, ...]
    ridges: Tensor
    lowers: tuple[Tensor, ...]

    @classmethod
    def empty(cls, rows: Tensor) -> KeptFactor:
        """Of no row yet; ``rows`` (n, d_in) tells device, dtype and width."""
        return cls(rows[:0], (), torch.zeros(0, dtype=torch.float64, device=rows.device), ())

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many rows each batch has, n in all."""
        return tuple(len(part) for part in self.grams)

    @property
    def gram(self) -> Tensor:
        """G, (n, n), written out."""
        whole = _square(self.grams, self.ridges)
        for part, start, end in _placed(self.grams):
            whole[:start, start:end] = part[:, :start].T
        return whole

    @property
    def lower(self) -> Tensor:
        """L, (m, m), written out, for the m rows that have one."""
        return _square(self.lowers, self.ridges)

    @property
    def squares(self) -> Tensor:
        """The diagonal of G, (n,)."""
        return _diagonal(self.grams, self.ridges)

    def gram_of(self, rows: Tensor) -> Tensor | None:
        """G where it is that of exactly these rows (n, d_in), else None."""
        whole = self.matching(rows, self.blocks)
        return whole.gram if len(whole.ridges) == len(rows) else None

    def matching(self, rows: Tensor, blocks: Sequence[int]) -> KeptFactor:
        """The leading blocks that are also those of ``rows`` (n, d_in), bit for bit."""
        equal, kept = equal_rows(self.rows, rows), 0
        for end, mine, theirs in zip(accumulate(blocks), self.blocks, blocks, strict=False):
            if mine != theirs or end > equal:
                break
            kept += 1
        n = sum(blocks[:kept])
        return KeptFactor(rows[:n], self.grams[:kept], self.ridges[:n], _until(self.lowers, n))

    def extended(self, rows: Tensor, grams: Sequence[Tensor]) -> KeptFactor:
        """More blocks, whose ridges ``factored`` is to say.

        Args:
            rows: (n + ..., d_in), all rows with the new ones last.
            grams: for each new block of u rows their products with all rows up to its own last,
                (u, n + ... + u).
        """
        ridges = self.ridges.new_full((len(rows),), torch.nan)
        ridges[: len(self.ridges)] = self.ridges
        return KeptFactor(rows, (*self.grams, *grams), ridges, self.lowers)

    def factored(self, ridges: Tensor) -> KeptFactor:
        """The same rows with these ridges, (n,); blocks are made anew from the first change on."""
        changed = (ridges != self.ridges).nonzero()
        first = int(changed[0]) if len(changed) else len(ridges)
        lowers = _until(self.lowers, first)
        done = lowers[-1].shape[1] if lowers else 0
        for gram in self.grams:
            if gram.shape[1] <= done:
                continue
            made = _factor_block(lowers, gram, ridges)
            if made is None:
                break
            lowers = _with_block(lowers, made)
        return replace(self, ridges=ridges, lowers=lowers)

    def at_once(self, ridges: Tensor) -> KeptFactor:
        """As ``factored``, as one block: faster where every ridge changes, and not to be kept."""
        return replace(self, grams=(self.gram,), lowers=()).factored(ridges)

    def columns(self, count: int) -> Tensor:
        """S = (G + D)^-1 E^T, (n, count), where E picks the last ``count`` rows: the last block.

        Where G + D is singular, or so nearly that float64 cannot tell, it is the least-norm
        solution, from an eigen-decomposition.
        """
        n = len(self.ridges)
        chosen = torch.zeros(n, count, dtype=torch.float64, device=self.ridges.device)
        chosen[n - count :].diagonal().fill_(1)
        active = self.ridges.isfinite()
        if not self._is_sound(active):
            matrix = self.gram[active][:, active] + self.ridges[active].diag()
            found = torch.zeros_like(chosen)
            found[active] = algebra.solve_symmetric(matrix, chosen[active])
            return found
        # the first rows of L^-1 E^T are zero, as those of E^T are
        last = self.lowers[-1]
        corner = last[len(last) - count :, n - count :]
        chosen[n - count :] = torch.linalg.solve_triangular(
            corner, chosen[n - count :], upper=False
        )
        for part, start, end in reversed(_placed(self.lowers)):
            chosen[start:end] = torch.linalg.solve_triangular(
                part[:, start:].T, chosen[start:end], upper=True
            )
            chosen[:start].addmm_(part[:, :start].T, chosen[start:end], alpha=-1)
        return chosen

    def times(self, columns: Tensor) -> Tensor:
        """G S for columns S (n, u), (n, u)."""
        found = torch.zeros_like(columns)
        for part, start, end in _placed(self.grams):
            found[start:end].addmm_(part, columns[:end])
            found[:start].addmm_(part[:, :start].T, columns[start:end])
        return found

    def _is_sound(self, active: Tensor) -> bool:
        if not self.lowers or self.lowers[-1].shape[1] < len(self.ridges):
            return False
        scale = (self.squares + self.ridges)[active]
        pivots = _diagonal(self.lowers, self.ridges)[active].square()
        return bool((pivots > algebra.SMALL_PIVOT * scale.amax()).all()) if len(scale) else True


def equal_rows(rows: Tensor, others: Tensor) -> int:
    """How many leading rows of (n, d_in) and (m, d_in) are the same bit for bit."""
    if (rows.device, rows.dtype) != (others.device, others.dtype):
        return 0
    count = min(len(rows), len(others))
    if torch.equal(rows[:count], others[:count]):
        return count
    same = (rows[:count] == others[:count]).all(1)
    return int((~same).nonzero()[0])


def _placed(parts: Sequence[Tensor]) -> list[tuple[Tensor, int, int]]:
    """Blocks (u, end) of G or L, each with its first row and its end."""
    return [(part, part.shape[1] - len(part), part.shape[1]) for part in parts]


def _until(parts: Sequence[Tensor], n: int) -> tuple[Tensor, ...]:
    """The leading parts of L that lie within the first ``n`` rows."""
    return tuple(part for part in parts if part.shape[1] <= n)


def _with_block(parts: tuple[Tensor, ...], block: Tensor) -> tuple[Tensor, ...]:
    """One more block of L, put together with the small parts before it once they are ``PART`` rows.

    What is put together depends on the sizes of the blocks so far alone.
    """
    small = 0
    while small < len(parts) and len(parts[-1 - small]) < PART:
        small += 1
    first = len(parts) - small
    together = [*parts[first:], block]
    if not small or sum(map(len, together)) < PART:
        return (*parts, block)
    rows = [torch.nn.functional.pad(p, (0, block.shape[1] - p.shape[1])) for p in together]
    return (*parts[:first], torch.cat(rows))


def _factor_block(lowers: Sequence[Tensor], gram: Tensor, ridges: Tensor) -> Tensor | None:
    """A block's rows of L, (u, end); None where the block is not positive definite."""
    end, start = gram.shape[1], gram.shape[1] - len(gram)
    active = ridges[:end].isfinite()
    row = gram * active  # M21, M22
    row *= active[start:, None]
    row[:, start:].diagonal().add_(torch.where(active[start:], ridges[start:end], 1.0))
    for lower, before, after in _placed(lowers):
        part = row[:, before:after]
        part.addmm_(row[:, :before], lower[:, :before].T, alpha=-1)
        row[:, before:after] = torch.linalg.solve_triangular(
            lower[:, before:].T, part, upper=True, left=False
        )
    corner = row[:, start:].addmm(row[:, :start], row[:, :start].T, alpha=-1)
    found, info = torch.linalg.cholesky_ex(corner)
    if int(info) != 0:
        return None
    row[:, start:] = found
    return row


def _square(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows of each block, (u, end), as one matrix that is zero right of them."""
    n = parts[-1].shape[1] if parts else 0
    whole = like.new_zeros(n, n)
    for part, start, end in _placed(parts):
        whole[start:end, :end] = part
    return whole


def _diagonal(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    found = [part.diagonal(start) for part, start, _ in _placed(parts)]
    return torch.cat(found) if found else like.new_zeros(0)

"""Mathematics on finished updates, from their factors alone: take rows out, join, compress.

In: :class:`~alphaedit_peft.algebra.LowRankDelta` values Delta = B A. Out: other ones, and how far
they differ. The rows of A are projected keys a_i = P k_i, and P is a projector, so that Delta puts
out B A k_i = B A a_i for key i: the outputs on the stored keys are T = B G with G = A A^T. No
matrix of d_out x d_in is formed, and everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta

GUARD_FACTOR, GUARD_STEPS, GUARD_FIRST = 2.0, 20, 1e-4  # the ridge's growth, and first fraction


def outputs(delta: LowRankDelta, rows: Tensor) -> Tensor:
    """What an update puts out for projected keys: rows (m, d_in) give (m, d_out), float64."""
    return (rows.double() @ delta.A.double().T) @ delta.B.double().T


def without_rows(
    delta: LowRankDelta, kept: Sequence[int], fixed: Sequence[int], gone: Sequence[int]
) -> tuple[LowRankDelta, Tensor]:
    """Take rows out of an update so that its outputs on the ``fixed`` rows stay.

    With J the rows to go and S the fixed ones, Delta' = B A without J + B_J Pi A_J, where Pi
    projects onto the span of A_S: the least change after which row j asks for nothing of its own.

    Args:
        delta: the update, n rows.
        kept: the rows of the result, in order.
        fixed: those of ``kept`` whose outputs stay.
        gone: all other rows.

    Returns:
        The update with the ``kept`` rows, in the dtype of ``delta``; and for each row of ``gone``
        the share of it that the fixed rows span, |Pi a_j|^2 / |a_j|^2, (len(gone),) in 0..1:
        so much of what it asked for is still in force. 0 for a row of zeros.
    """
    A, B = delta.A.double(), delta.B.double()
    S, J = list(fixed), list(gone)
    between = A[S] @ A[J].T  # (s, j)
    C = algebra.solve(A[S] @ A[S].T, between, 0.0, torch.arange(len(S)))  # (s, j), Pi a_j = C_j A_S
    size = A[J].square().sum(1)
    inside = (C.T @ A[S]).square().sum(1)  # (j,)
    shares = torch.where(size > 0, inside / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
    B = B.index_add(1, torch.tensor(S, dtype=torch.long), B[:, J] @ C.T)
    return LowRankDelta(delta.A[list(kept)], B[:, list(kept)].to(delta.B)), shares.clamp(0, 1)


@dataclass(frozen=True)
class Joint:
    """Updates solved as one.

    Args:
        delta: the update, all rows one below the other.
        ridge: the ridge that it was solved with in the end.
        growth: |Delta|_F over the root of the sum of the parts' |Delta_i|_F^2.
        drift: (n,), how far each row's output is from its part's, relative to that; of ``delta``
            as it is, rounded to its dtype.
    """

    delta: LowRankDelta
    ridge: float
    growth: float
    drift: Tensor


def join(parts: Sequence[tuple[Tensor, Tensor]], ridge: float, guard: float) -> Joint:
    """One update that puts out on every row what the row's own part did.

    B = T^T (G + lambda I)^-1 with all rows in A and T. Where parts have nearly equal rows, exact
    outputs need enormous weights, so the ridge grows while |Delta|_F is more than ``guard`` times
    what it is for parts at right angles, the root of the sum of their own |Delta_i|_F^2.

    Args:
        parts: rows (n_i, d_in) and their outputs (n_i, d_out), of each part.
        ridge: lambda to begin with; 0 is exact.
        guard: the bound; 0 for none.
    """
    A = torch.cat([rows for rows, _ in parts]).double()  # (n, d_in)
    T = torch.cat([out for _, out in parts]).double()  # (n, d_out)
    G, every = A @ A.T, torch.arange(len(A))
    alone = sum(_squared_norm(rows.double(), out.double()) for rows, out in parts) ** 0.5
    first = GUARD_FIRST * float(G.diagonal().mean()) if len(A) else 0.0
    X = algebra.solve(G, T, ridge, every)  # (n, d_out)
    growth = _growth(G, X, alone)
    for _ in range(GUARD_STEPS if guard > 0 else 0):
        if growth <= guard:
            break
        ridge = max(GUARD_FACTOR * ridge, first)
        X = algebra.solve(G, T, ridge, every)
        growth = _growth(G, X, alone)
    dtype = parts[0][0].dtype
    delta = LowRankDelta(A.to(dtype), X.T.to(dtype))
    off, size = (outputs(delta, A) - T).norm(dim=1), T.norm(dim=1)
    drift = torch.where(size > 0, off / size.clamp_min(torch.finfo(size.dtype).tiny), off)
    return Joint(delta, ridge, growth, drift)


def singular_values(delta: LowRankDelta) -> Tensor:
    """Singular values of B A, descending, min(n, d_in, d_out) of them."""
    return torch.linalg.svdvals(_core(delta)[1])


def truncated(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """The best approximation of B A by a given rank (Eckart-Young), in the dtype of ``delta``.

    With A^T = Q_a R_a and B = Q_b R_b, B A = Q_b (R_b R_a^T) Q_a^T, so that the decomposition is
    of a matrix no larger than n x n. Both factors get the roots of the singular values. Where there
    are fewer than ``rank``, rows of zeros follow.
    """
    left, core, right = _core(delta)
    U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    B, A = left @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right.T
    return padded(LowRankDelta(A.to(delta.A), B.to(delta.B)), rank)


def padded(delta: LowRankDelta, rank: int) -> LowRankDelta:
    """The same update with rows of zeros (and columns of B) up to a rank."""
    more = rank - delta.rank
    pad = torch.nn.functional.pad
    return LowRankDelta(pad(delta.A, (0, 0, 0, more)), pad(delta.B, (0, more)))


def relative_error(delta: LowRankDelta, other: LowRankDelta) -> float:
    """|B' A' - B A|_F / |B A|_F of two updates of one matrix; without forming either."""
    rank = max(delta.rank, other.rank)
    one, two = (padded(d, rank).to(torch.float64) for d in (delta, other))
    B = torch.cat([two.B - one.B, one.B], dim=1)  # B' A' - B A = (B' - B) A' + B (A' - A)
    A = torch.cat([two.A, two.A - one.A])
    off, size = (float(_core(d)[1].norm()) for d in (LowRankDelta(A, B), delta))
    return off / size if size > 0 else off


def _core(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """Q_b, M, Q_a with B A = Q_b M Q_a^T and orthonormal columns in both Q; float64."""
    Qa, Ra = torch.linalg.qr(delta.A.double().T)
    Qb, Rb = torch.linalg.qr(delta.B.double())
    return Qb, Rb @ Ra.T, Qa


def _squared_norm(rows: Tensor, out: Tensor) -> float:
    """|Delta|_F^2 of the smallest update with these outputs on these rows."""
    G = rows @ rows.T
    X = algebra.solve(G, out, 0.0, torch.arange(len(rows)))
    return float((X * (G @ X)).sum().clamp_min(0))


def _growth(G: Tensor, X: Tensor, alone: float) -> float:
    return float((X * (G @ X)).sum().clamp_min(0).sqrt()) / alone if alone > 0 else 0.0

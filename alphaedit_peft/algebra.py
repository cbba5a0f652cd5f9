"""The mathematics of AlphaEdit, with torch alone: keys and residuals in, a low-rank update out.

P projects onto the null space of the key moment C0 (Eq. 8 and 9). The paper writes the update of a
rewrite weight W (d_out x d_in) with edits as columns (Eq. 14):

    Delta = R K1^T P (Kp Kp^T P + K1 K1^T P + lambda I)^-1

With edits as rows, and A the projected keys of all edits so far (old ones first), it equals

    Delta = R^T E (G + D)^-1 A,    G = A A^T,

where E (u x n) picks this batch's u rows and D holds one ridge a row. So Delta is a LoRA whose
``lora_A`` is A: exact, rank n, and n^2 d_in instead of d_in^3 to compute. MEMIT (Meng et al., 2023,
Eq. 14) is the same solve with A = K (w C0)^-1, G = A K^T and D = I. From A and the outputs on its
rows alone, finished updates are taken apart, joined and compressed.

Everything is row-wise: keys (n, d_in), residuals (n, d_out). Solves run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_PIVOT = 1e-13  # of a Cholesky factor, squared and to the largest diagonal entry
GUARD_FACTOR, GUARD_STEPS, GUARD_FIRST = 2.0, 20, 1e-4  # the ridge's growth, and first fraction
GUARD_ROUNDING = 1e-9  # relative: |Delta| of one part alone is its own to float64 rounding only


@dataclass(frozen=True)
class LowRankDelta:
    """A weight update as a value: Delta = B A, with ``A`` (n, d_in) and ``B`` (d_out, n).

    The two factors are what a LoRA layer calls ``lora_A`` and ``lora_B`` at scaling 1.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"factors A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not multiply; "
                "A is (n, d_in) and B is (d_out, n)"
            )

    @property
    def rank(self) -> int:
        """Number of rows of A, one for each group of edits that share a key."""
        return self.A.shape[0]

    def apply(self, keys: Tensor) -> Tensor:
        """Output change for keys (m, d_in): K A^T B^T, (m, d_out)."""
        return keys @ self.A.T @ self.B.T

    def dense(self) -> Tensor:
        """The update as a matrix, (d_out, d_in), in the dtype of the factors."""
        return self.B @ self.A

    def gram(self) -> Tensor:
        """A A^T, (n, n), in float64."""
        A = self.A.double()
        return A @ A.T

    def norm(self, gram: Tensor | None = None) -> float:
        """Frobenius norm |B A| = sqrt(tr(B^T B G)), without forming B A; G = A A^T, (n, n)."""
        G, B = self.gram() if gram is None else gram, self.B.double().to(self.A.device)
        return float(((B.T @ B).to(G) * G).sum().clamp_min(0).sqrt())

    def to(self, place: torch.device | torch.dtype | str) -> LowRankDelta:
        """Both factors on another device or in another dtype."""
        return LowRankDelta(self.A.to(place), self.B.to(place))

    def first(self, rows: int) -> LowRankDelta:
        """The part that the first ``rows`` rows of A and columns of B make."""
        return LowRankDelta(self.A[:rows], self.B[:, :rows])

    def extended(self, rows: Tensor, coefficients: Tensor) -> LowRankDelta:
        """Add rows (u, d_in) to A and coefficients (n + u, d_out) to the zero-padded B^T.

        Source: Delta_total = sum over batches of R^T E (G + D)^-1 A.
        """
        A = torch.cat([self.A, rows.to(self.A)])  # (n + u, d_in)
        B = torch.nn.functional.pad(self.B, (0, rows.shape[0]))  # (d_out, n + u)
        return LowRankDelta(A, B + coefficients.T.to(B))


@dataclass(frozen=True)
class Spectrum:
    """Eigen-decomposition C0 = U diag(values) U^T, with values (d_in,) in ascending order."""

    values: Tensor
    vectors: Tensor


def spectrum(key_moment: Tensor) -> Spectrum:
    """Eigen-decomposition of the key moment C0 = K0^T K0 / tokens, (d_in, d_in).

    The paper takes an SVD of K0 K0^T (Eq. 8); the moment is symmetric, so ``eigh`` gives the same
    subspaces, more accurately and in less time.

    Raises:
        ValueError: a moment that is not square or not finite.
    """
    if key_moment.ndim != 2 or key_moment.shape[0] != key_moment.shape[1]:
        raise ValueError(f"key moment {tuple(key_moment.shape)} is not square; it is (d_in, d_in)")
    if not torch.isfinite(key_moment).all():
        raise ValueError("the key moment holds NaN or infinity; check the base model's weights")
    values, vectors = torch.linalg.eigh((key_moment + key_moment.T) / 2)
    return Spectrum(values.clamp_min(0), vectors)


def project(keys: Tensor, basis: Tensor, complement: bool = False) -> Tensor:
    """Projected keys K P, (n, d_in), with P = Q Q^T, or I - U U^T where ``complement``.

    Args:
        keys: (n, d_in).
        basis: (d_in, k), orthonormal columns: Q, or U where ``complement``.
        complement: whether the basis spans what is removed rather than what is kept.
    """
    within = (keys @ basis) @ basis.T
    return keys - within if complement else within


def moment_factor(key_moment: Tensor, weight: float) -> Tensor:
    """Lower Cholesky factor L of w C0 = L L^T, (d_in, d_in), float64.

    Args:
        key_moment: C0, (d_in, d_in), the mean of k k^T.
        weight: w, how many keys the preserved knowledge counts as (MEMIT: 15,000).

    Raises:
        ValueError: a moment that is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(weight * key_moment.double())
    if int(info) != 0:
        raise ValueError(
            f"the key moment {tuple(key_moment.shape)} is not positive definite, so MEMIT cannot "
            "invert it; collect it over more tokens (at least ten times its width)"
        )
    return factor


def memit_rows(keys: Tensor, factor: Tensor) -> Tensor:
    """MEMIT's rows A = K (w C0)^-1, (n, d_in), from ``moment_factor``; G = (A L)(A L)^T."""
    return torch.cholesky_solve(keys.double().T, factor).T.to(keys.dtype)


def solve(gram: Tensor, residuals: Tensor, ridge: float | Tensor, new: Tensor) -> Tensor:
    """Coefficients (G + D)^-1 E^T R, (n, d_out), float64: the columns to add to ``lora_B``.

    Args:
        gram: G, (n, n), symmetric: A A^T (AlphaEdit) or A K^T (MEMIT).
        residuals: R, (u, d_out), one row for each new edit.
        ridge: lambda, one number or one for each row, (n,). Infinity takes a row out of the
            solve: it is no longer protected. Near zero protects it (almost) exactly.
        new: (u,), which rows of G the residuals belong to.

    Raises:
        ValueError: a ridge below zero, or values that are not finite.

    Source: AlphaEdit Eq. 14; MEMIT Eq. 14 by the Woodbury identity.
    """
    n = gram.shape[0]
    D = torch.as_tensor(ridge, dtype=torch.float64, device=gram.device).expand(n)
    if bool((D < 0).any()) or bool(D.isnan().any()):
        raise ValueError(f"ridge={ridge} must not be negative or NaN")
    if not (torch.isfinite(gram).all() and torch.isfinite(residuals).all()):
        raise ValueError("keys or residuals hold NaN or infinity; check the base model's weights")
    right = residuals.new_zeros(n, residuals.shape[1], dtype=torch.float64)
    right[new] = residuals.double()  # (n, d_out) = E^T R
    active = D.isfinite()
    solution = torch.zeros_like(right)
    solution[active] = solve_symmetric(
        gram.double()[active][:, active] + D[active].diag(), right[active]
    )
    return solution


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a symmetric positive semi-definite matrix; the least-norm one where singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    scale = matrix.diagonal().amax() if len(matrix) else 1.0
    if int(info) == 0 and bool((factor.diagonal().square() > SMALL_PIVOT * scale).all()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > 1e-12 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(keep, 1 / values.where(keep, torch.ones_like(values)), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def relative_ridge(gram: Tensor, fraction: float) -> float:
    """The ridge that is ``fraction`` of the mean |P k|^2, the mean of G's diagonal."""
    return fraction * float(gram.diagonal().double().mean())


def amplification(products: Tensor, squares: Tensor, columns: Tensor, residuals: Tensor) -> float:
    """How much larger an update is than the same residuals would need on orthogonal keys.

    |Delta|_F^2 = tr(R^T S^T G S R), against sum_i |r_i|^2 / G_ii; the root of their ratio. It is at
    most 1 where keys are orthogonal, and grows without bound as two of them become alike.

    Args:
        products: G S, (n, u), in float64.
        squares: (u,), the diagonal of G for the last u rows.
        columns: S = (G + D)^-1 E^T, (n, u), for these.
        residuals: R, (u, d_out), of these.
    """
    wanted = residuals.double()
    inner = columns.T @ products  # (u, u)
    size = (inner * (wanted @ wanted.T)).sum().clamp_min(0)
    diagonal = squares.clamp_min(torch.finfo(torch.float64).tiny)
    orthogonal = (wanted.square().sum(1) / diagonal).sum()
    return float((size / orthogonal).sqrt()) if orthogonal > 0 else 0.0


def residual_share(wanted: Tensor, achieved: Tensor) -> Tensor:
    """Share of each wanted residual that was reached: <achieved, wanted> / |wanted|^2, (u,).

    1 is all of it, 0 none; a wanted residual of zero counts as reached.
    """
    size = wanted.double().square().sum(1)
    share = (wanted.double() * achieved.double()).sum(1) / size.clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return torch.where(size > 0, share, torch.ones_like(share))


def outputs(delta: LowRankDelta, rows: Tensor) -> Tensor:
    """What an update puts out for projected keys: rows (m, d_in) give (m, d_out), float64."""
    return delta.to(torch.float64).apply(rows.double())


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
    C = solve(A[S] @ A[S].T, between, 0.0, torch.arange(len(S)))  # (s, j), Pi a_j = C_j A_S
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
    alone = sum(_least_square(rows.double(), out.double()) for rows, out in parts) ** 0.5
    first = relative_ridge(G, GUARD_FIRST) if len(A) else 0.0
    for step in range(GUARD_STEPS + 1 if guard > 0 else 1):
        if step:
            ridge = max(GUARD_FACTOR * ridge, first)
        X = solve(G, T, ridge, every)  # (n, d_out)
        growth = math.sqrt(_square(G, X)) / alone if alone > 0 else 0.0
        if growth <= guard * (1 + GUARD_ROUNDING):
            break
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


def _least_square(rows: Tensor, out: Tensor) -> float:
    """|Delta|_F^2 of the smallest update with these outputs on these rows."""
    G = rows @ rows.T
    return _square(G, solve(G, out, 0.0, torch.arange(len(rows))))


def _square(G: Tensor, X: Tensor) -> float:
    """|X^T A|_F^2, with G = A A^T."""
    return float((X * (G @ X)).sum().clamp_min(0))

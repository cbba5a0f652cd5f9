"""The mathematics of AlphaEdit, with torch alone: keys and residuals in, a low-rank update out.

The paper writes the update of a rewrite weight W (d_out x d_in) with edits as columns (Eq. 14):

    Delta = R K1^T P (Kp Kp^T P + K1 K1^T P + lambda I)^-1

With edits as rows, and A the projected keys of all edits so far (old ones first), it equals

    Delta = R^T E (G + D)^-1 A,    G = A A^T,

where E (u x n) picks this batch's u rows and D holds one ridge a row. So Delta is a LoRA whose
``lora_A`` is A: exact, rank n, and n^2 d_in instead of d_in^3 to compute. MEMIT (Meng et al., 2023,
Eq. 14) is the same solve with A = K (w C0)^-1, G = A K^T and D = I.

Everything is row-wise: keys (n, d_in), residuals (n, d_out). Solves run in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD_MODES = ("absolute", "relative", "energy", "rank")
SMALL_PIVOT = 1e-13  # of a Cholesky factor, squared and to the largest diagonal entry


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
        """Frobenius norm |B A| = sqrt(tr(B^T B A A^T)), without forming B A.

        Args:
            gram: A A^T, (n, n), where it is at hand.
        """
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


def null_dimension(values: Tensor, threshold: float, mode: str = "absolute") -> int:
    """How many of the smallest eigenvalues (ascending, (d_in,)) count as zero.

    Modes: ``absolute``: eigenvalue < threshold (the paper; its code uses 2e-2);
    ``relative``: eigenvalue < threshold * largest; ``energy``: the most directions whose sum stays
    <= threshold * total; ``rank``: all but the ``threshold`` largest.

    Raises:
        ValueError: an unknown mode, or a threshold outside its range.
    """
    _check_threshold(threshold, mode, len(values))
    if mode == "absolute":
        return int((values < threshold).sum())
    if mode == "relative":
        return int((values < threshold * values[-1]).sum())
    if mode == "energy":
        cumulative = values.double().cumsum(0)
        return int((cumulative <= threshold * cumulative[-1]).sum())
    return len(values) - int(threshold)


def null_basis(key_moment: Tensor, threshold: float, mode: str = "absolute") -> Tensor:
    """Orthonormal basis Q (d_in, k) of the directions that preserved keys do not use.

    P = Q Q^T is the paper's projector (section 3.2).
    """
    found = spectrum(key_moment)
    return found.vectors[:, : null_dimension(found.values, threshold, mode)]


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
    share = (wanted.double() * achieved.double()).sum(1) / size.clamp_min(torch.finfo().tiny)
    return torch.where(size > 0, share, torch.ones_like(share))


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


def _check_threshold(threshold: float, mode: str, size: int) -> None:
    if mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold_mode={mode!r} is unknown; use one of {THRESHOLD_MODES}")
    top = {"absolute": float("inf"), "relative": 1.0, "energy": 1.0, "rank": float(size)}[mode]
    if not 0 <= threshold <= top:
        raise ValueError(f"threshold={threshold} is outside 0..{top} for mode {mode!r}")

"""A C0 A^T of rows A, from what a null space stores of C0: how far updates move preserved keys.

In: a :class:`LayerSpace`, rows (n, d_in). Out: the form, (n, n), or A C0, which gives it times A^T.
With U the stored eigenvectors, ``known`` their eigenvalues and O = A - A U U^T, both are of

    A C0 A^T = A U diag(known) U^T A^T + largest O O^T,

where ``largest`` is the largest eigenvalue not stored: exact within U, an upper bound outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alphaedit_peft.nullspace.layer import LayerSpace

COLUMNS_AT_ONCE = 1024  # of a basis, made float64


def moment_quadratic(space: LayerSpace, rows: Tensor) -> Tensor:
    """A C0 A^T for rows A (n, d_in), (n, n)."""
    basis, (known, largest) = space.basis.to(rows), _eigenvalues(space, rows)
    within = rows @ basis  # (n, m)
    outside = rows - within @ basis.T  # (n, d_in)
    exact = (within * known) @ within.T
    return exact + largest * (outside @ outside.T) if largest > 0 else exact


def moment_times(space: LayerSpace, rows: Tensor) -> Tensor:
    """A C0 for rows A (n, d_in), (n, d_in): A U diag(known) U^T + largest (O - O U U^T)."""
    known, largest = _eigenvalues(space, rows)
    found, inside = torch.zeros_like(rows), torch.zeros_like(rows)
    for some, basis in _some_columns(space, rows):
        within = rows @ basis  # (n, at once)
        found.addmm_(within * known[some], basis.T)
        inside.addmm_(within, basis.T)
    if largest > 0:
        outside = rows - inside
        found.add_(outside, alpha=largest)
        for _, basis in _some_columns(space, rows):
            found.addmm_(outside @ basis, basis.T, alpha=-largest)
    return found


def _eigenvalues(space: LayerSpace, like: Tensor) -> tuple[Tensor, float]:
    """Those of the stored eigenvectors, (m,), and the largest of the others."""
    values, stored = space.values.to(like), space.basis.shape[1]
    others = len(values) - stored
    known = values[others:] if space.complement else values[:stored]
    unknown = values[:others] if space.complement else values[stored:]
    return known, float(unknown[-1]) if others else 0.0


def _some_columns(space: LayerSpace, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Stored eigenvectors (d_in, at once), a few at a time in the dtype of ``like``."""
    for start in range(0, space.basis.shape[1], COLUMNS_AT_ONCE):
        some = slice(start, start + COLUMNS_AT_ONCE)
        yield some, space.basis[:, some].to(like)

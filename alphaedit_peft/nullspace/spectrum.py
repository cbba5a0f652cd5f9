"""One layer of a null space: some eigenvectors of its key moment C0, and all eigenvalues.

In: C0 (d_in, d_in), a projector, or a stored basis and spectrum. Out: :class:`LayerSpace`, which
projects keys onto the k smallest eigendirections (K P) for every k that its eigenvectors reach, and
from which A C0 and A C0 A^T are had without C0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.devices import solving_on

STEM = "null_space"
WORKSPACE = 6  # float64 matrices of a moment's size that an eigen-decomposition takes on a GPU
COLUMNS_AT_ONCE = 1024  # of a basis, made float64
MAX_WIDTH = 65_536  # of a matrix that is read; 17 GB in float32
PROJECTOR_ERROR = 1e-2  # largest deviation of a projector's entries and eigenvalues
PROJECTOR = (0.5, "absolute")  # threshold and mode where only P is known: values are 0 or 1


def exact_spectrum(moment: Tensor) -> algebra.Spectrum:
    """Eigen-decomposition of C0 (d_in, d_in) in float64, on a GPU where there is one with the room.

    float64 because small eigenvalues are lost under a few huge ones otherwise, and some models
    have keys whose squared norm is 1e6 times the others'.
    """
    device = solving_on(moment.device)
    if device.type == "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free > WORKSPACE * 8 * moment.numel():
            device = torch.device("cuda", torch.cuda.current_device())
    return algebra.spectrum(moment.to(device, torch.float64))


@dataclass(frozen=True, eq=False)
class LayerSpace:
    """The thinner side of an eigen-decomposition.

    Args:
        basis: (d_in, m), eigenvectors in ascending order of their eigenvalues: the m smallest
            ones (null basis Q and more), or the m largest ones (U and more) where ``complement``.
        values: (d_in,), all eigenvalues, ascending.
        complement: which of the two ``basis`` holds.
    """

    basis: Tensor
    values: Tensor
    complement: bool

    @classmethod
    def identity(cls, width: int) -> LayerSpace:
        """P = I: no direction is removed, and no eigenvalue is above zero."""
        values = torch.zeros(width, dtype=torch.float32)
        return cls(values.new_zeros(width, 0), values, True)

    @classmethod
    def from_spectrum(cls, found: algebra.Spectrum, low: int, high: int) -> LayerSpace:
        """The thinner side that can keep ``low`` to ``high`` directions: high or d_in - low wide.

        Fewer eigenvectors cannot do: those between ``low`` and ``high`` are needed one by one, and
        one of the two ends besides.
        """
        values = found.values.float().cpu()
        complement = len(values) - low <= high
        columns = slice(low, None) if complement else slice(high)
        return cls(_stored(found.vectors[:, columns]), values, complement)

    @classmethod
    def from_projector(cls, projector: Tensor) -> LayerSpace:
        """Basis of P (d_in, d_in); its eigenvalues stand in for those of C0: 0 kept, 1 removed.

        What is off symmetric, or has eigenvalues off 0 and 1, by more than 0.01 is a ValueError.
        """
        exact = projector.double()
        error = float((exact - exact.T).abs().max())
        if not error <= PROJECTOR_ERROR:
            raise ValueError(f"it is off symmetric by {error:.2g}, so it is no projector")
        found, vectors = torch.linalg.eigh(exact)  # ascending: removed ones first
        error = float(torch.minimum(found.abs(), (found - 1).abs()).max())
        if not error <= PROJECTOR_ERROR:
            raise ValueError(
                f"its eigenvalues are off 0 and 1 by {error:.2g} (trace "
                f"{float(found.sum()):.6g}), so it is no projector"
            )
        values = (found < 0.5).float().flip(0)
        removed = int(values.sum())
        complement = removed <= len(values) - removed
        basis = vectors[:, :removed] if complement else vectors[:, removed:]
        return cls(_stored(basis), values, complement)

    @property
    def projector_only(self) -> bool:
        """Whether only P is known, so that values are 0 and 1 and no threshold can be moved."""
        known = (self.values == 0) | (self.values == 1)
        return bool(known.all()) and bool(self.values.any())

    @property
    def reach(self) -> tuple[int, int]:
        """The fewest and the most directions that can be kept with the stored eigenvectors."""
        width, stored = self.basis.shape
        return (width - stored, width) if self.complement else (0, stored)

    def project(self, keys: Tensor, kept: int) -> Tensor:
        """K P for keys (n, d_in), with the ``kept`` smallest directions, (n, d_in)."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        width, stored = self.basis.shape
        first = stored - (width - kept) if self.complement else 0
        last = stored if self.complement else kept
        return algebra.project(keys, self.basis[:, first:last].to(keys), self.complement)

    def check(self, layer: int) -> None:
        """Refuse shapes that do not fit, values that do not ascend from zero, and a skew basis."""
        check_shapes(layer, tuple(self.basis.shape), tuple(self.values.shape))
        if bool((self.values < 0).any()) or bool((self.values.diff() < 0).any()):
            raise ValueError(f"layer {layer}: eigenvalues do not ascend from zero")
        gram = self.basis.T @ self.basis
        gram.diagonal().sub_(1)
        errors = [abs(float(bound)) for bound in gram.aminmax()] if len(gram) else [0.0]
        if not all(error <= 1e-3 for error in errors):  # it may be NaN
            raise ValueError(f"layer {layer}: basis is off orthonormal by {max(errors):.2g}")


def check_shapes(
    layer: int, matrix: tuple[int, ...], values: tuple[int, ...] | None = None
) -> None:
    """Refuse shapes that are no moment's (d_in, d_in), or no basis (d_in, m) with its values."""
    shapes = f"moment {matrix}" if values is None else f"basis {matrix} and values {values}"
    square = len(matrix) == 2 and (matrix[1] <= matrix[0] if values else matrix[1] == matrix[0])
    if not square or values not in (None, matrix[:1]) or not 0 < matrix[0] <= MAX_WIDTH:
        raise ValueError(
            f"layer {layer}: {shapes} do not fit; a moment is square, and a basis (d_in, m), "
            f"m <= d_in, with values (d_in,), and d_in is at most {MAX_WIDTH}"
        )


class LayerSummary(NamedTuple):
    """One row of ``NullSpace.summary``."""

    layer: int
    width: int
    kept: int
    largest_eigenvalue: float
    threshold: float
    threshold_mode: str


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


def _stored(vectors: Tensor) -> Tensor:
    """Eigenvectors in float32 on the CPU, their largest entry positive: a solver picks any sign."""
    if vectors.shape[1]:
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, m)
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    # row-major, as a saved one loads: the same products round the same way
    return vectors.float().cpu().contiguous()

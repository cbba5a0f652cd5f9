"""One layer of a null space: some eigenvectors of its key moment, and all eigenvalues.

In: C0 (d_in, d_in), or a stored basis and spectrum. Out: :class:`LayerSpace`, which projects keys
onto the k smallest eigendirections (K P) for every k that its eigenvectors reach.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from alphaedit_peft import algebra, parallel
from alphaedit_peft.artefact import Types, read_artefact, write_artefact

STEM = "null_space"
REACH = 10.0  # the threshold can be moved by this factor, either way
WORKSPACE = 6  # float64 matrices of a moment's size that an eigen-decomposition takes on a GPU
PROJECTOR_ERROR = 1e-2  # largest deviation of a projector's entries and eigenvalues
PROJECTOR = (0.5, "absolute")  # threshold and mode where only P is known: values are 0 or 1


class LayerSummary(NamedTuple):
    """One row of ``NullSpace.summary``."""

    layer: int
    width: int
    kept: int
    largest_eigenvalue: float
    threshold: float
    threshold_mode: str


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
        return cls(torch.zeros(width, 0), torch.zeros(width), True)

    @classmethod
    def from_moment(
        cls, moment: Tensor, threshold: float, mode: str, reach: float = REACH
    ) -> LayerSpace:
        """Decompose C0 in float64; keep the thinner side that reaches ``reach`` times either way.

        Where thresholds within reach keep ``low`` to ``high`` directions, it stores the ``high``
        smallest or the ``d_in - low`` largest eigenvectors, whichever are fewer. Fewer cannot do:
        those between ``low`` and ``high`` are needed one by one, and one of the two ends besides.

        float64 because small eigenvalues are lost under a few huge ones otherwise, and some models
        have keys whose squared norm is 1e6 times the others'.

        Raises:
            ValueError: a ``reach`` below 1 or not finite.
        """
        if not 1 <= reach < float("inf"):
            raise ValueError(
                f"reach={reach} is no factor to move the threshold by; use 1 (not at all) or more"
            )
        found = _spectrum(moment)
        values = found.values.float().cpu()
        width = len(values)
        top = {"absolute": float("inf"), "rank": float(width)}.get(mode, 1.0)
        reached = [
            algebra.null_dimension(values, min(t, top), mode)
            for t in (threshold / reach, threshold, threshold * reach)
        ]
        for_null, for_complement = max(reached), width - min(reached)
        complement = for_complement <= for_null
        columns = slice(width - for_complement, width) if complement else slice(for_null)
        # row-major, as a saved one loads: the same products round the same way
        basis = _signed(found.vectors[:, columns]).float().cpu().contiguous()
        return cls(basis, values, complement)

    @classmethod
    def from_projector(cls, projector: Tensor) -> LayerSpace:
        """Basis of P (d_in, d_in); its eigenvalues stand in for those of C0: 0 kept, 1 removed.

        Raises:
            ValueError: a matrix that is not a projector: not symmetric, or with an eigenvalue
                that is off 0 and 1 by more than 0.01.
        """
        exact = projector.double()
        error = float((exact - exact.T).abs().max())
        if not error <= PROJECTOR_ERROR:
            raise ValueError(f"it is off symmetric by {error:.2g}, so it is no projector")
        found, vectors = torch.linalg.eigh(exact)  # ascending: removed ones first
        error = float(torch.minimum(found.abs(), (found - 1).abs()).max())
        if error > PROJECTOR_ERROR:
            raise ValueError(
                f"its eigenvalues are off 0 and 1 by {error:.2g} (trace "
                f"{float(found.sum()):.6g}), so it is no projector"
            )
        removed = int((found < 0.5).sum())
        width = len(found)
        complement = removed <= width - removed
        basis = _signed(vectors[:, :removed] if complement else vectors[:, removed:])
        values = torch.zeros(width)
        values[width - removed :] = 1
        return cls(basis.float().cpu().contiguous(), values, complement)

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

    def check_reach(self, layer: int, threshold: float, mode: str) -> None:
        """Refuse a threshold that keeps nothing, or that the stored eigenvectors do not reach.

        Raises:
            ValueError: either of them, or another threshold than a projector's.
        """
        if self.projector_only and (threshold, mode) != PROJECTOR:
            raise ValueError(
                f"threshold={threshold} ({mode}) cannot be used: layer {layer} was read from a "
                f"projector, and its eigenvalues are not known; use {PROJECTOR[0]} "
                f"({PROJECTOR[1]}), which is the projector as it is, or leave the threshold unset"
            )
        kept = algebra.null_dimension(self.values, threshold, mode)
        low, high = self.reach
        if kept == 0:
            raise ValueError(
                f"threshold={threshold} ({mode}) keeps none of layer {layer}'s {len(self.values)} "
                f"directions (eigenvalues {float(self.values[0]):.3g} to "
                f"{float(self.values[-1]):.3g}), so no edit could be made; use a threshold that "
                "counts more of them as zero"
            )
        if not low <= kept <= high:
            raise ValueError(
                f"threshold={threshold} ({mode}) keeps {kept} directions of layer {layer}, but "
                f"this null space stores eigenvectors for {low} to {high}; make another one with "
                "KeyMoments.null_space"
            )

    def project(self, keys: Tensor, kept: int) -> Tensor:
        """K P for keys (n, d_in), with the ``kept`` smallest directions, (n, d_in)."""
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        width, stored = self.basis.shape
        first = stored - (width - kept) if self.complement else 0
        last = stored if self.complement else kept
        return algebra.project(keys, self.basis[:, first:last].to(keys), self.complement)

    def content(self) -> bytes:
        """The numbers as bytes, to hash."""
        return self.values.numpy().tobytes() + self.basis.contiguous().numpy().tobytes()

    def check(self, layer: int) -> None:
        """Check what was read from a file.

        Raises:
            ValueError: shapes that do not fit, a spectrum that does not ascend from zero, or
                eigenvectors that are not orthonormal to 1e-3.
        """
        shape, sizes = tuple(self.basis.shape), tuple(self.values.shape)
        if len(shape) != 2 or sizes != shape[:1] or shape[1] > shape[0]:
            raise ValueError(
                f"layer {layer}: basis {shape} and values {sizes} do not fit; they are (d_in, m) "
                "and (d_in,), m <= d_in"
            )
        if bool((self.values < 0).any()) or bool((self.values.diff() < 0).any()):
            raise ValueError(f"layer {layer}: eigenvalues do not ascend from zero; damaged file")
        gram = self.basis.T @ self.basis
        gram.diagonal().sub_(1)
        error = float(gram.abs().max()) if len(gram) else 0.0
        if error > 1e-3:
            raise ValueError(
                f"layer {layer}: basis is off orthonormal by {error:.2g}; damaged file"
            )


def write_parts(
    folder: str | Path, parts: Mapping[int, LayerSpace], values: Mapping[str, Any]
) -> None:
    """Write the layers of a null space and its plain values; of several processes the main does."""
    if not parallel.is_main():
        return
    tensors = {
        f"layers.{layer}.{name}": getattr(part, name)
        for layer, part in parts.items()
        for name in ("basis", "values")
    }
    sides = {str(layer): part.complement for layer, part in parts.items()}
    write_artefact(folder, STEM, tensors, {"complement": sides, **values})


def read_parts(
    folder: str | Path, fields: Mapping[str, Types]
) -> tuple[dict[int, LayerSpace], dict[str, Any]]:
    """Read and check what ``write_parts`` wrote.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a damaged file, or two that do not belong together.
    """
    tensors, values = read_artefact(folder, STEM, {"complement": dict, **fields})
    sides = {int(layer): bool(side) for layer, side in values.pop("complement").items()}
    wanted = {f"layers.{layer}.{name}" for layer in sides for name in ("basis", "values")}
    if set(tensors) != wanted:
        raise ValueError(
            f"{folder} holds {sorted(tensors)}, but its JSON names {sorted(wanted)}; the files do "
            "not belong together"
        )
    parts = {
        layer: LayerSpace(tensors[f"layers.{layer}.basis"], tensors[f"layers.{layer}.values"], side)
        for layer, side in sides.items()
    }
    for layer, part in parts.items():
        part.check(layer)
    return parts, values


def _spectrum(moment: Tensor) -> algebra.Spectrum:
    """Eigenvalues and eigenvectors in float64, on a GPU where there is one with the room."""
    device = moment.device
    if device.type == "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        if free > WORKSPACE * 8 * moment.numel():
            device = torch.device("cuda", torch.cuda.current_device())
    return algebra.spectrum(moment.to(device, torch.float64))


def _signed(vectors: Tensor) -> Tensor:
    """Eigenvectors with their largest entry positive: the sign that a solver picks is arbitrary."""
    if not vectors.shape[1]:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, m)
    return vectors * torch.where(largest < 0, -1.0, 1.0)


LONG = 4096  # width from which on an eigen-decomposition takes so long that a bar is shown


def decompose(
    moments: Mapping[int, Tensor],
    tokens: int,
    wanted: tuple[float, str, float],
    progress: bool = False,
) -> dict[int, LayerSpace]:
    """Every layer's part of a null space, from its moment C0 (d_in, d_in).

    Args:
        moments: by layer.
        tokens: that they were collected over.
        wanted: threshold, mode and reach.
        progress: whether to show a bar on stderr where a layer takes seconds or more.

    Raises:
        ValueError: as ``check_tokens`` and ``LayerSpace.from_moment``.
    """
    for layer, moment in moments.items():
        check_tokens(tokens, layer, len(moment))
    long = any(len(moment) >= LONG for moment in moments.values())
    shown = long and progress and parallel.is_main()
    layers = tqdm(sorted(moments), desc="eigenvectors", unit="layer", disable=not shown)
    return {layer: LayerSpace.from_moment(moments[layer], *wanted) for layer in layers}


def check_tokens(tokens: int, layer: int, width: int) -> None:
    """Refuse a moment over fewer tokens than it is wide; warn below ten tokens a direction.

    Raises:
        ValueError: fewer tokens than ``width``.
    """
    if tokens < width:
        raise ValueError(
            f"{tokens} tokens are fewer than layer {layer}'s width {width}, so directions would "
            f"count as unused for want of data; collect at least {width - tokens} more, better "
            f"{10 * width - tokens}"
        )
    if tokens < 10 * width:
        warnings.warn(
            f"{tokens} tokens are few for layer {layer}'s width {width}; ten for each direction "
            f"are advised, {10 * width}",
            stacklevel=5,
        )


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

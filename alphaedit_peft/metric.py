"""What an update protects: the metric M of the one solver, Delta = R E^T (K^T M K + D)^-1 K^T M.

In: a null space, or key moments. Out: an :class:`Objective`, which turns keys into the rows of
``lora_A`` and those rows into a Gram matrix. AlphaEdit: M = P, D = lambda. MEMIT: M = (w C0)^-1,
D = 1. MEMIT with projection: MEMIT's update times P, the paper's plug-in (section 4.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.nullspace import KeyMoments, NullSpace

COLUMNS_AT_ONCE = 1024  # of rows, made float64 for a product; fixed, as sums round by it


class Objective(Protocol):
    """The metric of the solve, layer by layer; keys and rows are (n, d_in)."""

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K M, the rows that the solve works with."""

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The new rows of K M K^T, from the rows alone: they round as if made batch by batch.

        Args:
            layer: block number.
            prior: rows in place, (n, d_in).
            batches: new rows, (u, d_in) each.

        Returns:
            For each batch the products of its rows with all up to its own last, (u, n + ... + u),
            in float64.
        """

    def stored(self, layer: int, rows: Tensor) -> Tensor:
        """The rows as they go into ``lora_A``."""

    def ridge(self, squares: Tensor) -> float:
        """The entry of D for a batch, from the diagonal of its own G, (u,)."""


@dataclass(frozen=True)
class AlphaEdit:
    """M = P: rows are projected keys, so G = A A^T (paper Eq. 11-14)."""

    null_space: NullSpace
    ridge_value: float
    relative: bool

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K P."""
        return self.null_space.project(layer, keys)

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A A^T; P is idempotent, so it equals K P K^T."""
        return products(prior, batches)

    def stored(self, layer: int, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def ridge(self, squares: Tensor) -> float:
        """lambda, as given or relative to the mean |P k|^2."""
        return self.ridge_value * float(squares.mean()) if self.relative else self.ridge_value


@dataclass(frozen=True)
class Memit:
    """M = (w C0)^-1: rows are K (w C0)^-1 and G = A (w C0) A^T (MEMIT Eq. 14)."""

    moments: KeyMoments
    weight: float
    null_space: NullSpace | None = None
    _factors: dict[int, Tensor] = field(default_factory=dict)  # Cholesky, once a layer

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K (w C0)^-1."""
        return algebra.memit_rows(keys, self._factor(layer, keys.device))

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A (w C0) A^T."""
        factor = self._factor(layer, prior.device)
        rows, found = [prior], []
        for batch in batches:
            half = batch.double() @ factor  # (u, d_in)
            cross = products_with(half @ factor.T, rows)
            found.append(torch.cat([cross, half @ half.T], 1))
            rows.append(batch)
        return tuple(found)

    def stored(self, layer: int, rows: Tensor) -> Tensor:
        """The rows, projected where the plug-in is on."""
        return rows if self.null_space is None else self.null_space.project(layer, rows)

    def ridge(self, squares: Tensor) -> float:
        """1, the identity in MEMIT's normal equations."""
        return 1.0

    def _factor(self, layer: int, device: torch.device) -> Tensor:
        if layer not in self._factors:
            moment = self.moments.moments[layer].to(device)
            self._factors[layer] = algebra.moment_factor(moment, self.weight)
        return self._factors[layer].to(device)


def products(prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A A^T in float64, the rows of each new batch, as ``Objective.grams``."""
    rows = [prior, *batches]
    ends = list(accumulate(len(part) for part in rows))
    exact_like = prior.new_empty(0, dtype=torch.float64)
    found = tuple(exact_like.new_zeros(end - start, end) for start, end in pairwise(ends))
    for _, exact in _exactly(rows):
        for out, (start, end) in zip(found, pairwise(ends), strict=True):
            out.addmm_(exact[start:end], exact[:end].T)
    return found


def products_with(left: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Products of ``left`` (u, d_in), float64, with lists of rows, n in all, (u, n)."""
    found = left.new_zeros(len(left), sum(map(len, rows)))
    for columns, exact in _exactly(rows):
        found.addmm_(left[:, columns], exact.T)
    return found


def _exactly(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some columns after the other of rows (n, d_in) given in parts, (n, at once) in float64.

    Every entry is made float64 once; the tensor is overwritten by the next.
    """
    count, width = sum(map(len, parts)), parts[0].shape[1]
    space = parts[0].new_empty(count, COLUMNS_AT_ONCE, dtype=torch.float64)
    for start in range(0, width, COLUMNS_AT_ONCE):
        columns = slice(start, min(start + COLUMNS_AT_ONCE, width))
        exact = space[:, : columns.stop - start]
        for part, place in zip(parts, exact.split([len(part) for part in parts]), strict=True):
            place.copy_(part[:, columns])
        yield columns, exact


def make_objective(
    config: AlphaEditConfig, null_space: NullSpace | None, moments: KeyMoments | None
) -> Objective:
    """The objective a resolved config asks for.

    Raises:
        ValueError: statistics that the objective needs are missing, or settings that exclude each
            other.
    """
    if config.projects and null_space is None:
        raise ValueError(
            "no null space was given, and the update must be projected; pass null_space=, or set "
            "null_space in the config, or make one with NullSpace.from_texts"
        )
    if config.objective == "alphaedit":
        assert config.ridge is not None, "resolve the config first"
        if null_space is None:
            raise ValueError("objective='alphaedit' is the projection; projection=False is MEMIT's")
        return AlphaEdit(null_space, config.ridge, config.ridge_mode == "relative")
    if moments is None:
        raise ValueError(
            "objective='memit' needs key moments; pass key_moments=KeyMoments.collect(...)"
        )
    if config.projects and config.history:
        raise ValueError(
            "objective='memit' with projection=True keeps no history: projected rows do not tell "
            "the keys they came from; set history=False"
        )
    assert config.moment_weight is not None, "resolve the config first"
    return Memit(moments, config.moment_weight, null_space if config.projects else None)

"""What an update protects: the metric M of the one solver, Delta = R E^T (K^T M K + D)^-1 K^T M.

In: a null space, or key moments. Out: an :class:`Objective`, which turns keys into the rows of
``lora_A`` and those rows into a Gram matrix. AlphaEdit: M = P, D = lambda. MEMIT: M = (w C0)^-1,
D = 1. MEMIT with projection: MEMIT's update times P, the paper's plug-in (section 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.nullspace import KeyMoments, NullSpace

ROWS_AT_ONCE = 512  # made float64 for a product


class Objective(Protocol):
    """The metric of the solve, layer by layer; keys and rows are (n, d_in)."""

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K M, the rows that the solve works with."""

    def gram(self, layer: int, rows: Tensor) -> Tensor:
        """K M K^T, (n, n) in float64, from the rows alone."""

    def cross(self, layer: int, rows: Tensor, others: Tensor) -> Tensor:
        """K M K'^T, (n, m) in float64, of rows and others (m, d_in)."""

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

    def gram(self, layer: int, rows: Tensor) -> Tensor:
        """A A^T; P is idempotent, so it equals K P K^T."""
        return self.cross(layer, rows, rows)

    def cross(self, layer: int, rows: Tensor, others: Tensor) -> Tensor:
        """A A'^T."""
        return _product(rows, others.double().T)

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

    def gram(self, layer: int, rows: Tensor) -> Tensor:
        """A (w C0) A^T."""
        half = rows.double() @ self._factor(layer, rows.device)
        return half @ half.T

    def cross(self, layer: int, rows: Tensor, others: Tensor) -> Tensor:
        """A (w C0) A'^T."""
        factor = self._factor(layer, rows.device)
        return _product(rows, factor @ (factor.T @ others.double().T))

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


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """Rows (n, d_in) times columns (d_in, m) in float64, without a float64 copy of all rows."""
    return torch.cat([part.double() @ columns for part in rows.split(ROWS_AT_ONCE)])


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

"""Whether the parts of a pack fit each other.

In: the fields of an :class:`~alphaedit_peft.pack.pack.EditPack`. Out: nothing, or a ValueError that
says which part does not fit, and where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.compress import Compression
from alphaedit_peft.pack.record import EditRecord

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


def check_parts(pack: EditPack) -> None:
    """Check a pack's fields against each other.

    Raises:
        ValueError: parts that do not fit each other, or values that are not finite.
    """
    _check_factors(pack.factors)
    _check_records(pack.records, _rows(pack.compression, pack.rank))
    _check_targets(pack.targets, pack.factors)
    if not all(isinstance(text, str) for text in pack.contexts):
        raise ValueError(f"contexts={pack.contexts!r} must be texts")
    for name in ("parents", "decisions"):
        if not all(isinstance(value, Mapping) for value in getattr(pack, name)):
            raise ValueError(f"{name}={getattr(pack, name)!r} must be dicts")


def _check_factors(factors: Mapping[str, LowRankDelta]) -> None:
    if not factors:
        raise ValueError("factors={} names no module; give each edited module its factors")
    ranks = {name: delta.rank for name, delta in factors.items()}
    if len(set(ranks.values())) > 1:
        raise ValueError(f"ranks {ranks} differ; every module has one row for each key")
    for name, delta in factors.items():
        for side, tensor in (("A", delta.A), ("B", delta.B)):
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{side} of {name} ({tensor.dtype}) must be finite floats")


def _rows(compression: Compression | None, rank: int) -> int:
    """How many keys the records count among; more than the rank once rows are mixed."""
    if compression is None:
        return rank
    if compression.rows <= rank if compression.mixed else compression.rows != rank:
        raise ValueError(f"compression rows={compression.rows} does not fit a pack of rank {rank}")
    return compression.rows


def _check_records(records: tuple[EditRecord, ...], rank: int) -> None:
    outside = sorted({record.row for record in records if record.row >= rank})
    if outside:
        raise ValueError(f"rows {outside} of the records are outside the factors' {rank} rows")
    own = [record.edit.id for record in records if record.role == "own"]
    twice = sorted(name for name, count in Counter(own).items() if count > 1)
    if twice:
        raise ValueError(f"edit ids {twice} occur twice; give each edit an id of its own")


def _check_targets(targets: Tensor | None, factors: Mapping[str, LowRankDelta]) -> None:
    if targets is None:
        return
    for name, delta in factors.items():
        wanted = (delta.rank, delta.B.shape[0])
        if tuple(targets.shape) != wanted:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit {name}: {wanted} needed")
    if targets.dtype != torch.float32 or not bool(torch.isfinite(targets).all()):
        raise ValueError(f"targets ({targets.dtype}) must be finite float32")

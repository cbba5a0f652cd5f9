"""A smaller pack: the best approximation of a lower rank, or factors of a smaller dtype.

In: a pack, and a rank, a tolerance or a dtype. Out: a pack whose :class:`Compression` says what was
lost: of the updates themselves, and of what they put out for the edits' own keys. A lower rank
mixes all rows (``algebra.truncated``), so its edits can no longer be told apart.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.contents import Compression, Pack, PackContents, require_rows
from alphaedit_peft.pack.format import DTYPES
from alphaedit_peft.pack.parents import parent_entry


def compress(
    pack: Pack, rank: int | None, tolerance: float | None, dtype: torch.dtype | None
) -> Pack:
    """A smaller pack; see :meth:`EditPack.compress`."""
    require_rows(pack.compression, "compress it again")
    _check_arguments(pack, rank, tolerance, dtype)
    small = dict(pack.factors)
    if tolerance is not None:
        rank = max(_least_rank(delta, tolerance) for delta in pack.factors.values())
        if rank >= pack.rank:
            raise ValueError(
                f"tolerance={tolerance} needs all {pack.rank} rows of this pack; allow more, or "
                "leave it away and give a dtype"
            )
    if rank is not None:
        small = {name: algebra.truncated(d, rank) for name, d in small.items()}
    if dtype is not None:
        small = {name: _rounded(name, d, dtype) for name, d in small.items()}
    rows = list(pack.active_rows())
    pairs = {name: (delta, small[name]) for name, delta in pack.factors.items()}
    compression = Compression(
        rows=pack.rank,
        mixed=rank is not None,
        dtype=str(dtype or torch.float32).removeprefix("torch."),
        delta_errors={n: algebra.relative_error(*pair) for n, pair in pairs.items()},
        output_errors={n: _output_error(*pair, rows) for n, pair in pairs.items()},
    )
    return replace(
        pack,
        factors=small,
        targets=None if compression.mixed else pack.targets,
        compression=compression,
        parents=(*pack.parents, parent_entry("compress", pack)),
    )


def _check_arguments(
    pack: PackContents, rank: int | None, tolerance: float | None, dtype: torch.dtype | None
) -> None:
    if rank is not None and tolerance is not None:
        raise ValueError(f"rank={rank} and tolerance={tolerance} both set the rank; give one")
    if rank is None and tolerance is None and dtype is None:
        raise ValueError("nothing was asked for; give a rank, a tolerance or a dtype")
    if pack.rank < 2 and (rank is not None or tolerance is not None):
        rows = "one row" if pack.rank else "no row, since it holds no edit"
        raise ValueError(f"this pack has {rows}, so its rank cannot be lower; give a dtype alone")
    if rank is not None and (type(rank) is not int or not 1 <= rank < pack.rank):
        raise ValueError(
            f"rank={rank!r} does not make this pack of rank {pack.rank} smaller; use "
            f"1..{pack.rank - 1}"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} is a relative error; it must be within 0..1")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} cannot be saved; use one of {DTYPES}")


def _least_rank(delta: LowRankDelta, tolerance: float) -> int:
    """The least rank, at least 1, whose relative error |Delta' - Delta|_F / |Delta|_F will do."""
    squares = algebra.singular_values(delta).square()  # descending
    lost = squares.flip(0).cumsum(0).flip(0)  # lost[r]: error of rank r, squared
    enough = lost <= tolerance**2 * squares.sum()
    return max(1, int((~enough).sum()))


def _rounded(name: str, delta: LowRankDelta, dtype: torch.dtype) -> LowRankDelta:
    small = delta.to(dtype).to(torch.float32)
    if not bool(torch.isfinite(small.A).all() and torch.isfinite(small.B).all()):
        raise ValueError(f"the factors of {name} do not fit {dtype}; use bfloat16 or float32")
    return small


def _output_error(delta: LowRankDelta, small: LowRankDelta, rows: list[int]) -> float:
    keys = delta.A[rows]
    before, after = (algebra.outputs(d, keys) for d in (delta, small))
    size, off = float(before.norm()), float((after - before).norm())
    return off / size if size > 0 else off

"""Write a pack as a plain LoRA folder, for servers that take what they find.

In: a pack, and what a server asks for: a rank, a dtype, factors in every block, transposed ones.
Out: ``adapter_config.json`` and ``adapter_model.safetensors``, nothing else, and :class:`Export`,
which says what was written. The update is the pack's, B A, up to the rounding that was asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.pack.format import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    DTYPES,
    SIDECAR_CONFIG,
    Factors,
    by_block,
    json_bytes,
    lora_state,
    tensor_bytes,
)
from alphaedit_peft.pack.parents import require_alone
from alphaedit_peft.saving import replace_folder
from alphaedit_peft.settings import require_one_of

FORMATS = ("peft", "llama.cpp")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
_FILES = (ADAPTER_CONFIG, ADAPTER_MODEL)


@dataclass(frozen=True)
class Export:
    """A plain LoRA folder that was written, and what of the pack it holds."""

    folder: Path
    rank: int  # of every module, with the rows of zeros
    modules: tuple[str, ...]  # full names, lowest block first
    dtype: torch.dtype  # of the factors
    rounding_errors: dict[str, float]  # by edited module, |Delta' - Delta|_F / |Delta|_F
    transposed: bool  # the factors are those of Delta^T, as the base stores its weights


def export(
    pack: PackContents,
    folder: str | Path,
    *,
    format: str = "peft",
    max_rank: int | str | None = None,
    dtype: torch.dtype | None = None,
    all_layers: bool = False,
    num_blocks: int | None = None,
) -> Export:
    """Write a plain LoRA folder; see :meth:`EditPack.export`."""
    require_alone(
        pack, "it cannot be exported alone", "join them first, EditPack.join([parent, pack])"
    )
    require_one_of("format", format, FORMATS)
    dtype = pack.saved_dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} cannot be saved; use one of {DTYPES}")
    _check_folder(Path(folder))
    rank = _rank(pack, max_rank)
    factors = {name: algebra.padded(d, rank) for name, d in pack.factors.items()}
    if all_layers:
        factors = _every_block(pack, factors, num_blocks)
    transposed = format == "llama.cpp" and pack.fan_in_fan_out
    stored = {n: LowRankDelta(d.B.T, d.A.T) if transposed else d for n, d in factors.items()}
    files = {
        ADAPTER_CONFIG: json_bytes(pack.adapter_config(stored), ADAPTER_CONFIG),
        ADAPTER_MODEL: tensor_bytes(lora_state(stored), ADAPTER_MODEL, dtype),
    }
    errors = {n: algebra.relative_error(d, d.to(dtype)) for n, d in pack.factors.items()}
    replace_folder(folder, files, owned=_FILES)
    return Export(Path(folder), rank, tuple(factors), dtype, errors, transposed)


def _check_folder(folder: Path) -> None:
    """Raise a FileExistsError for a folder with anything but an earlier export in it."""
    if (folder / SIDECAR_CONFIG).exists():
        raise FileExistsError(
            f"{folder} is an edit pack, which an export would replace; give another folder"
        )
    others = {p.name for p in folder.iterdir()} - set(_FILES) if folder.is_dir() else set()
    if others:
        raise FileExistsError(f"{folder} holds {sorted(others)[:3]}; give an empty folder")


def _rank(pack: PackContents, max_rank: int | str | None) -> int:
    rank = max(1, pack.rank)
    if max_rank is None:
        return rank
    if max_rank == "vllm":
        most, found = VLLM_RANKS[-1], next((r for r in VLLM_RANKS if r >= rank), 0)
    elif type(max_rank) is int and max_rank >= 1:
        most, found = max_rank, max_rank
    else:
        raise ValueError(f"max_rank={max_rank!r} must be a whole number from 1 on, or 'vllm'")
    if rank > most:
        raise ValueError(
            f"this pack's rank {rank} is over {most}, the most for max_rank={max_rank!r}; compress "
            f"it to rank {most} first"
        )
    return found


def _every_block(pack: PackContents, factors: Factors, num_blocks: int | None) -> Factors:
    """Factors of zeros for the rewrite modules of all blocks that were not edited."""
    if num_blocks is None and pack.base is not None:
        known = pack.base.shape.get("layers")
        num_blocks = known if type(known) is int else None
    if num_blocks is None:
        raise ValueError("the pack does not say how many blocks its base has; give num_blocks")
    name, like = next(iter(factors.items()))
    found = re.fullmatch(r"(.*?\.)\d+(\..*)", name)
    if found is None:
        raise ValueError(f"module {name!r} names no block, so those of others are unknown")
    if not max(pack.layers) < num_blocks <= 2**16:
        raise ValueError(
            f"num_blocks={num_blocks} does not fit a pack that edits blocks {pack.layers}"
        )
    zeros = LowRankDelta(torch.zeros_like(like.A), torch.zeros_like(like.B))
    every = {f"{found[1]}{block}{found[2]}": zeros for block in range(num_blocks)} | factors
    return {name: every[name] for name in sorted(every, key=by_block)}

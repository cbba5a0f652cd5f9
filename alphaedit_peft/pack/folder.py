"""A pack's folder as a whole: all its files from a pack, and a pack's fields from its files.

In: an :class:`~alphaedit_peft.pack.pack.EditPack`, or a folder. Out: bytes by file name, or the
fields of an EditPack, after checking that the LoRA half and the sidecar tell the same story.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.format import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    EDITS,
    SIDECAR_CONFIG,
    TARGETS,
    refuse,
    tensor_bytes,
)
from alphaedit_peft.pack.lora import adapter_config_bytes, read_lora
from alphaedit_peft.pack.sidecar import (
    facts_bytes,
    read_facts,
    read_records,
    read_targets,
    records_bytes,
)

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


def pack_files(pack: EditPack, dtype: torch.dtype) -> dict[str, bytes]:
    """All files of a pack but its card; ``dtype`` is the factors', targets stay float32.

    Raises:
        PackError: a value that the dtype or JSON cannot hold, or a file over its limit.
    """
    files = {
        ADAPTER_CONFIG: adapter_config_bytes(pack.factors, pack.config, pack.fan_in_fan_out),
        ADAPTER_MODEL: tensor_bytes(pack.state_dict(), ADAPTER_MODEL, dtype),
        SIDECAR_CONFIG: facts_bytes(pack),
        EDITS: records_bytes(pack.records),
    }
    if pack.targets is not None:
        files[TARGETS] = tensor_bytes({"z": pack.targets}, TARGETS, torch.float32)
    return files


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of the pack in a folder, by the names of EditPack.

    Raises:
        FileNotFoundError: a folder without sidecar: a plain LoRA.
        PackError: a file that is damaged or does not fit the others.
    """
    facts = read_facts(folder)
    rows = facts.pop("rows")
    factors, lora = read_lora(folder)
    where = folder / ADAPTER_CONFIG
    if lora.scaling != 1:
        refuse(where, f"lora_alpha / r is {lora.scaling}, not 1")
    if lora.target_modules != frozenset(factors):
        refuse(where, "target_modules are not the modules in the tensors")
    if lora.fan_in_fan_out != facts["fan_in_fan_out"]:
        refuse(where, f"fan_in_fan_out={lora.fan_in_fan_out} differs from {SIDECAR_CONFIG}")
    if rows == 0:
        factors = {name: _without_zero_row(delta, folder) for name, delta in factors.items()}
    elif rows != lora.rank:
        refuse(where, f"r={lora.rank} differs from rows={rows} in {SIDECAR_CONFIG}")
    return facts | {
        "factors": factors,
        "records": read_records(folder),
        "targets": read_targets(folder),
    }


def _without_zero_row(delta: LowRankDelta, folder: Path) -> LowRankDelta:
    if delta.rank != 1 or bool(delta.A.any()) or bool(delta.B.any()):
        refuse(folder / ADAPTER_MODEL, f"holds {delta.rank} rows, {SIDECAR_CONFIG} says rows=0")
    return LowRankDelta(delta.A[:0], delta.B[:, :0])

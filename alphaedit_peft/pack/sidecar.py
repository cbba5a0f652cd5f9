"""The half of a pack that only this package reads: ``alphaedit/``.

In: what an :class:`~alphaedit_peft.pack.pack.EditPack` knows beyond its factors. Out: the bytes of
``config.json``, ``edits.jsonl`` and ``targets.safetensors``, or those values again, validated.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.pack.compressing import Compression
from alphaedit_peft.pack.format import (
    EDITS,
    FORMAT_VERSION,
    SIDECAR_CONFIG,
    TARGETS,
    json_bytes,
    json_lines_bytes,
    read_json,
    read_json_lines,
    read_tensors,
    refuse,
)
from alphaedit_peft.pack.record import EditRecord

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack

_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "rows": (int,),
    "config": (dict,),
    "contexts": (list,),
    "fan_in_fan_out": (bool,),
    "base": (dict, type(None)),
    "null_space": (dict, type(None)),
    "versions": (dict,),
    "parents": (list,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {"compression": (dict,), "decisions": (list,)}  # or absent


def facts_bytes(pack: EditPack) -> bytes:
    """``alphaedit/config.json``; its ``rows`` is 0 where the one row of A is no edit."""
    values = {
        "format_version": FORMAT_VERSION,
        "rows": pack.rank,
        "config": pack.config.to_json(),
        "contexts": pack.contexts,
        "fan_in_fan_out": pack.fan_in_fan_out,
        "base": None if pack.base is None else pack.base.to_json(),
        "null_space": pack.null_space,
        "versions": pack.versions,
        "parents": pack.parents,
    }
    if pack.compression is not None:
        values["compression"] = pack.compression.to_json()
    if pack.decisions:
        values["decisions"] = pack.decisions
    return json_bytes(values, SIDECAR_CONFIG)


def records_bytes(records: Iterable[EditRecord]) -> bytes:
    """``alphaedit/edits.jsonl``."""
    return json_lines_bytes([record.to_json() for record in records], EDITS)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read ``alphaedit/config.json``: fields of an EditPack by name, and ``rows``.

    Raises:
        FileNotFoundError: the folder has none, so it is a plain LoRA and not an edit pack.
        PackError: a damaged file, or one that a newer version of this package wrote.
    """
    where = folder / SIDECAR_CONFIG
    if not where.exists():
        raise FileNotFoundError(
            f"{where} does not exist, so {folder} is no edit pack; if it is a plain LoRA, load it "
            "with peft.PeftModel.from_pretrained, or look at it with read_plain_lora"
        )
    raw = read_json(folder, SIDECAR_CONFIG)
    _check_version(raw.get("format_version"), where)
    known = _TYPES | _OPTIONAL
    missing, unknown = sorted(set(_TYPES) - set(raw)), sorted(set(raw) - set(known))
    if missing or unknown:
        refuse(where, f"fields {missing} are missing, fields {unknown} are unknown")
    for name, types in known.items():
        if name in raw and type(raw[name]) not in types:
            refuse(where, f"{name}={raw[name]!r} is a {type(raw[name]).__name__}")
    del raw["format_version"]
    try:
        raw["config"] = AlphaEditConfig.from_json(raw["config"])
        raw["base"] = None if raw["base"] is None else BaseFingerprint.from_json(raw["base"])
        if "compression" in raw:
            raw["compression"] = Compression.from_json(raw["compression"])
    except (ValueError, TypeError, OverflowError) as error:
        refuse(where, str(error), "update alphaedit_peft, or download the pack again")
    return raw


def read_records(folder: Path) -> tuple[EditRecord, ...]:
    """Read ``alphaedit/edits.jsonl``.

    Raises:
        PackError: a line that is no valid record; names the line.
    """
    records = []
    for number, values in read_json_lines(folder, EDITS):
        try:
            records.append(EditRecord.from_json(values))
        except (ValueError, TypeError) as error:
            refuse(f"{folder / EDITS}, line {number}", str(error))
    return tuple(records)


def read_targets(folder: Path) -> Tensor | None:
    """Read z (n, d_model), or None where the pack has no target values.

    Raises:
        PackError: a damaged file, or one that holds something else.
    """
    if not (folder / TARGETS).exists():
        return None
    tensors = read_tensors(folder, TARGETS)
    if set(tensors) != {"z"}:
        refuse(folder / TARGETS, f"holds {sorted(tensors)}, not 'z' alone")
    return tensors["z"]


def _check_version(version: object, where: Path) -> None:
    if version != FORMAT_VERSION:
        refuse(
            where,
            f"format_version={version!r} is not {FORMAT_VERSION}, the one that is read here",
            "update alphaedit_peft",
        )

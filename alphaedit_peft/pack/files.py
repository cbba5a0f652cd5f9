"""A pack's folder as a whole: all its files from a pack, and a pack's fields from its files.

In: an :class:`~alphaedit_peft.pack.pack.EditPack`, or a folder. Out: bytes by file name, or the
fields of an EditPack, after checking that the LoRA half and the sidecar tell the same story.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from alphaedit_peft import artefact
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.hub import fetch_folder
from alphaedit_peft.pack.compress import Compression
from alphaedit_peft.pack.format import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    EDITS,
    FILES,
    FORMAT_VERSION,
    SIDECAR_CONFIG,
    TARGETS,
    PackError,
    json_bytes,
    json_lines_bytes,
    read_json,
    read_json_lines,
    read_tensors,
    refuse,
    tensor_bytes,
)
from alphaedit_peft.pack.lora import adapter_config_bytes, read_lora
from alphaedit_peft.pack.record import EditRecord

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


Found = TypeVar("Found")


def locate(
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of a pack; downloads only the pack's own files.

    Raises:
        FileNotFoundError: neither a folder here nor a repository that this token may read, or no
            such revision or subfolder in it.
        PermissionError: a gated repository.
        ConnectionError: the Hub fails.
    """
    folder = Path(path_or_repo) / (subfolder or "")
    if folder.is_dir():
        return folder
    aside = artefact.left_aside(folder)
    if aside is not None:
        return aside
    if isinstance(path_or_repo, Path) or Path(path_or_repo).exists():
        raise FileNotFoundError(
            f"{folder} is no folder here, and no Hub repository name either; check the path"
        )
    return fetch_folder(path_or_repo, FILES, revision=revision, token=token, subfolder=subfolder)


def read_steadily(folder: Path, read: Callable[[Path], Found]) -> Found:
    """Read a folder's files so that all come from one save, even while another process saves.

    Raises:
        PackError: the folder is replaced faster than it can be read; otherwise what ``read`` says.
    """
    return artefact.read_steadily(folder, read, PackError)

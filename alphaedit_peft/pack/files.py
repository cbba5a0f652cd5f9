"""A pack's folder as a whole: written from a value, read into one, sent to the Hub and fetched.

In: a pack, or a folder or repository. Out: the folder, in one step; or a pack whose LoRA half and
sidecar tell the same story. What comes from the Hub or goes there is checked first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from alphaedit_peft import artefact, metric
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.hub import Destination, fetch_folder, push_folder
from alphaedit_peft.pack.card import card
from alphaedit_peft.pack.format import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    CARD,
    EDITS,
    FILES,
    FORMAT_VERSION,
    SIDECAR_CONFIG,
    TARGETS,
    Factors,
    PackError,
    json_bytes,
    read_bytes,
    read_json,
    read_json_lines,
    read_lora,
    read_tensors,
    refuse,
)
from alphaedit_peft.pack.record import EditRecord
from alphaedit_peft.pack.value import Compression, Pack, PackValue, content_files
from alphaedit_peft.settings import EditOptions

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredPack(PackValue):
    """A pack as it is read without PEFT, which writes the LoRA config's fields that it came with.

    Args:
        lora: ``adapter_config.json``, of a plain LoRA.
    """

    lora: Mapping[str, Any]
    options: ClassVar = EditOptions

    def adapter_config(self, factors: Factors) -> dict[str, Any]:
        """The fields of the config at hand; those that a plain LoRA sets are set anew."""
        rank = max(1, next(iter(factors.values())).rank)
        return {
            **self.lora,
            "base_model_name_or_path": self.config.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "r": rank,
            "revision": self.config.revision,
            "target_modules": list(factors),
            "task_type": "CAUSAL_LM",
            "use_rslora": False,
        }


def save_pack(
    pack: PackValue, folder: str | Path, dtype: torch.dtype | None = None, text: str | None = None
) -> None:
    """Write a pack's folder; see :meth:`EditPack.save_pretrained`.

    Args:
        pack: the pack.
        folder: where to.
        dtype: of the factors on disk.
        text: of its card; None: one that names no repository.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "rows": pack.rank,  # 0 where the one row of A is no edit
        "config": pack.config.to_json(),
        "contexts": pack.contexts,
        "fan_in_fan_out": pack.fan_in_fan_out,
        "base": None if pack.base is None else pack.base.to_json(),
        "null_space": pack.null_space,
        "versions": pack.versions,
        "parents": pack.parents,
    }
    if pack.compression is not None:
        facts["compression"] = pack.compression.to_json()
    if pack.decisions:
        facts["decisions"] = pack.decisions
    files: dict[str, artefact.Content] = {
        ADAPTER_CONFIG: json_bytes(pack.adapter_config(pack.factors), ADAPTER_CONFIG),
        **content_files(pack, pack.saved_dtype if dtype is None else dtype),
        SIDECAR_CONFIG: json_bytes(facts, SIDECAR_CONFIG),
        CARD: (card(pack) if text is None else text).encode("utf-8"),
    }
    artefact.replace_folder(folder, files, owned=FILES)


def push_pack(
    pack: PackValue,
    to: Destination,
    *,
    texts: bool = True,
    commit_message: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Upload a pack, with a card that names the repository; see :meth:`EditPack.push_to_hub`."""
    count = len(pack.edits)
    message = commit_message or f"Edit pack with {count} edit{'' if count == 1 else 's'}"
    text = card(pack, to.repo_id, to.subfolder, texts=texts)
    with tempfile.TemporaryDirectory() as place:
        save_pack(pack, Path(place) / "pack", dtype, text)
        return push_folder(Path(place) / "pack", to, FILES, message)


def copy_pack(source: Path, folder: str | Path) -> StoredPack:
    """Write a pack's files into another folder as they are, once they have been read and checked.

    Raises:
        FileNotFoundError, PackError: as ``read_pack``.
        OSError: ``folder`` cannot be written.
    """

    def read(place: Path) -> tuple[StoredPack, dict[str, bytes]]:
        names = [name for name in FILES if (place / name).is_file()]
        return _read(place, StoredPack), {name: read_bytes(place, name) for name in names}

    pack, files = read_steadily(source, read)
    artefact.replace_folder(folder, files, owned=FILES)
    return pack


def stored_dtype(folder: Path) -> torch.dtype:
    """dtype of the factors in a pack's folder."""
    return next(iter(load(read_bytes(folder, ADAPTER_MODEL)).values())).dtype


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


def read_pack(folder: Path, kind: type[Pack]) -> Pack:
    """Read a pack's folder as a value of this class; the factors come in float32.

    Raises:
        FileNotFoundError: a folder without sidecar: a plain LoRA.
        PackError: a file that is damaged or does not fit the others.
    """
    return read_steadily(folder, lambda place: _read(place, kind))


def read_steadily(folder: Path, read: Callable[[Path], Found]) -> Found:
    """Read a folder's files so that all come from one save, even while another process saves.

    Raises:
        PackError: the folder is replaced faster than it can be read; otherwise what ``read`` says.
    """
    return artefact.read_steadily(folder, read, PackError)


def _read(folder: Path, kind: type[Pack]) -> Pack:
    fields = _read_facts(folder, kind.options)
    rows = fields.pop("rows")
    factors, lora = read_lora(folder)
    where = folder / ADAPTER_CONFIG
    if lora.scaling != 1:
        refuse(where, f"lora_alpha / r is {lora.scaling}, not 1")
    if lora.target_modules != frozenset(factors):
        refuse(where, "target_modules are not the modules in the tensors")
    if lora.fan_in_fan_out != fields["fan_in_fan_out"]:
        refuse(where, f"fan_in_fan_out={lora.fan_in_fan_out} differs from {SIDECAR_CONFIG}")
    if rows == 0:
        factors = {name: _without_zero_row(delta, folder) for name, delta in factors.items()}
    elif rows != lora.rank:
        refuse(where, f"r={lora.rank} differs from rows={rows} in {SIDECAR_CONFIG}")
    fields |= {"factors": factors, "records": _read_records(folder)}
    fields["targets"] = _read_targets(folder)
    if issubclass(kind, StoredPack):
        fields["lora"] = read_json(folder, ADAPTER_CONFIG)
    try:
        return kind(**fields)
    except ValueError as error:
        refuse(folder, str(error))


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


def _read_facts(folder: Path, options: type[EditOptions]) -> dict[str, Any]:
    """``alphaedit/config.json``: fields of a pack by name, and ``rows``."""
    where = folder / SIDECAR_CONFIG
    if not where.exists():
        raise FileNotFoundError(
            f"{where} does not exist, so {folder} is no edit pack; if it is a plain LoRA, load it "
            "with peft.PeftModel.from_pretrained, or look at it with read_plain_lora"
        )
    raw = read_json(folder, SIDECAR_CONFIG)
    if raw.get("format_version") != FORMAT_VERSION:
        refuse(
            where,
            f"format_version={raw.get('format_version')!r} is not {FORMAT_VERSION}, the one that "
            "is read here",
            "update alphaedit_peft",
        )
    known = _TYPES | _OPTIONAL
    missing, unknown = sorted(set(_TYPES) - set(raw)), sorted(set(raw) - set(known))
    if missing or unknown:
        refuse(where, f"fields {missing} are missing, fields {unknown} are unknown")
    for name, types in known.items():
        if name in raw and type(raw[name]) not in types:
            refuse(where, f"{name}={raw[name]!r} is a {type(raw[name]).__name__}")
    del raw["format_version"]
    try:
        raw["config"] = options.from_json(raw["config"])
        metric.kind(raw["config"].objective)
        raw["base"] = None if raw["base"] is None else BaseFingerprint.from_json(raw["base"])
        if "compression" in raw:
            raw["compression"] = Compression.from_json(raw["compression"])
    except (ValueError, TypeError, OverflowError) as error:
        refuse(where, str(error), "update alphaedit_peft, or download the pack again")
    return raw


def _read_records(folder: Path) -> tuple[EditRecord, ...]:
    records = []
    for number, values in read_json_lines(folder, EDITS):
        try:
            records.append(EditRecord.from_json(values))
        except (ValueError, TypeError) as error:
            refuse(f"{folder / EDITS}, line {number}", str(error))
    return tuple(records)


def _read_targets(folder: Path) -> Tensor | None:
    """z (n, d_model), or None where the pack has no target values."""
    if not (folder / TARGETS).exists():
        return None
    tensors = read_tensors(folder, TARGETS)
    if set(tensors) != {"z"}:
        refuse(folder / TARGETS, f"holds {sorted(tensors)}, not 'z' alone")
    return tensors["z"]

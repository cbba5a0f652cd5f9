"""A pack's folder as a whole: written from a value, read into one, sent to the Hub and fetched.

In: a pack, or a folder or repository. Out: the folder, in one step; or a pack whose LoRA half and
sidecar tell the same story. What comes from the Hub or goes there is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from alphaedit_peft import saving, solve_metric
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.hub import Destination, fetch_folder, push_folder
from alphaedit_peft.messages import shown
from alphaedit_peft.pack import format
from alphaedit_peft.pack.card import card
from alphaedit_peft.pack.contents import (
    Compression,
    Pack,
    PackContents,
    check_targets,
    content_files,
)
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.pack.format import FILES, SIDECAR_CONFIG, Factors, PackError, refuse
from alphaedit_peft.safe_files import Field, check_fields, refusing
from alphaedit_peft.settings import EditOptions
from alphaedit_peft.tables import count


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredPack(PackContents):
    """A pack read without PEFT, which writes the fields of the LoRA config that it came with."""

    lora: Mapping[str, Any]  # adapter_config.json, of a plain LoRA
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
    pack: PackContents,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    text: str | None = None,
) -> None:
    """Write a pack's folder, with ``text`` as its card; see :meth:`EditPack.save_pretrained`."""
    facts = {
        "format_version": format.FORMAT_VERSION,
        "rows": pack.rank,  # 0 where the one row of A is no edit
        "config": pack.config.to_json(),
        "fan_in_fan_out": pack.fan_in_fan_out,
        **pack.provenance,
    }
    if pack.compression is not None:
        facts["compression"] = pack.compression.to_json()
    if pack.decisions:
        facts["decisions"] = pack.decisions
    values = {format.ADAPTER_CONFIG: pack.adapter_config(pack.factors), SIDECAR_CONFIG: facts}
    files: dict[str, saving.Content] = {
        **{name: format.json_bytes(value, name) for name, value in values.items()},
        **content_files(pack, pack.saved_dtype if dtype is None else dtype),
        format.CARD: (card(pack) if text is None else text).encode("utf-8"),
    }
    saving.replace_folder(folder, files, owned=FILES)


def push_pack(
    pack: PackContents, to: Destination, texts: bool, message: str | None, dtype: torch.dtype | None
) -> str:
    """Upload a pack, with a card that names the repository; see :meth:`EditPack.push_to_hub`."""
    message = message or f"Edit pack with {count(len(pack.edits), 'edit')}"
    text = card(pack, to.repo_id, to.subfolder, texts=texts)
    with saving.temporary_folder() as place:
        save_pack(pack, place / "pack", dtype, text)
        return push_folder(place / "pack", to, FILES, message)


def copy_pack(source: Path, folder: str | Path) -> StoredPack:
    """Write a pack's files into another folder as they are, after reading and checking them."""

    def read(place: Path) -> tuple[StoredPack, dict[str, bytes]]:
        names = [name for name in FILES if (place / name).is_file()]
        return _read(place, StoredPack), {name: format.read_bytes(place, name) for name in names}

    pack, files = saving.read_steadily(source, read, PackError)
    saving.replace_folder(folder, files, owned=FILES)
    return pack


def stored_dtype(folder: Path) -> torch.dtype:
    """dtype of the factors in a pack's folder."""
    with format.opened_tensors(folder, format.ADAPTER_MODEL) as file:
        return next(iter(file.tensors.values())).dtype


def locate(
    path_or_repo: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of a pack; of a repository, ``fetch_folder`` gets the pack's own files.

    Raises:
        FileNotFoundError: neither a folder here nor a repository that this token may read; a
            folder of several adapters.
    """
    folder = Path(path_or_repo) / (subfolder or "")
    if folder.is_dir():
        return own_folder(folder)
    aside = saving.left_aside(folder)
    if aside is not None:
        return aside
    if isinstance(path_or_repo, Path) or Path(path_or_repo).exists():
        raise FileNotFoundError(
            f"{folder} is no folder here, and no Hub repository name either; check the path"
        )
    return fetch_folder(path_or_repo, FILES, revision=revision, token=token, subfolder=subfolder)


def own_folder(folder: Path) -> Path:
    """The folder itself, or, where adapters lie in it by name as PEFT saves them, that of the one.

    Raises:
        FileNotFoundError: it holds several.
    """
    if any((folder / name).exists() for name in (format.ADAPTER_CONFIG, SIDECAR_CONFIG)):
        return folder
    named = sorted(place.parent for place in folder.glob(f"*/{format.ADAPTER_CONFIG}"))
    if len(named) > 1:
        raise FileNotFoundError(
            f"{folder} holds {count(len(named), 'adapter')} by name, such as {named[0].name!r} and "
            f"{named[1].name!r}, and none itself; give the folder of one, such as {named[0]}"
        )
    return named[0] if named else folder


def read_pack(folder: Path, kind: type[Pack]) -> Pack:
    """Read a pack's folder as a value of this class; the factors come in float32.

    Raises:
        FileNotFoundError: a folder without sidecar: a plain LoRA.
        PackError: a file that is damaged or does not fit the others.
    """
    return saving.read_steadily(folder, lambda place: _read(place, kind), PackError)


def _read(folder: Path, kind: type[Pack]) -> Pack:
    fields = _facts(folder, kind.options)
    rows = fields.pop("rows")
    factors, lora = format.read_lora(folder)
    where = folder / format.ADAPTER_CONFIG
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
    fields |= {
        "factors": factors,
        "records": _records(folder),
        "targets": _targets(folder, factors),
    }
    if issubclass(kind, StoredPack):
        fields["lora"] = format.read_json(folder, format.ADAPTER_CONFIG)
    with refusing(folder, format.damaged):
        pack = kind(**fields)
    if not all(_holds(pack.saved_dtype, delta) for delta in factors.values()):
        refuse(
            folder / format.ADAPTER_MODEL, f"factors are not the {pack.saved_dtype} of the sidecar"
        )
    return pack


def _holds(dtype: torch.dtype, delta: LowRankDelta) -> bool:
    """Whether factors are exact in a dtype."""
    sides = () if dtype == torch.float32 else (delta.A, delta.B)
    return all(bool((side == side.to(dtype)).all()) for side in sides)


def _without_zero_row(delta: LowRankDelta, folder: Path) -> LowRankDelta:
    if delta.rank != 1 or bool(delta.A.any()) or bool(delta.B.any()):
        where = folder / format.ADAPTER_MODEL
        refuse(where, f"holds {delta.rank} rows, {SIDECAR_CONFIG} says rows=0")
    return LowRankDelta(delta.A[:0], delta.B[:, :0])


_FIELDS = {
    "format_version": Field(int),
    "rows": Field(int),
    "config": Field(dict),
    "contexts": Field(list, each=Field(str)),
    "fan_in_fan_out": Field(bool),
    "base": Field((dict, type(None))),
    "null_space": Field((dict, type(None))),
    "versions": Field(dict),
    "parents": Field(list, each=Field(dict)),
    "compression": Field(dict, optional=True),
    "decisions": Field(list, each=Field(dict), optional=True),
}


def _facts(folder: Path, options: type[EditOptions]) -> dict[str, Any]:
    """``alphaedit/config.json``: fields of a pack by name, and ``rows``."""
    where = folder / SIDECAR_CONFIG
    if not where.exists():
        raise FileNotFoundError(
            f"{where} does not exist, so {folder} is no edit pack; if it is a plain LoRA, load it "
            "with peft.PeftModel.from_pretrained, or look at it with read_plain_lora"
        )
    raw = format.read_json(folder, SIDECAR_CONFIG)
    version, known = raw.get("format_version"), format.FORMAT_VERSION
    if version != known:
        wrong = f"format_version={shown(version)} is not {known}, the one that is read here"
        refuse(where, wrong, "update alphaedit_peft")
    with refusing(where, format.damaged):
        check_fields(raw, _FIELDS)
        del raw["format_version"]
        raw["config"] = options.from_json(raw["config"])
        solve_metric.kind(raw["config"].objective)
        raw["base"] = None if raw["base"] is None else BaseFingerprint.from_json(raw["base"])
        if "compression" in raw:
            raw["compression"] = Compression.from_json(raw["compression"])
    return raw


def _records(folder: Path) -> tuple[EditRecord, ...]:
    records = []
    for where, values in format.read_json_lines(folder, format.EDITS):
        with refusing(where, format.damaged):
            records.append(EditRecord.from_json(values))
    return tuple(records)


def _targets(folder: Path, factors: Factors) -> Tensor | None:
    """z (n, d_model), or None where the pack has no target values."""
    where = folder / format.TARGETS
    if not where.exists() and not where.is_symlink():
        return None
    with format.opened_tensors(folder, format.TARGETS) as file, refusing(where, format.damaged):
        if set(file.tensors) != {"z"}:
            raise ValueError(f"holds {shown(sorted(file.tensors))}, not 'z' alone")
        check_targets(factors, file.tensors["z"].shape)
        return file.read("z").float()

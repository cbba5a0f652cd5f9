"""Read and write the two files of a null-space artefact: tensors as safetensors, the rest as JSON.

In: named float32 tensors and plain values. Out: ``<stem>.safetensors`` and ``<stem>.json`` in a
folder, or on the Hugging Face Hub. Nothing is pickled, and nothing that was read is trusted: names,
shapes and values are checked here or by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1
Types = type | tuple[type, ...]
ORIGIN: dict[str, Types] = {"tokens": int, "fingerprint": (dict, type(None)), "provenance": dict}


def write_artefact(
    folder: str | Path, stem: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write tensors and values, with the format's name and version, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / f"{stem}.safetensors")
    text = json.dumps({"format": stem, "version": FORMAT_VERSION, **values}, indent=2)
    (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")


def read_artefact(
    folder: str | Path, stem: str, fields: Mapping[str, Types]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_artefact`` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file that is damaged, of another format or version, or with other fields or
            types of them, or tensors that are not finite float32.
    """
    json_path, tensor_path = (Path(folder) / f"{stem}{end}" for end in (".json", ".safetensors"))
    for path in (json_path, tensor_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {folder} holds no {stem} artefact")
    try:
        values = json.loads(json_path.read_text(encoding="utf-8"))
        tensors = load_file(tensor_path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged {stem} artefact: {error}") from error
    _check_header(json_path, stem, values, fields)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{tensor_path}: {name} ({tensor.dtype}) is not finite float32; the file is damaged"
            )
    return tensors, {name: values[name] for name in fields}


def artefact_folder(
    path_or_repo: str | Path,
    stem: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """The local folder of an artefact; a Hub repo's two files are fetched into the Hub's cache.

    Raises:
        FileNotFoundError: neither a folder nor the form of a repo's name.
    """
    local = Path(path_or_repo)
    if local.is_dir():
        return local / subfolder if subfolder else local
    repo = str(path_or_repo)
    if repo.count("/") > 1 or repo.startswith((".", "/", "~")) or local.is_file():
        raise FileNotFoundError(f"{repo} is no folder, and no Hub repo's name ('user/name')")
    from huggingface_hub import hf_hub_download

    fetched = [
        hf_hub_download(repo, f"{stem}{end}", subfolder=subfolder, revision=revision, token=token)
        for end in (".json", ".safetensors")
    ]
    return Path(fetched[0]).parent


def versions() -> dict[str, str]:
    """Versions of what makes the numbers, for provenance."""
    return {name: version(name) for name in ("alphaedit_peft", "torch", "transformers")}


def _check_header(path: Path, stem: str, values: Any, fields: Mapping[str, Types]) -> None:
    header = values if isinstance(values, dict) else {}
    if header.get("format") != stem or header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is format {header.get('format')!r} version {header.get('version')!r}; this "
            f"version of alphaedit_peft reads {stem!r} version {FORMAT_VERSION}"
        )
    if set(header) != {"format", "version", *fields}:
        wrong = sorted(set(header) ^ {"format", "version", *fields})
        raise ValueError(f"{path}: fields {wrong} are missing or unknown; the file is damaged")
    for name, types in fields.items():
        if not isinstance(header[name], types):
            raise ValueError(f"{path}: {name}={header[name]!r} is of a wrong type; damaged file")

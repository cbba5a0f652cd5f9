"""Read and write the two files of a null-space artefact: tensors as safetensors, the rest as JSON.

In: named float32 tensors and plain values. Out: ``<stem>.safetensors`` and ``<stem>.json`` in a
folder. Nothing is pickled, and nothing that was read is trusted: sizes, names, shapes and values
are checked here or by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaedit_peft.storing import Content, left_aside, read_steadily, replace_folder

FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_NAMES_BYTES = 2**20  # of the list of tensors; a few hundred bytes for each layer
MAX_TENSOR_BYTES = 64 * 2**30  # moments of 19 layers of d_in 28,672, as in 70B models
Types = type | tuple[type, ...]
ORIGIN: dict[str, Types] = {"tokens": int, "fingerprint": (dict, type(None)), "provenance": dict}


def write_artefact(
    folder: str | Path, stem: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write tensors and values, with the format's name and version, into a folder, in one step.

    The folder's other files stay. A process killed at any moment leaves the old two files or the
    new ones.

    Raises:
        FileExistsError: ``folder`` is a file.
        ValueError: ``folder`` is, or holds, the working directory.
        OSError: the disk is full, or a right is missing; what was there before is untouched.
    """
    kept = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": stem, "version": FORMAT_VERSION, **values}, indent=2)
    files: dict[str, Content] = {
        f"{stem}.safetensors": partial(_save_tensors, kept),
        f"{stem}.json": (text + "\n").encode(),
    }
    replace_folder(folder, files)


def read_artefact(
    folder: str | Path, stem: str, fields: Mapping[str, Types]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_artefact`` wrote, both files of one save.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file that is damaged, over its limit, of another format or version, or with
            other fields or types of them, or tensors that are not finite float32.
    """
    place = left_aside(folder) or Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of a {stem} artefact")
    return read_steadily(place, lambda found: _read(found, stem, fields))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it has no errno; a full disk is one
        raise OSError(str(error)) from error


def _read(
    folder: Path, stem: str, fields: Mapping[str, Types]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    json_path, tensor_path = (folder / f"{stem}{end}" for end in (".json", ".safetensors"))
    for path in (json_path, tensor_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {folder} holds no {stem} artefact")
    try:
        _check_sizes(json_path, tensor_path)
        values = json.loads(json_path.read_text(encoding="utf-8"))
        tensors = load_file(tensor_path)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged {stem} artefact: {error}") from error
    _check_header(json_path, stem, values, fields)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{tensor_path}: {name} ({tensor.dtype}) is not finite float32; the file is damaged"
            )
    return tensors, {name: values[name] for name in fields}


def _check_sizes(json_path: Path, tensor_path: Path) -> None:
    """Refuse files over their limits, before anything of them is parsed."""
    with tensor_path.open("rb") as file:
        names = int.from_bytes(file.read(8), "little")  # how safetensors begins
    found = (
        (json_path, "the file", json_path.stat().st_size, MAX_JSON_BYTES),
        (tensor_path, "the file", tensor_path.stat().st_size, MAX_TENSOR_BYTES),
        (tensor_path, "its list of tensors", names, MAX_NAMES_BYTES),
    )
    for path, what, size, limit in found:
        if size > limit:
            raise ValueError(
                f"{path.name}: {what} takes {size} bytes, over the limit of {limit}; make or "
                "download it again"
            )


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

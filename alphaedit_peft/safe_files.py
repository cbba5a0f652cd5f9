"""Artefacts on disk, and strangers' files read safely.

In: tensors and values, or files from anywhere. Out: a folder of two files that belong together; or
bytes, JSON, tensors: nothing is unpickled, no link out of the folder is followed, no file is read
past its limit, and no NaN or infinity gets through where numbers are used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from alphaedit_peft import parallel
from alphaedit_peft.saving import Content, left_aside, read_steadily, replace_folder

Damaged = Callable[[str | Path, str], Exception]  # the error for a file: where, what is wrong
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_NAMES_BYTES = 2**20  # of the list of tensors; a few hundred bytes for each layer
MAX_TENSOR_BYTES = 64 * 2**30  # moments of 19 layers of d_in 28,672, as in 70B models
Types = type | tuple[type, ...]
ORIGIN: dict[str, Types] = {"tokens": int, "fingerprint": (dict, type(None)), "provenance": dict}


def read_bytes(folder: Path, name: str, limit: int, damaged: Damaged) -> bytes:
    """Read a regular file of at most ``limit`` bytes that lies within the folder."""
    path = folder / name
    if not path.is_file():
        raise damaged(path, "the file is missing")
    if not any(path.resolve().is_relative_to(root) for root in _allowed_roots(folder)):
        raise damaged(path, f"a link leads out of the folder, to {path.resolve()}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if max(size, len(data)) > limit:
        raise damaged(path, f"the file is larger than the limit of {limit} bytes")
    return data


def parse_json(data: bytes, where: str | Path, damaged: Damaged) -> dict[str, Any]:
    """Parse a JSON object with finite numbers."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in data.lower():  # half a surrogate pair is no text: it could not be saved again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged(where, f"holds a JSON {type(value).__name__}, not an object")
    return value


def parse_tensors(
    data: bytes, where: str | Path, dtypes: Collection[torch.dtype], damaged: Damaged
) -> dict[str, Tensor]:
    """Parse a safetensors file of finite numbers, on the CPU."""
    try:
        tensors = load(data)
    except Exception as error:  # what the parser raises on hostile bytes is not documented
        raise damaged(where, f"not a safetensors file ({error})") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise damaged(where, f"{key} is {tensor.dtype}, not one of {dtypes}")
        if not bool(torch.isfinite(tensor).all()):
            raise damaged(where, f"{key} holds NaN or infinity")
    return tensors


def write_artefact(
    folder: str | Path, stem: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write tensors and values, with the format's name and version, into a folder, in one step.

    Of several processes the main one does. The folder's other files stay. A process killed at any
    moment leaves the old two files or the new ones. Errors are those of ``replace_folder``.
    """
    if not parallel.is_main():
        return
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


def versions(*more: str) -> dict[str, str]:
    """Versions of what makes the numbers, as far as it is installed, for provenance."""
    found = {}
    for name in sorted(("alphaedit_peft", "torch", "transformers", *more)):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _allowed_roots(folder: Path) -> list[Path]:
    """The folder itself and, inside the Hub's cache, the blobs that its snapshots link to.

    The cache keeps a repository in models--OWNER--NAME, with snapshots/COMMIT and blobs.
    """
    here = folder.resolve()
    repositories = [
        parent.parent
        for parent in here.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    return [here, *(repository / "blobs" for repository in repositories)]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


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


def _check_header(path: Path, stem: str, values: Any, fields: Mapping[str, Types]) -> None:
    header = values if isinstance(values, dict) else {}
    if header.get("format") != stem or header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is format {header.get('format')!r} version {header.get('version')!r}; this "
            f"version of alphaedit_peft reads {stem!r} version {FORMAT_VERSION}"
        )
    if wrong := sorted(set(header) ^ {"format", "version", *fields}):
        raise ValueError(f"{path}: fields {wrong} are missing or unknown; the file is damaged")
    for name, types in fields.items():
        if not isinstance(header[name], types):
            raise ValueError(f"{path}: {name}={header[name]!r} is of a wrong type; damaged file")

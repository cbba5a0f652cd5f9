"""The pack's file names and limits, and strict reading of single files.

In: a pack folder and a file name. Out: JSON values or tensors that are safe to use, or a
:class:`PackError` that names the file, what is wrong with it and what to do. Packs come from
strangers: nothing is unpickled, no link out of the folder is followed, no file is read past its
limit, and no tensor with NaN or infinity gets through.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor

FORMAT_VERSION = 1
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
CARD = "README.md"
SIDECAR_CONFIG = "alphaedit/config.json"
EDITS = "alphaedit/edits.jsonl"
TARGETS = "alphaedit/targets.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, CARD, SIDECAR_CONFIG, EDITS, TARGETS)

MAX_JSON_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**20
MAX_TENSOR_BYTES = 16 * 2**30  # 20,000 edits of a model with 70 billion parameters
REMEDY = "the pack is damaged, save or download it again"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackError(ValueError):
    """A pack whose files cannot be used: which file, what is wrong, what to do."""


def refuse(where: str | Path, wrong: str, remedy: str = REMEDY) -> NoReturn:
    """Raise the error for a file that cannot be used."""
    raise PackError(f"{where}: {wrong}; {remedy}")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of at most ``MAX_JSON_BYTES``.

    Raises:
        PackError: a missing, too large or climbing file, or one that is no JSON object.
    """
    return parse_json(read_bytes(folder, name, MAX_JSON_BYTES), folder / name)


def read_json_lines(folder: Path, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON objects with their line numbers; a line has at most ``MAX_LINE_BYTES``.

    Raises:
        PackError: as ``read_json``, with the number of the line.
    """
    lines = read_bytes(folder, name, MAX_JSON_BYTES).split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{folder / name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            refuse(where, f"{len(line)} bytes are more than the limit of {MAX_LINE_BYTES}")
        if line.strip():
            found.append((number, parse_json(line, where)))
    return found


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, floating and finite, on the CPU in float32.

    The file has at most ``MAX_TENSOR_BYTES``.

    Raises:
        PackError: a missing, too large or climbing file, no safetensors file, another dtype, NaN
            or infinity.
    """
    data = read_bytes(folder, name, MAX_TENSOR_BYTES)
    where = folder / name
    try:
        tensors = load(data)
    except Exception as error:  # what the parser raises on hostile bytes is not documented
        raise PackError(f"{where}: not a safetensors file ({error}); {REMEDY}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            refuse(where, f"{key} is {tensor.dtype}, not one of {DTYPES}")
        if not bool(torch.isfinite(tensor).all()):
            refuse(where, f"{key} holds NaN or infinity")
    return {key: tensor.float() for key, tensor in tensors.items()}


def read_bytes(folder: Path, name: str, limit: int = MAX_TENSOR_BYTES) -> bytes:
    """Read a regular file that lies within the folder.

    Raises:
        PackError: a missing file, one that a link takes out of the folder, or one over the limit.
    """
    path = folder / name
    if not path.is_file():
        refuse(path, "the file is missing")
    if not any(path.resolve().is_relative_to(root) for root in _allowed_roots(folder)):
        refuse(path, f"a link leads out of the folder, to {path.resolve()}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(size + 1)
    if max(size, len(data)) > limit:
        refuse(path, f"the file is larger than the limit of {limit} bytes")
    return data


def parse_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """Parse a JSON object with finite numbers.

    Raises:
        PackError: anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if b"\\ud" in data.lower():  # half a surrogate pair is no text: it could not be saved again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise PackError(f"{where}: not valid JSON ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        refuse(where, f"holds a JSON {type(value).__name__}, not an object")
    return value


def json_bytes(value: Mapping[str, Any], name: str) -> bytes:
    """A JSON object as the bytes of a file, keys sorted, within the limit that reading sets.

    Raises:
        PackError: a value that JSON cannot hold, or a file that would be over the limit.
    """
    return _within(_dump(value, name, indent=2) + b"\n", MAX_JSON_BYTES, name)


def json_lines_bytes(values: list[dict[str, Any]], name: str) -> bytes:
    """JSON objects as the bytes of a file, one a line, within the limits that reading sets.

    Raises:
        PackError: a value that JSON cannot hold, or a line or file that would be over its limit.
    """
    lines = [_within(_dump(value, name), MAX_LINE_BYTES, f"{name}, a line") for value in values]
    return _within(b"".join(line + b"\n" for line in lines), MAX_JSON_BYTES, name)


def tensor_bytes(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> bytes:
    """Tensors as the bytes of a safetensors file, rounded to ``dtype``.

    Raises:
        PackError: a dtype that packs do not use, or a value that it cannot hold.
    """
    if dtype not in DTYPES:
        raise PackError(f"dtype={dtype} cannot be saved; use one of {DTYPES}")
    rounded = {k: t.detach().to("cpu", dtype).contiguous().clone() for k, t in tensors.items()}
    for key, tensor in rounded.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PackError(f"{name}: {key} does not fit {dtype}; save it in torch.float32")
    return save(rounded, metadata={"format": "pt"})


def _dump(value: Mapping[str, Any], name: str, indent: int | None = None) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False, indent=indent)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise PackError(f"{name}: {error}; use values that JSON can hold") from error


def _within(data: bytes, limit: int, name: str) -> bytes:
    if len(data) > limit:
        raise PackError(f"{name}: {len(data)} bytes are more than the limit of {limit}; split it")
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


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

"""What a pack's files are: their names and limits, PEFT's keys, and strict reading of each.

In: a folder and a file's name, or values to store. Out: JSON values, tensors or LoRA factors that
are safe to use, or a file's bytes; what cannot be read or written raises a :class:`PackError` that
names the file, what is wrong and what to do. Packs come from strangers: nothing is unpickled, no
link out of the folder is followed, no file is read past its limit, no NaN or infinity gets through.
A LoRA layer adds (alpha / r) B A x (Hu et al., 2021, section 4.1); a pack has alpha = r, so B A is
AlphaEdit's Delta itself. Anything but plain LoRA (DoRA, rank patterns, biases, changed base
weights) would compute something else and is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

from alphaedit_peft import algebra, safe_files
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.messages import sentence, shown
from alphaedit_peft.safe_files import (
    DamagedFileError,
    Field,
    TensorFile,
    check_fields,
    refusing,
    shown_name,
)

FORMAT_VERSION = 1
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
CARD = "README.md"
SIDECAR_CONFIG = "alphaedit/config.json"
EDITS = "alphaedit/edits.jsonl"
TARGETS = "alphaedit/targets.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, CARD, SIDECAR_CONFIG, EDITS, TARGETS)

MAX_JSON_BYTES = 16 * 2**20
MAX_EDITS_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**20
MAX_SIDE = 2**20  # of a factor
MAX_TENSOR_BYTES = 16 * 2**30  # 20,000 edits of a model with 70 billion parameters
REMEDY = "the pack is damaged, save or download it again"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Factors = dict[str, LowRankDelta]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MOST = 2**31
_USE_PEFT = "load it with peft.PeftModel.from_pretrained instead"
_LORA = {
    "r": Field(int, 1, _MOST),
    "lora_alpha": Field((int, float), 0, _MOST),
    "target_modules": Field((str, list, type(None)), each=Field(str), optional=True),
    "fan_in_fan_out": Field(bool, optional=True),
    "use_rslora": Field(bool, optional=True),
}
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others (PiSSA, LoftQ ...) change the base
}
_NO_EFFECT = {
    "peft_type",  # read first
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}


class PackError(DamagedFileError):
    """A pack whose files cannot be used: which file, what is wrong, what to do."""


def damaged(where: str | Path, wrong: str, remedy: str = REMEDY) -> PackError:
    """The error for a file that cannot be used."""
    return PackError(sentence(where, wrong, remedy))


def refuse(where: str | Path, wrong: str, remedy: str = REMEDY) -> NoReturn:
    """Raise ``damaged``."""
    raise damaged(where, wrong, remedy)


@dataclass(frozen=True)
class LoraFacts:
    """What ``adapter_config.json`` says that changes what the adapter computes."""

    rank: int
    scaling: float
    target_modules: frozenset[str] | None  # None: a pattern, or names of parts
    fan_in_fan_out: bool


def read_lora(folder: Path) -> tuple[Factors, LoraFacts]:
    """Read a plain LoRA's folder, whose tensors agree with its config, unscaled, in float32."""
    facts = _lora_facts(folder)
    where = folder / ADAPTER_MODEL
    with opened_tensors(folder, ADAPTER_MODEL) as file:
        keys = _pairs({name: stored.shape for name, stored in file.tensors.items()}, where)
        for module, (key, _) in keys.items():
            rank = file.tensors[key].shape[0]
            if rank != facts.rank:
                name = shown_name(module)
                refuse(where, f"{name} has rank {rank}, {ADAPTER_CONFIG} says r={facts.rank}")
        factors = {
            module: LowRankDelta(*(file.read(key).float() for key in pair))
            for module, pair in keys.items()
        }
    return factors, facts


def read_plain_lora(folder: str | Path) -> Factors:
    """Read any plain LoRA adapter, by full module name, with its scaling folded into B.

    For looking and judging only: without the sidecar there is no telling which row is which edit.

    Raises:
        PackError: a damaged file, or an adapter that is not plain LoRA.
    """
    factors, facts = read_lora(Path(folder))
    return {name: LowRankDelta(d.A, d.B * facts.scaling) for name, d in factors.items()}


def lora_state(factors: Mapping[str, LowRankDelta]) -> dict[str, Tensor]:
    """The factors under PEFT's names; without a row, one zero row, since LoRA needs r >= 1."""
    state = {}
    for module, delta in factors.items():
        delta = delta if delta.rank else algebra.padded(delta, 1)
        state[f"base_model.model.{module}.lora_A.weight"] = delta.A
        state[f"base_model.model.{module}.lora_B.weight"] = delta.B
    return state


def by_block(module: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object with finite numbers."""
    return safe_files.read_json(folder / name, damaged, MAX_JSON_BYTES, within=folder)


def read_json_lines(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read JSON objects, each with its place; a line has at most ``MAX_LINE_BYTES``."""
    return safe_files.json_lines(
        folder / name, damaged, (MAX_EDITS_BYTES, MAX_LINE_BYTES), within=folder
    )


@contextmanager
def opened_tensors(folder: Path, name: str) -> Iterator[TensorFile]:
    """The header of a safetensors file within the folder, of tensors of ``DTYPES``."""
    limit = MAX_TENSOR_BYTES
    with safe_files.opened_tensors(folder / name, limit, damaged, within=folder) as file:
        file.require(DTYPES)
        yield file


def read_bytes(folder: Path, name: str) -> bytes:
    """Read a regular file that lies within the folder and is no larger than its limit."""
    limit = MAX_TENSOR_BYTES if name.endswith(".safetensors") else MAX_EDITS_BYTES
    return safe_files.read_bytes(folder / name, limit, damaged, within=folder)


def json_bytes(value: Mapping[str, Any], name: str) -> bytes:
    """A JSON object as the bytes of a file, keys sorted, within the limit that reading sets."""
    return _within(_dump(value, name, indent=2) + b"\n", MAX_JSON_BYTES, name)


def json_lines_bytes(values: Iterable[dict[str, Any]], name: str) -> bytes:
    """JSON objects as the bytes of a file, one a line, each line within its limit too."""
    lines = [_within(_dump(value, name), MAX_LINE_BYTES, f"{name}, a line") for value in values]
    return _within(b"".join(line + b"\n" for line in lines), MAX_EDITS_BYTES, name)


def tensor_bytes(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> bytes:
    """Tensors as the bytes of a safetensors file, rounded to one of ``DTYPES``."""
    if dtype not in DTYPES:
        raise PackError(f"dtype={dtype} cannot be saved; use one of {DTYPES}")
    rounded = {k: t.detach().to("cpu", dtype).contiguous().clone() for k, t in tensors.items()}
    for key, tensor in rounded.items():
        if not safe_files.finite(tensor):
            raise PackError(f"{name}: {key} does not fit {dtype}; save it in torch.float32")
    return save(rounded, metadata={"format": "pt"})


def _lora_facts(folder: Path) -> LoraFacts:
    raw = read_json(folder, ADAPTER_CONFIG)
    where = folder / ADAPTER_CONFIG
    if raw.get("peft_type") != "LORA":
        refuse(where, f"peft_type={shown(raw.get('peft_type'))} is not 'LORA'", _USE_PEFT)
    for name in sorted(set(raw) - {*_LORA} - _NO_EFFECT):
        if raw[name] not in _ALLOWED.get(name, (None, False, {}, [])):
            wrong = f"{shown_name(name)}={shown(raw[name])} is more than plain LoRA"
            refuse(where, wrong, _USE_PEFT)
    with refusing(where, damaged):
        check_fields(raw, _LORA, others=True)
    rank, modules = raw["r"], raw.get("target_modules")
    return LoraFacts(
        rank=rank,
        scaling=raw["lora_alpha"] / (math.sqrt(rank) if raw.get("use_rslora") else rank),
        target_modules=frozenset(modules) if isinstance(modules, list) else None,
        fan_in_fan_out=raw.get("fan_in_fan_out", False),
    )


def _pairs(shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, tuple[str, str]]:
    """Module -> keys of its A (r, d_in) and B (d_out, r), lowest block first, from their shapes."""
    sides: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            wrong = f"key {shown(key)} is not 'base_model.model.<module>.lora_A.weight' or lora_B"
            refuse(where, wrong)
        if len(shape) != 2 or not all(0 < size <= MAX_SIDE for size in shape):
            refuse(where, f"{shown_name(key)} {shape} is not a matrix of 1 to {MAX_SIDE} a side")
        sides.setdefault(match["module"], {})[match["side"]] = key
    if not sides:
        refuse(where, "there is no tensor in it")
    for module, found in sides.items():
        name = shown_name(module)
        if len(found) != 2:
            refuse(where, f"{name} has lora_{next(iter(found))} only")
        A, B = shapes[found["A"]], shapes[found["B"]]
        if A[0] != B[1]:
            refuse(where, f"{name}: A {A} and B {B} do not multiply")
    return {m: (sides[m]["A"], sides[m]["B"]) for m in sorted(sides, key=by_block)}


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

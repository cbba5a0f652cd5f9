"""The LoRA half of a pack, as PEFT reads it: ``adapter_config.json`` and the factors.

In: factors by full module name, or a folder. Out: bytes that plain PEFT, transformers and servers
load without this package, or factors again. The layer adds (alpha / r) B A x (Hu et al., 2021,
section 4.1); a pack has alpha = r, so B A is AlphaEdit's Delta itself. Anything but plain LoRA
(DoRA, rank patterns, biases, changed base weights) would compute something else and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.pack.format import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    json_bytes,
    read_json,
    read_tensors,
    refuse,
)

Factors = dict[str, LowRankDelta]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MOST = 2**31
_USE_PEFT = "load it with peft.PeftModel.from_pretrained instead"
_CHECKED = {"peft_type", "r", "lora_alpha", "target_modules", "fan_in_fan_out", "use_rslora"}
_ALLOWED: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others (PiSSA, LoftQ ...) change the base
}
_NO_EFFECT = {
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


@dataclass(frozen=True)
class LoraFacts:
    """What ``adapter_config.json`` says that changes what the adapter computes."""

    rank: int
    scaling: float
    target_modules: frozenset[str] | None  # None: a pattern, or names of parts
    fan_in_fan_out: bool


def lora_state(factors: Mapping[str, LowRankDelta]) -> dict[str, Tensor]:
    """The factors under PEFT's names; without a row, one zero row, since LoRA needs r >= 1."""
    state = {}
    for module, delta in factors.items():
        A, B = delta.A, delta.B
        if delta.rank == 0:
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        state[f"base_model.model.{module}.lora_A.weight"] = A
        state[f"base_model.model.{module}.lora_B.weight"] = B
    return state


def adapter_config_bytes(
    factors: Mapping[str, LowRankDelta], config: AlphaEditConfig, fan_in_fan_out: bool
) -> bytes:
    """``adapter_config.json``: PEFT's own LoraConfig with scaling 1 and full module names."""
    rank = next(iter(factors.values())).rank
    return json_bytes(config.adapter_config(list(factors), rank, fan_in_fan_out), ADAPTER_CONFIG)


def read_lora(folder: Path) -> tuple[Factors, LoraFacts]:
    """Read a LoRA folder whose tensors agree with its config, unscaled.

    Raises:
        PackError: a damaged file, or an adapter that is not plain LoRA.
    """
    facts = _read_facts(folder)
    where = folder / ADAPTER_MODEL
    factors = _pair(read_tensors(folder, ADAPTER_MODEL), where)
    for module, delta in factors.items():
        if delta.rank != facts.rank:
            refuse(where, f"{module} has rank {delta.rank}, {ADAPTER_CONFIG} says r={facts.rank}")
    return factors, facts


def read_plain_lora(folder: str | Path) -> Factors:
    """Read any plain LoRA adapter, by full module name, with its scaling folded into B.

    For looking and judging only: without the sidecar there is no telling which row is which edit.

    Raises:
        PackError: a damaged file, or an adapter that is not plain LoRA.
    """
    factors, facts = read_lora(Path(folder))
    return {name: LowRankDelta(d.A, d.B * facts.scaling) for name, d in factors.items()}


def by_block(module: str) -> list[tuple[int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _read_facts(folder: Path) -> LoraFacts:
    raw = read_json(folder, ADAPTER_CONFIG)
    where = folder / ADAPTER_CONFIG
    if raw.get("peft_type") != "LORA":
        refuse(where, f"peft_type={raw.get('peft_type')!r} is not 'LORA'", _USE_PEFT)
    for name in sorted(set(raw) - _CHECKED - _NO_EFFECT):
        allowed = _ALLOWED.get(name, (None, False, {}, []))
        if raw[name] not in allowed:
            refuse(where, f"{name}={raw[name]!r} is more than plain LoRA", _USE_PEFT)
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MOST:
        refuse(where, f"r={rank!r} is not a whole number in 1..{_MOST}")
    if type(alpha) not in (int, float) or not 0 <= alpha <= _MOST:
        refuse(where, f"lora_alpha={alpha!r} is not a number in 0..{_MOST}")
    for name in ("fan_in_fan_out", "use_rslora"):
        if not isinstance(raw.get(name, False), bool):
            refuse(where, f"{name}={raw[name]!r} is neither true nor false")
    return LoraFacts(
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank),
        target_modules=_target_modules(raw, where),
        fan_in_fan_out=raw.get("fan_in_fan_out", False),
    )


def _target_modules(raw: Mapping[str, Any], where: Path) -> frozenset[str] | None:
    given = raw.get("target_modules")
    if given is None or isinstance(given, str):
        return None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        refuse(where, f"target_modules={given!r} is not a list of module names")
    return frozenset(given)


def _pair(tensors: Mapping[str, Tensor], where: Path) -> Factors:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            refuse(where, f"key {key!r} is not 'base_model.model.<module>.lora_A.weight' or lora_B")
        if tensor.ndim != 2:
            refuse(where, f"{key} {tuple(tensor.shape)} is not a matrix")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        refuse(where, "there is no tensor in it")
    for module, found in sides.items():
        if len(found) != 2:
            refuse(where, f"{module} has lora_{next(iter(found))} only")
        A, B = found["A"], found["B"]
        if A.shape[0] != B.shape[1]:
            refuse(where, f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply")
    return {m: LowRankDelta(sides[m]["A"], sides[m]["B"]) for m in sorted(sides, key=by_block)}

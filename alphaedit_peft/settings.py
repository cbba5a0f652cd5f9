"""What the config's fields may hold: presets, choices, types and ranges, as tables.

In: a field's name and value. Out: nothing, or a sentence that names the value and its range.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from alphaedit_peft.algebra import THRESHOLD_MODES

CHOICES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("preset", ("auto", "paper")),
    ("objective", ("alphaedit", "memit")),
    ("on_conflict", ("error", "replace", "keep")),
    ("stop_when", ("loss", "likeliest")),
    ("autocast", (None, "bfloat16")),
    ("layer_shares", ("equal", "disturbance")),
    ("ridge_mode", (None, "absolute", "relative")),
    ("learning_rate_mode", (None, "absolute", "relative")),
    ("threshold_mode", (None, *THRESHOLD_MODES)),
)


@dataclass(frozen=True)
class Preset:
    """Values for fields left at None; ``paper`` ones are appendix B of the paper and its code."""

    ridge: float
    ridge_mode: str
    threshold: float
    threshold_mode: str
    steps: int
    learning_rate: float
    learning_rate_mode: str
    clamp_factor: float
    stop_loss: float
    norm_guard: float


PRESET_VALUES = {
    "paper": Preset(10.0, "absolute", 2e-2, "absolute", 25, 0.5, "absolute", 0.75, 0.05, 0.0),
    "auto": Preset(0.05, "relative", 0.02, "energy", 25, 0.15, "relative", 1.0, 0.2, 2.0),
}


TYPES: tuple[tuple[str, Any], ...] = (
    ("history", bool),
    ("projection", bool | None),
    ("chat_template", bool),
    ("seed", int),
    ("contexts", list | None),
    ("anchors", list | None),
    ("separator", str),
    ("kl_prompt", str),
    ("null_space", str | None),
    ("base_model_name_or_path", str | None),
    ("revision", str | None),
    ("rewrite_module", str | None),
    ("block_module", str | None),
)

RANGES: tuple[tuple[str, float, float], ...] = (
    ("ridge", 0, float("inf")),
    ("prior_ridge", 0, float("inf")),
    ("norm_guard", 1, float("inf")),
    ("threshold", 0, float("inf")),
    ("moment_weight", 1e-9, float("inf")),
    ("tokens_per_batch", 1, float("inf")),
    ("target_tokens", 1, float("inf")),
    ("steps", 1, 100_000),
    ("learning_rate", 1e-9, float("inf")),
    ("clamp_factor", 1e-9, float("inf")),
    ("kl_factor", 0, float("inf")),
    ("anchor_factor", 0, float("inf")),
    ("weight_decay", 0, float("inf")),
    ("stop_loss", 0, float("inf")),
    ("num_contexts", 0, 1000),
    ("context_length", 1, 1000),
    ("key_cosine", 0.5, 1.0),
    ("max_hidden_ratio", 1, float("inf")),
    ("capacity_bound", 0, 1),
    ("rollback_depth", 0, float("inf")),
)
SWITCHED = ("max_hidden_ratio", "norm_guard")
UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for infix, base in (("", 1000), ("I", 1024))
}
COUNTS = (
    *("tokens_per_batch", "target_tokens", "steps"),
    *("num_contexts", "context_length", "rollback_depth"),
)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value outside its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {choices}")


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Refuse what is no finite number within its range; counts must be whole."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number")
    if name in COUNTS and not isinstance(value, int):
        raise ValueError(f"{name}={value} must be a whole number")
    off = name in SWITCHED  # 0 switches it off
    if not low <= value <= high and not (off and value == 0):
        raise ValueError(f"{name}={value} is outside {low}..{high}{', or 0 for off' * off}")
    if value > sys.float_info.max:
        raise ValueError(f"{name}={value} is outside the finite numbers; give one")


def check_pair(name: str, value: float | None, mode: str | None) -> None:
    """Refuse a mode without its number."""
    if mode is not None and value is None:
        raise ValueError(
            f"{name}_mode={mode!r} says how to read {name}, which is not set; set both, or neither "
            "for the preset's"
        )


def byte_count(name: str, value: str | int | None) -> int | None:
    """A number of bytes, as such or in words such as "8GiB" or "500 MB"; None stays None.

    Raises:
        ValueError: anything else, or less than a byte.
    """
    if value is None:
        return None
    found: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)?\s*", value)
        found = float(match[1]) * UNITS[(match[2] or "B").upper()] if match else None
    if found is None or not 1 <= found < sys.maxsize:
        raise ValueError(f"{name}={value!r} is no size; use a number of bytes, or such as '8GiB'")
    return int(found)


def bytes_in_words(count: int) -> str:
    """A number of bytes as text that ``byte_count`` reads, rounded up: "1.5GiB"."""
    for unit in ("GiB", "MiB", "kiB"):
        size = UNITS[unit.upper()]
        if count >= size:
            return f"{math.ceil(10 * count / size) / 10:g}{unit}"
    return f"{count}B"


def layer_list(layers: object) -> list[int]:
    """Rewrite layers as a list of block numbers; refuses anything else."""
    given = list(layers) if isinstance(layers, (list, tuple, range)) else None
    if not given or not all(isinstance(x, int) and not isinstance(x, bool) for x in given):
        raise ValueError(f"rewrite_layers={layers!r} must be a list of block numbers, such as [4]")
    return given

"""Every setting of an edit run, each written once: :class:`EditOptions`, :class:`Settings`.

In: what the user sets. Out: validated options, where None is open: the preset fills it for the
model at hand, ``auto`` with numbers relative to the model's own scales, ``paper`` with those of
arXiv 2410.02355 (appendix B) and its code; then the settings that hold. A field's metadata say what
it is for and after which source, what is allowed, and its value in each preset; checks, presets and
the docs' table are made from them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import reduce
from inspect import get_annotations
from operator import or_
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from alphaedit_peft.messages import shown

THRESHOLD_MODES = ("absolute", "relative", "energy", "rank")
_SCALES = (None, "absolute", "relative")
Options = TypeVar("Options", bound="EditOptions")


@dataclass(frozen=True)
class Range:
    """Finite numbers in ``low..high``; 0 too where that switches something ``off``."""

    low: float
    high: float = math.inf
    off: bool = False

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{', or 0 for off' * self.off}"

    def check(self, name: str, value: object, whole: bool) -> None:
        """Refuse what is no such number, or not ``whole``; None is open."""
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}={shown(value)} must be a number")
        if whole and not isinstance(value, int):
            raise ValueError(f"{name}={value} must be a whole number")
        if not self.low <= value <= self.high and not (self.off and value == 0):
            raise ValueError(f"{name}={value} is outside {self}")
        if value > sys.float_info.max:
            raise ValueError(f"{name}={value} is outside the finite numbers; give one")


def _set(default: Any, help: str, allowed: Any = None, filled: Any = (), source: str = "") -> Any:
    """A field; ``filled``: what the presets ``auto`` and ``paper`` put in the place of None."""
    known = {"help": help, "allowed": allowed, "filled": filled, "source": source}
    return field(default=default, metadata=known)


@dataclass
class EditOptions:
    """Settings of AlphaEdit for one model, checked; see ``AlphaEditConfig``."""

    base_model_name_or_path: str | None = _set(None, "folder or Hub repo of the base")
    revision: str | None = _set(None, "the base's branch, tag or commit")

    preset: str = _set(
        "auto", "auto (the default) or paper, for settings left out", ("auto", "paper")
    )
    rewrite_layers: list[int] | None = _set(None, "blocks to rewrite; None: by model or depth")
    rewrite_module: str | None = _set(None, "module name with {} for the block; None: found")
    block_module: str | None = _set(None, "block name with {} for its number; None: found")

    objective: str = _set("alphaedit", "alphaedit (projector) or memit (inverse key moment)")
    history: bool = _set(True, "protect earlier batches' keys; MEMIT's released code: False")
    projection: bool | None = _set(None, "project updates; None: yes for alphaedit only")
    moment_weight: float | None = _set(
        None,
        "MEMIT's w on C0; in auto, by the first edits' keys",
        Range(1e-9),
        (None, 15_000.0),
        "GPT2-XL 20,000",
    )

    ridge: float | None = _set(
        None,
        "lambda of the paper's Eq. 11; in auto, relative to the mean |P k|^2",
        Range(0),
        (0.05, 10.0),
        "text 1, code 10",
    )
    ridge_mode: str | None = _set(
        None, "absolute, or relative to the batch's mean |P k|^2", _SCALES, ("relative", "absolute")
    )
    prior_ridge: float | None = _set(None, "times earlier rows' own; 0: held; None: 1", Range(0))
    layer_shares: str = _set(
        "equal", "of the residual: equal, or by least disturbance", ("equal", "disturbance")
    )
    norm_guard: float | None = _set(
        None, "most |Delta| relative to orthogonal keys; 0: none", Range(1, off=True), (2.0, 0.0)
    )
    threshold: float | None = _set(
        None, "which eigenvalues count as zero", Range(0), (0.02, 2e-2), "text 1e-2, code 2e-2"
    )
    threshold_mode: str | None = _set(
        None, "absolute, relative, energy or rank", (None, *THRESHOLD_MODES), ("energy", "absolute")
    )
    null_space: str | None = _set(None, "folder or Hub repo of the NullSpace, if not passed")
    tokens_per_batch: int = _set(8192, "most tokens in one forward pass; bounds memory", Range(1))

    target_tokens: int = _set(2048, "most tokens optimised at once; bounds its memory", Range(1))
    memory_budget: str | int | None = _set(
        None, "above the base: sets the two bounds", "a number of bytes, or such as '8GiB'"
    )
    autocast: str | None = _set(None, "optimise z in it, state in float32", (None, "bfloat16"))
    steps: int | None = _set(
        None, "loss evaluations for z; 25 make 24 updates", Range(1, 100_000), (25, 25), "the code"
    )
    learning_rate: float | None = _set(
        None, "Adam's, on z", Range(1e-9), (0.15, 0.5), "Llama-3 0.1, GPT-J and GPT2-XL 0.5"
    )
    learning_rate_mode: str | None = _set(
        None, "absolute, or relative to |h| / sqrt(d)", _SCALES, ("relative", "absolute")
    )
    clamp_factor: float | None = _set(
        None, "|z - h| is clamped to this times |h|", Range(1e-9), (1.0, 0.75), "the paper"
    )
    kl_factor: float = _set(0.0625, "weight of KL(current || initial) at the subject", Range(0))
    anchors: list[str] | None = _set(None, "prompts with {} whose answers edits shall keep")
    anchor_factor: float = _set(1.0, "weight of the anchors' mean KL(current || initial)", Range(0))
    weight_decay: float = _set(0.5, "weight of |z - h| / |h|^2", Range(0), source="the code")
    stop_loss: float | None = _set(
        None, "the loss at which an edit is done", Range(0), (0.2, 0.05), "the code"
    )
    stop_when: str = _set(
        "loss", "loss, or likeliest: also when greedy decoding says targets", ("loss", "likeliest")
    )
    kl_prompt: str = _set("{} is a", "prompt whose distribution at the subject is kept")

    contexts: list[str] | None = _set(None, "texts put before prompts; None: sampled")
    num_contexts: int = _set(5, "how many the model samples; the code: 5", Range(0, 1000))
    context_length: int = _set(10, "tokens in a sampled context; the code: 10", Range(1, 1000))
    chat_template: bool = _set(False, "put prompts through the tokenizer's chat template")
    separator: str = _set(" ", 'between prompt and target; "" for languages without spaces')
    seed: int = _set(0, "of the sampled contexts; recorded in the pack")

    on_conflict: str = _set(
        "error",
        "error, replace (the later wins) or keep (the earlier)",
        ("error", "replace", "keep"),
    )
    key_cosine: float = _set(0.999, "edits whose keys are this alike share a row", Range(0.5, 1.0))
    max_hidden_ratio: float = _set(10.0, "skip edits of |h| over this x median", Range(1, off=True))
    capacity_bound: float = _set(0.33, "warn at this share of the room; 0: never", Range(0, 1))
    rollback_depth: int = _set(20, "batches whose factors are kept for rollback", Range(0))

    def __post_init__(self) -> None:
        allowed = {f.name: f.metadata["allowed"] for f in fields(EditOptions)}
        for name, choices in allowed.items():
            if isinstance(choices, tuple):
                require_one_of(name, getattr(self, name), choices)
        if self.rewrite_layers is not None:
            self.rewrite_layers = layer_list(self.rewrite_layers)
        for name, kind in TYPES.items():
            if allowed[name] is None and not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be of type {kind}")
        for name in ("contexts", "anchors"):
            if not all(isinstance(text, str) for text in getattr(self, name) or []):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a list of texts")
        if any("{}" in text for text in self.contexts or []):
            raise ValueError(
                f"contexts={shown(self.contexts)} hold '{{}}'; a context is put before the prompt "
                "as it is, so leave the '{}' away"
            )
        for name, numbers in allowed.items():
            if isinstance(numbers, Range):
                numbers.check(name, getattr(self, name), whole=not isinstance(0.5, TYPES[name]))
        byte_count("memory_budget", self.memory_budget)
        for name in ("ridge", "threshold", "learning_rate"):
            mode = getattr(self, f"{name}_mode")
            if mode is not None and getattr(self, name) is None:
                raise ValueError(
                    f"{name}_mode={mode!r} says how to read {name}, which is not set; set both, "
                    "or neither for the preset's"
                )
        slots = [("kl_prompt", self.kl_prompt), *(("anchors", a) for a in self.anchors or ())]
        for name, text in slots:
            if text.count("{}") != 1:
                raise ValueError(f"{name}={shown(text)} needs one '{{}}' for the subject")

    @property
    def open_settings(self) -> frozenset[str]:
        """Names of the settings left at None, which the preset fills or ``auto`` decides."""
        filled = {"rewrite_layers", *PRESETS[self.preset]}
        return frozenset(name for name in filled if getattr(self, name) is None)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, without PEFT's own bookkeeping fields."""
        return {name: getattr(self, name) for name in sorted(f.name for f in fields(EditOptions))}

    @classmethod
    def from_json(cls: type[Options], values: Mapping[str, Any]) -> Options:
        """Options of ``to_json``'s values; refuses a field that this version does not know."""
        known = {f.name for f in fields(EditOptions)}  # not PEFT's own, which say nothing of edits
        if unknown := [name for name in values if name not in known]:
            raise ValueError(
                f"config fields {shown(unknown)} are unknown here; update alphaedit_peft"
            )
        return cls(**values)


class Settings(EditOptions):
    """What holds for one model: options settled by ``AlphaEditConfig.resolve``, none of them open.

    ``threshold`` and ``threshold_mode`` may stay None, as a null space brings its own, and
    ``moment_weight`` until the first edits, whose keys decide it.
    """

    rewrite_layers: list[int]
    ridge: float
    ridge_mode: str
    norm_guard: float
    steps: int
    learning_rate: float
    learning_rate_mode: str
    clamp_factor: float
    stop_loss: float

    def __post_init__(self) -> None:
        left = [name for name in get_annotations(Settings) if getattr(self, name) is None]
        if left:
            raise ValueError(f"{left} are open; take what AlphaEditConfig.resolve(model) gives")

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            raise AttributeError(f"{name} is settled; change it in the options and settle them")
        super().__setattr__(name, value)

    @classmethod
    def of(cls, options: EditOptions) -> Settings:
        """A copy of options, which were checked when they were made, once nothing is open."""
        return cls(**deepcopy(options.to_json()))


# of each field: bool, str | None, list | None ..., as isinstance takes it
TYPES: dict[str, Any] = {
    name: reduce(or_, [get_origin(part) or part for part in get_args(hint) or [hint]])
    for name, hint in get_type_hints(EditOptions).items()
}

# of each preset, by field: what it puts where the user has left None
PRESETS: dict[str, dict[str, Any]] = {
    preset: {f.name: f.metadata["filled"][i] for f in fields(EditOptions) if f.metadata["filled"]}
    for i, preset in enumerate(("auto", "paper"))
}


def about(name: str) -> str:
    """What a setting is for, as the command line says it too."""
    return str(EditOptions.__dataclass_fields__[name].metadata["help"])


def layer_list(layers: object) -> list[int]:
    """Rewrite layers as a list of block numbers; refuses anything else."""
    given = list(layers) if isinstance(layers, (list, tuple, range)) else None
    if not given or not all(isinstance(x, int) and not isinstance(x, bool) for x in given):
        raise ValueError(
            f"rewrite_layers={shown(layers)} must be a list of block numbers, such as [4]"
        )
    return given


_UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for infix, base in (("", 1000), ("I", 1024))
}


def require_one_of(name: str, value: object, choices: Collection[object]) -> None:
    """Raise a ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is unknown; use one of {choices}")


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
        found = float(match[1]) * _UNITS[(match[2] or "B").upper()] if match else None
    if found is None or not 1 <= found < sys.maxsize:
        raise ValueError(
            f"{name}={shown(value)} is no size; use a number of bytes, or such as '8GiB'"
        )
    return int(found)


def bytes_in_words(count: int) -> str:
    """A number of bytes as text that ``byte_count`` reads, rounded up: "1.5GiB"."""
    for unit in ("GiB", "MiB", "kiB"):
        size = _UNITS[unit.upper()]
        if count >= size:
            return f"{math.ceil(10 * count / size) / 10:g}{unit}"
    return f"{count}B"

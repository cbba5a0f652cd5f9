"""Every setting of an edit run, with its reason and source: :class:`AlphaEditConfig`.

In: what the user sets. Out: a validated config; fields left at None are filled for the model at
hand by ``resolve`` from the preset: ``auto`` (settings relative to the model's own scales) or
``paper`` (the numbers of arXiv 2410.02355 and its code). It is stored in the pack's sidecar, not
in ``adapter_config.json``, which holds pure LoRA keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import TaskType

from alphaedit_peft.architecture import Architecture, default_rewrite_layers, describe, paper_preset
from alphaedit_peft.settings import (
    CHOICES,
    PRESET_VALUES,
    RANGES,
    TYPES,
    Preset,
    byte_count,
    check_choice,
    check_pair,
    check_range,
    layer_list,
)

SIDECAR = "alphaedit"
CONFIG_FILE = "config.json"


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class AlphaEditConfig(PeftConfig):
    """Settings of AlphaEdit for one model; see each field's help for reason and source.

    Raises:
        ValueError: a value outside its range; the message names the value and the range.
    """

    preset: str = _setting("auto", "auto: relative to the model's scales; paper: its numbers")
    rewrite_layers: list[int] | None = _setting(None, "blocks to rewrite; None: preset or depth")
    rewrite_module: str | None = _setting(None, "module name with {} for the block, other families")
    block_module: str | None = _setting(None, "block name with {} for its number, other families")

    objective: str = _setting("alphaedit", "alphaedit (projector) or memit (inverse key moment)")
    history: bool = _setting(True, "protect earlier batches' keys; MEMIT's released code: False")
    projection: bool | None = _setting(None, "project updates; None: yes for alphaedit only")
    moment_weight: float | None = _setting(None, "MEMIT's w on C0; 15,000 (GPT2-XL 20,000)")

    ridge: float | None = _setting(None, "lambda of Eq. 11; text 1, code 10; auto 0.05 relative")
    ridge_mode: str | None = _setting(None, "absolute, or relative to the batch's mean |P k|^2")
    prior_ridge: float | None = _setting(None, "of earlier rows, times their own; 0: held; None: 1")
    layer_shares: str = _setting("equal", "of the residual: equal, or by least disturbance")
    norm_guard: float | None = _setting(None, "most |Delta| relative to orthogonal keys; 0: none")
    threshold: float | None = _setting(None, "eigenvalues below it are null; text 1e-2, code 2e-2")
    threshold_mode: str | None = _setting(None, "absolute, relative, energy or rank")
    null_space: str | None = _setting(None, "folder or Hub repo of the NullSpace, if not passed")
    tokens_per_batch: int = _setting(8192, "most tokens in one forward pass; bounds memory")

    target_tokens: int = _setting(2048, "most tokens optimised at once; bounds memory of gradients")
    memory_budget: str | int | None = _setting(None, "'8GiB' above the base: sets the two bounds")
    autocast: str | None = _setting(None, "bfloat16: optimise z in it, with state in float32")
    steps: int | None = _setting(None, "loss evaluations for z; 25 make 24 updates, as in the code")
    learning_rate: float | None = _setting(None, "Adam's, on z; Llama-3 0.1, GPT-J and GPT2-XL 0.5")
    learning_rate_mode: str | None = _setting(None, "absolute, or relative to |h| / sqrt(d)")
    clamp_factor: float | None = _setting(None, "|z - h| is clamped to this times |h|; paper 0.75")
    kl_factor: float = _setting(0.0625, "weight of KL(current || initial) at the subject")
    anchors: list[str] | None = _setting(None, "prompts with {} whose answers edits shall keep")
    anchor_factor: float = _setting(1.0, "weight of the anchors' mean KL(current || initial)")
    weight_decay: float = _setting(0.5, "weight of |z - h| / |h|^2, as in the code")
    stop_loss: float | None = _setting(None, "an edit whose loss is below this is done; code 0.05")
    stop_when: str = _setting("loss", "loss, or likeliest: also when greedy decoding says targets")
    kl_prompt: str = _setting("{} is a", "prompt whose distribution at the subject is kept")

    contexts: list[str] | None = _setting(None, "texts put before prompts; None: sampled")
    num_contexts: int = _setting(5, "how many contexts to sample from the model; paper code 5")
    context_length: int = _setting(10, "tokens in a sampled context; paper code 10")
    chat_template: bool = _setting(False, "put prompts through the tokenizer's chat template")
    separator: str = _setting(" ", 'between prompt and target; "" for languages without spaces')
    seed: int = _setting(0, "of the sampled contexts; recorded in the pack")

    on_conflict: str = _setting("error", "an edit that contradicts one in place: see docs/theory")
    key_cosine: float = _setting(0.999, "edits whose keys are at least this alike share one row")
    max_hidden_ratio: float = _setting(10.0, "skip edits of |h| over this times median; 0: off")
    capacity_bound: float = _setting(0.33, "warn when edits take this share of the room; 0: never")
    rollback_depth: int = _setting(20, "batches whose earlier factors are kept for exact rollback")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_type = TaskType.CAUSAL_LM
        for name, choices in CHOICES:
            check_choice(name, getattr(self, name), choices)
        if self.rewrite_layers is not None:
            self.rewrite_layers = layer_list(self.rewrite_layers)
        for name, kind in TYPES:
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be of type {kind}")
        for name in ("contexts", "anchors"):
            if not all(isinstance(text, str) for text in getattr(self, name) or []):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a list of texts")
        if any("{}" in text for text in self.contexts or []):
            raise ValueError(
                f"contexts={self.contexts!r} hold '{{}}'; a context is put before the prompt as "
                "it is, so leave the '{}' away"
            )
        for name, low, high in RANGES:
            check_range(name, getattr(self, name), low, high)
        byte_count("memory_budget", self.memory_budget)
        for name in ("ridge", "threshold", "learning_rate"):
            check_pair(name, getattr(self, name), getattr(self, f"{name}_mode"))
        slots = [("kl_prompt", self.kl_prompt), *(("anchors", a) for a in self.anchors or ())]
        for name, text in slots:
            if text.count("{}") != 1:
                raise ValueError(f"{name}={text!r} needs one '{{}}' for the subject")

    @property
    def projects(self) -> bool:
        """Whether updates pass through the null-space projector."""
        return self.objective == "alphaedit" if self.projection is None else self.projection

    @property
    def open_settings(self) -> frozenset[str]:
        """Names of the settings left at None, which the preset fills or ``auto`` decides."""
        preset = {f.name for f in fields(Preset)} | {"rewrite_layers"}
        return frozenset(name for name in preset if getattr(self, name) is None)

    def resolve(self, model: Any) -> tuple[AlphaEditConfig, Architecture]:
        """Fill every field left at None for this model; returns the full config and its layout.

        Raises:
            ValueError: a model that cannot be edited, or rewrite layers outside it.
        """
        architecture = describe(model, self.block_module, self.rewrite_module)
        values = asdict(PRESET_VALUES[self.preset])
        values["rewrite_layers"] = default_rewrite_layers(architecture.num_blocks)
        values["moment_weight"] = 15_000.0
        known = paper_preset(model.config)
        if known is not None:
            values["rewrite_layers"] = known.rewrite_layers
            values["moment_weight"] = known.moment_weight
        if known is not None and self.preset == "paper":
            values["steps"], values["learning_rate"] = known.steps, known.learning_rate
        missing = {k: v for k, v in values.items() if getattr(self, k) is None}
        full = replace(self, **missing)
        full.rewrite_layers = list(architecture.check_layers(full.rewrite_layers or ()))
        name = getattr(model.config, "_name_or_path", None) or None
        full.base_model_name_or_path = self.base_model_name_or_path or name
        return full, architecture

    def lora_config(self, architecture: Architecture, rank: int) -> LoraConfig:
        """The plain LoRA config of the live adapter: scaling 1, full module names, no patterns."""
        assert self.rewrite_layers is not None, "resolve the config first"
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=[architecture.rewrite_name(layer) for layer in self.rewrite_layers],
            fan_in_fan_out=architecture.conv1d,
            lora_dropout=0.0,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            inference_mode=True,
        )

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, without PEFT's own bookkeeping fields."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(PeftConfig)}
        own |= {"base_model_name_or_path", "revision"}
        return {name: getattr(self, name) for name in sorted(own)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AlphaEditConfig:
        """Build a config from ``to_json``'s values.

        Raises:
            ValueError: a field this version does not know.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"config fields {unknown} are unknown here; update alphaedit_peft")
        return cls(**values)

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write ``alphaedit/config.json`` in the folder; ``adapter_config.json`` stays LoRA's.

        Raises:
            ValueError: the folder is an edit pack, whose file holds more than the settings.
        """
        folder = Path(save_directory) / SIDECAR
        if _is_of_pack(folder / CONFIG_FILE):
            raise ValueError(
                f"{save_directory} is an edit pack, whose {SIDECAR}/{CONFIG_FILE} holds more than "
                "settings; save the settings in another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": self.to_json()}, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> AlphaEditConfig:  # type: ignore[override]
        """Read the config from a folder that ``save_pretrained`` or a pack wrote.

        Raises:
            FileNotFoundError: a folder without ``alphaedit/config.json``.
        """
        path = Path(save_directory) / SIDECAR / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {save_directory} is no edit pack")
        return cls.from_json(json.loads(path.read_text(encoding="utf-8"))["config"])


def _is_of_pack(path: Path) -> bool:
    """Whether a config file is a pack's: it says its format's version."""
    return path.is_file() and b'"format_version"' in path.read_bytes()

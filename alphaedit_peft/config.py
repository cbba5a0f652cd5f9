"""Every setting of an edit run, with its reason and source: :class:`AlphaEditConfig`.

In: what the user sets. Out: a validated config; fields left at None are filled for the model at
hand by ``resolve`` from the preset: ``auto`` (settings relative to the model's own scales) or
``paper`` (the numbers of arXiv 2410.02355 and its code). It is stored in the pack's sidecar, not
in ``adapter_config.json``, which holds pure LoRA keys.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import TaskType

from alphaedit_peft.architecture import Architecture, resolve
from alphaedit_peft.safe_files import read_json, refusing
from alphaedit_peft.saving import replace_file
from alphaedit_peft.settings import EditOptions
from alphaedit_peft.solve_metric import kind, projects

CONFIG_FILE = "alphaedit/config.json"


@dataclass
class AlphaEditConfig(EditOptions, PeftConfig):
    """Settings of AlphaEdit for one model; see each field's help for reason and source.

    Raises:
        ValueError: a value outside its range; the message names the value and the range.
    """

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.task_type = TaskType.CAUSAL_LM
        kind(self.objective)
        EditOptions.__post_init__(self)

    @property
    def projects(self) -> bool:
        """Whether updates pass through the null-space projector."""
        return projects(self)

    def resolve(self, model: Any) -> tuple[AlphaEditConfig, Architecture]:
        """Fill every field left at None for this model; returns the full config and its layout.

        Raises:
            ValueError: a model that cannot be edited, or rewrite layers outside it.
        """
        return resolve(self, model)

    def lora_config(self, architecture: Architecture, rank: int) -> LoraConfig:
        """The plain LoRA config of an adapter: scaling 1, full module names, no patterns.

        Raises:
            ValueError: rewrite layers that are open, or outside the model.
        """
        layers = architecture.check_layers(self.rewrite_layers or ())
        return self._lora([*map(architecture.rewrite_name, layers)], rank, architecture.conv1d)

    def adapter_config(
        self, modules: Collection[str], rank: int, fan_in_fan_out: bool
    ) -> dict[str, Any]:
        """What ``adapter_config.json`` says of factors by full module name, in PEFT's fields.

        ``fan_in_fan_out``: weights are stored (d_in, d_out). LoRA has at least one row.
        """
        plain: dict[str, Any] = self._lora(modules, max(1, rank), fan_in_fan_out).to_dict()
        return plain | {"target_modules": list(modules)}

    def _lora(self, modules: Collection[str], rank: int, fan_in_fan_out: bool) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(modules),
            fan_in_fan_out=fan_in_fan_out,
            lora_dropout=0.0,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            inference_mode=True,
        )

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write ``alphaedit/config.json`` in the folder; ``adapter_config.json`` stays LoRA's.

        Raises:
            ValueError: the folder is an edit pack, whose file holds more than the settings.
        """
        path = Path(save_directory) / CONFIG_FILE
        if path.is_file() and b'"format_version"' in path.read_bytes():
            raise ValueError(
                f"{save_directory} is an edit pack, whose {CONFIG_FILE} holds more than "
                "settings; save the settings in another folder"
            )
        text = json.dumps({"config": self.to_json()}, indent=2, sort_keys=True)
        replace_file(path, text + "\n")

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> AlphaEditConfig:  # type: ignore[override]
        """Read the config from a folder that ``save_pretrained`` or a pack wrote.

        Raises:
            FileNotFoundError: a folder without ``alphaedit/config.json``.
        """
        path = Path(save_directory) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {save_directory} is no edit pack")
        values = read_json(path)
        with refusing(path):
            return cls.from_json(values["config"])

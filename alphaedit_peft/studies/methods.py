"""The editors that studies compare, as values: settings for this package's own, or a function.

In: a name. Out: a :class:`Method`, and ``opened`` on a base an editor that makes edits, saves its
state and goes on from it. All but fine-tuning run through the same code: the same prompts, target
values and solve, so that a comparison shows what an objective protects and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaedit_peft.artefact import replace_folder
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.settings import EditOptions
from alphaedit_peft.studies.base import Base
from alphaedit_peft.studies.finetune import FineTuning, fine_tune

# MEMIT's share of one key's residual is g / (g + 1), g = k^T C^-1 k / w, and g averages d_in / w:
# with so small a w it is 1, and the update is ROME's (Eq. 2): the equality constraint of one key
ROME_WEIGHT = 1e-6
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")


class Writer(Protocol):
    """Another editor: new weights for some of a model's parameters, by name."""

    def __call__(
        self, base: Base, config: AlphaEditConfig, edits: Sequence[Edit]
    ) -> dict[str, Tensor]:
        """New values of the parameters that change; the model itself stays as it is."""


@dataclass(frozen=True)
class FineTuned:
    """The writer of fine-tuning, with its settings."""

    settings: FineTuning = FineTuning()

    def __call__(
        self, base: Base, config: AlphaEditConfig, edits: Sequence[Edit]
    ) -> dict[str, Tensor]:
        """See :func:`fine_tune`."""
        return fine_tune(base.model, base.tokenizer, edits, config, self.settings)


@dataclass(frozen=True)
class Method:
    """An editor under the name it has in tables.

    Attributes:
        name: short, for tables and folders.
        about: one sentence.
        settings: fields of AlphaEditConfig, over those that a study has in common.
        one_at_a_time: make the edits of a batch one after the other.
        last_layer: rewrite the last rewrite layer only.
        writer: an editor of another kind; ``settings`` are then for its prompts alone.

    Raises:
        ValueError: a name that no folder can have.
    """

    name: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    one_at_a_time: bool = False
    last_layer: bool = False
    writer: Writer | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} cannot name a folder; use letters, digits, '-', '_', '.', '='"
            )

    def config(self, model: Any, common: AlphaEditConfig) -> AlphaEditConfig:
        """The settings of a run, filled for the model but for the null space's threshold.

        Raises:
            ValueError: settings that the config refuses.
        """
        full, _ = replace(common, **self.settings).resolve(model)
        if common.threshold is None and "threshold" not in self.settings:
            full.threshold = full.threshold_mode = None  # the null space brings its own
        if self.last_layer and full.rewrite_layers:
            full.rewrite_layers = full.rewrite_layers[-1:]
        return full

    def with_settings(self, **changes: Any) -> Method:
        """The same method with other settings, of AlphaEditConfig or of fine-tuning.

        Raises:
            ValueError: a setting that it does not have, or a value out of range.
        """
        own = self.writer.settings if isinstance(self.writer, FineTuned) else None
        known = sorted(EditOptions().to_json() if own is None else asdict(own))
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(f"{self.name} has no settings {unknown}; it has {', '.join(known)}")
        if own is not None:
            return replace(self, writer=FineTuned(replace(own, **changes)))
        EditOptions(**changes)  # refuses what cannot be
        return replace(self, settings={**self.settings, **changes})

    def to_json(self) -> dict[str, Any]:
        """Name and settings as plain JSON values, for provenance."""
        found: dict[str, Any] = {"name": self.name, "settings": dict(self.settings)}
        found |= {"one_at_a_time": self.one_at_a_time, "last_layer": self.last_layer}
        if isinstance(self.writer, FineTuned):
            found["writer"] = asdict(self.writer.settings)
        elif self.writer is not None:
            found["writer"] = repr(self.writer)
        return found


METHODS = {
    method.name: method
    for method in (
        Method("alphaedit", "updates confined to the null space (Fang et al., 2025)"),
        Method(
            "memit",
            "MEMIT as released: earlier edits are not protected (Meng et al., 2023)",
            {"objective": "memit", "history": False},
        ),
        Method(
            "memit-history",
            "MEMIT with the keys of earlier edits in the solve",
            {"objective": "memit", "history": True},
        ),
        Method(
            "memit-projection",
            "MEMIT's update projected into the null space, AlphaEdit's plug-in",
            {"objective": "memit", "history": False, "projection": True},
        ),
        Method(
            "rome",
            "ROME's rank-one constraint, one edit at a time in one layer (Meng et al., 2022)",
            {"objective": "memit", "history": False, "moment_weight": ROME_WEIGHT},
            one_at_a_time=True,
            last_layer=True,
        ),
        Method(
            "finetuning",
            "one layer's weights fine-tuned within a bound (FT-L of Meng et al., 2022)",
            writer=FineTuned(),
        ),
    )
}


def find_methods(names: Iterable[str]) -> tuple[Method, ...]:
    """Methods of the table, in the given order.

    Raises:
        ValueError: an unknown name, one twice, or none.
    """
    wanted = tuple(names)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise ValueError(f"methods {unknown} are unknown; there are {', '.join(METHODS)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"methods={list(wanted)} name one twice; name each once")
    return tuple(METHODS[name] for name in wanted)


class Editor(Protocol):
    """What protocols need of an editor."""

    @property
    def model(self) -> nn.Module:
        """The model as edited so far, to be judged."""

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits; returns how many were made, the others were set aside."""

    def save(self, folder: Path) -> None:
        """Write the state that ``opened`` goes on from; the folder appears whole or not at all."""

    def close(self) -> None:
        """Give the base its original bits back."""


@contextmanager
def opened(
    base: Base, method: Method, common: AlphaEditConfig, state: Path | None = None
) -> Iterator[Editor]:
    """An editor on a base, from the beginning or from a saved state; the base is restored.

    Raises:
        ValueError: statistics that the method needs are missing, a state of another base.
    """
    config = method.config(base.model, common)
    editor: Editor
    if method.writer is None:
        editor = PackEditor(base, method, config, state)
    else:
        editor = WeightEditor(base, method.writer, config, state)
    try:
        yield editor
    finally:
        editor.close()


class PackEditor:
    """Edits by this package, all of a batch or one by one: the state is a pack."""

    model: AlphaEditModel

    def __init__(
        self, base: Base, method: Method, config: AlphaEditConfig, state: Path | None
    ) -> None:
        self._one_at_a_time = method.one_at_a_time
        given: dict[str, Any] = {"tokenizer": base.tokenizer, "null_space": base.null_space}
        given["key_moments"] = base.key_moments
        if state is None:
            self.model = get_alphaedit_model(base.model, config, **given)
        else:
            self.model = AlphaEditModel.from_pretrained(base.model, state, **given)

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits, or as many batches of one."""
        size = 1 if self._one_at_a_time else len(edits)
        return len(self.model.edit(edits, batch_size=size, progress=False).made)

    def save(self, folder: Path) -> None:
        """Write the pack."""
        self.model.save_pretrained(folder)

    def close(self) -> None:
        """Take the adapter off."""
        self.model.unload()


WEIGHTS = "weights.safetensors"


class WeightEditor:
    """Edits by a function that gives new weights: the state is these weights."""

    def __init__(
        self, base: Base, writer: Writer, config: AlphaEditConfig, state: Path | None
    ) -> None:
        self.model = base.model
        self._write = partial(writer, base, config)
        self._original: dict[str, Tensor] = {}
        if state is not None:
            self._put(load_file(state / WEIGHTS))

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits."""
        self._put(self._write(edits))
        return len(edits)

    def save(self, folder: Path) -> None:
        """Write the changed weights, in one step."""
        now = {name: self.model.get_parameter(name).detach().cpu() for name in self._original}
        replace_folder(folder, {WEIGHTS: partial(save_file, now)})

    def close(self) -> None:
        """Put the original weights back."""
        self._put(self._original)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            weight = self.model.get_parameter(name)
            self._original.setdefault(name, weight.detach().clone())
            weight.copy_(values)

"""An editor at work on a model: makes edits, saves, goes on, and gives the base back.

In: a base with its statistics, a method, and where there is one the state of an earlier session.
Out: :class:`PackEditor` (a pack, through AlphaEditModel) or :class:`WeightEditor` (new weights from
a function), which protocols drive alike. When it is closed the base has its original bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.storing import replace_folder
from alphaedit_peft.studies.base import Base
from alphaedit_peft.studies.methods import Method, Writer

WEIGHTS = "weights.safetensors"


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
    """Edits by this package: the state is a pack."""

    def __init__(
        self, base: Base, method: Method, config: AlphaEditConfig, state: Path | None
    ) -> None:
        self._one_at_a_time = method.one_at_a_time
        if state is None:
            self._model = get_alphaedit_model(
                base.model,
                config,
                tokenizer=base.tokenizer,
                null_space=base.null_space,
                key_moments=base.key_moments,
            )
        else:
            self._model = AlphaEditModel.from_pretrained(
                base.model,
                state,
                tokenizer=base.tokenizer,
                null_space=base.null_space,
                key_moments=base.key_moments,
            )

    @property
    def model(self) -> nn.Module:
        """The model with its adapter."""
        return self._model

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits, or as many batches of one."""
        size = 1 if self._one_at_a_time else len(edits)
        report = self._model.edit(edits, batch_size=size, progress=False)
        return len(report.made)

    def save(self, folder: Path) -> None:
        """Write the pack."""
        self._model.save_pretrained(folder)

    def close(self) -> None:
        """Take the adapter off."""
        self._model.unload()


class WeightEditor:
    """Edits by a function that gives new weights: the state is these weights."""

    def __init__(
        self, base: Base, writer: Writer, config: AlphaEditConfig, state: Path | None
    ) -> None:
        self._base, self._writer, self._config = base, writer, config
        self._original: dict[str, Tensor] = {}
        if state is not None:
            self._put(load_file(state / WEIGHTS))

    @property
    def model(self) -> nn.Module:
        """The model itself, with changed weights."""
        return self._base.model

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits."""
        self._put(self._writer(self._base, self._config, edits))
        return len(edits)

    def save(self, folder: Path) -> None:
        """Write the changed weights, in one step."""
        now = {name: self._parameter(name).detach().cpu() for name in self._original}
        replace_folder(folder, {WEIGHTS: partial(save_file, now)})

    def close(self) -> None:
        """Put the original weights back."""
        self._put(self._original)

    def _parameter(self, name: str) -> nn.Parameter:
        return self._base.model.get_parameter(name)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            weight = self._parameter(name)
            self._original.setdefault(name, weight.detach().clone())
            weight.copy_(values)

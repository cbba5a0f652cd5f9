"""One adapter and its edits: PEFT's LoRA layers, and everything that goes with them.

In: the LoRA layers of a model's rewrite modules. Out: :class:`Adapter`, the one object that holds
what belongs to one adapter, and reads and writes its factors. :class:`EditedModel` is what the
verbs of this folder ask of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.cholesky import KeptFactor
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.edit_report import MomentProducts
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.editing.state import EditState, Journal, Snapshot
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.model import lora_layer
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.contents import Compression, require_rows


@dataclass(eq=False)
class Adapter:
    """An adapter whose edits are known.

    Args:
        name: PEFT's name of it.
        layers: by rewrite layer PEFT's LoRA layer, which holds the factors.
        lora_config: PEFT's config of it.
        journal: records, target values and contexts of the factors as they were last written.
        source: the folder's name or the repository that it was loaded from; else its name.
        compression: of the pack that it was loaded from.
        snapshots: what the last batches can be taken back with.
        kept: by layer, what the next batch's solve begins with.
        moment_products: by layer, A C0 A^T of the last call's rows, for its figures.
        stamp: numbers of the factors that the journal belongs to.
    """

    name: str
    layers: Mapping[int, Any]
    lora_config: Any
    journal: Journal
    source: str = ""
    compression: Compression | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    kept: Mapping[int, KeptFactor] = field(default_factory=dict)
    moment_products: Mapping[int, MomentProducts] = field(default_factory=dict)
    stamp: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.source = self.source or self.name
        self.keep(self.journal)

    @property
    def factors(self) -> dict[int, LowRankDelta]:
        """The update by rewrite layer: A (n, d_in), B (d_out, n)."""
        rank = self.journal.rank
        return {
            number: lora_layer.read_factors(layer, self.name, rank)
            for number, layer in self.layers.items()
        }

    @property
    def unchanged(self) -> bool:
        """Whether the factors are still those that the journal belongs to."""
        return self.stamp == self._stamp()

    def known_journal(self) -> Journal:
        """The journal; a RuntimeError where something else has changed the factors."""
        if not self.unchanged:
            raise RuntimeError(
                f"the factors of adapter {self.name!r} are not those its edits were written to: "
                "hotswap_adapter, training or something else changed them, so its edits are no "
                f"longer known; load the pack with load_adapter(folder, {self.name!r}), or drop "
                f"the adapter with delete_adapter({self.name!r})"
            )
        return self.journal

    @property
    def edits(self) -> list[Edit]:
        """The adapter's own edits, in the order they were made."""
        return [record.edit for record in self.known_journal().records if record.role == "own"]

    def state(self) -> EditState:
        """Factors, records and target values as one value; z is NaN where it was not saved."""
        factors, targets = self.factors, self.journal.targets
        if targets is None:  # editing goes on from such a pack, repour cannot
            width = next(iter(factors.values())).B.shape[0]
            targets = torch.full((self.journal.rank, width), torch.nan, dtype=torch.float32)
        return EditState(factors, self.journal.records, targets, self.kept)

    def grams(self) -> dict[int, Tensor]:
        """A A^T (n, n) by layer, as far as the last solves have it for the factors."""
        factors = self.factors
        both = self.kept.keys() & factors
        found = {layer: self.kept[layer].gram_of(factors[layer].A) for layer in both}
        return {layer: gram for layer, gram in found.items() if gram is not None}

    def write(self, layer: int, delta: LowRankDelta) -> None:
        """Put a rewrite layer's factors into the model."""
        lora_layer.write_factors(self.layers[layer], self.name, delta)

    def keep(self, journal: Journal) -> None:
        """Hold a journal for the factors as they are now."""
        self.journal, self.stamp = journal, self._stamp()
        self.lora_config.r = self.lora_config.lora_alpha = max(1, journal.rank)

    def commit(self, state: EditState, **changes: Any) -> None:
        """Hold the state that was written; ``changes`` are further fields of the journal."""
        self.compression, self.kept = None, state.kept
        targets = state.targets if state.targets.isfinite().all() else None
        held = replace(self.journal, records=state.records, targets=targets, rank=state.rank)
        self.keep(replace(held, config=None, **changes))

    def _stamp(self) -> tuple[int, ...]:
        there = [layer for layer in self.layers.values() if self.name in layer.lora_A]
        return tuple(n for layer in there for n in lora_layer.stamp(layer, self.name))


@dataclass(frozen=True)
class Moved:
    """What was decided at first edits, to be open again where they are all taken back.

    The null space and its threshold before, the null space since; other settings by name.
    """

    given: NullSpace | None
    threshold: tuple[float | None, str | None]
    now: NullSpace | None
    decided: Mapping[str, float]


class EditedModel(Protocol):
    """What the verbs ask of a model with edits: :class:`~alphaedit_peft.model.AlphaEditModel`.

    ``edit_adapters`` are the adapters whose edits are known, by name; ``left_open`` names the
    settings that the user left open, and ``moved`` is what was decided for them.
    """

    alphaedit_config: AlphaEditConfig
    architecture: Architecture
    base_fingerprint: BaseFingerprint
    resources: Resources
    edit_adapters: dict[str, Adapter]
    left_open: frozenset[str]
    moved: Moved | None

    @property
    def peft_config(self) -> Any:
        """PEFT's configs by name."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of PEFT's active adapters."""

    def get_base_model(self) -> Any:
        """The transformers model, with LoRA layers in it."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Compute with the base alone inside the ``with`` block."""


def make_adapter(model: EditedModel, name: str, journal: Journal, **known: Any) -> Adapter:
    """Hold an adapter's edits in the model, for the factors that are in its LoRA layers.

    The one place where an :class:`Adapter` is made; ``known`` are further fields of it.
    """
    base, layers = model.get_base_model(), model.alphaedit_config.rewrite_layers or ()
    found = {layer: base.get_submodule(model.architecture.rewrite_name(layer)) for layer in layers}
    adapter = Adapter(name, found, model.peft_config[name], journal, **known)
    model.edit_adapters[name] = adapter
    return adapter


def in_force(model: EditedModel) -> list[str]:
    """Names of the adapters that edits act through: the merged ones, where some are, else active.

    None in a model that was unloaded.
    """
    layers = lora_layer.lora_layers(model.get_base_model())
    rewrite = map(model.architecture.rewrite_name, model.alphaedit_config.rewrite_layers or ())
    merged = [layers[name].merged_adapters for name in rewrite if name in layers]
    return next((list(names) for names in merged if names), model.active_adapters if layers else [])


def name_of(model: EditedModel, adapter_name: str | None) -> str:
    """The adapter that a call means: the one it names, or the only one in force.

    Raises:
        RuntimeError: several are in force and none is named.
        ValueError: a name that is not loaded.
    """
    active = in_force(model) or model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise RuntimeError(
            f"adapters {active} are active; name the one that is meant: edit(edits, into=...), "
            "save_pretrained(folder, selected_adapters=[...]), adapter_name=... elsewhere; or "
            "choose one with set_adapter(name)"
        )
    name = active[0] if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"adapter {name!r} is not loaded; this model has {[*model.peft_config]}")
    return name


def adapter_of(model: EditedModel, adapter_name: str | None) -> Adapter:
    """The adapter that a call means, see ``name_of``; a plain LoRA's edits are not known."""
    name = name_of(model, adapter_name)
    if name not in model.edit_adapters:
        raise RuntimeError(
            f"adapter {name!r} is a plain LoRA: without the sidecar folder "
            "'alphaedit/' of a pack of this model's rewrite layers its edits are not known, so "
            "it can be used but not edited"
        )
    return model.edit_adapters[name]


def require_editable(model: EditedModel, adapter: Adapter) -> None:
    """Refuse to edit where it cannot be done now.

    Raises:
        RuntimeError: factors that something else has changed, an unloaded model, inference mode,
            a merged or a disabled adapter.
        ValueError: a pack that was compressed to a lower rank.
    """
    adapter.known_journal()
    require_rows(adapter.compression, "edit it or take edits out of it")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() is on; edit outside of it, or in no_grad()")
    layers = lora_layer.require_layers(model.get_base_model()).values()
    if any(layer.merged for layer in layers):
        raise RuntimeError("the edits are merged into the base weights; call unmerge() first")
    if any(layer.disable_adapters for layer in layers):
        raise RuntimeError("the adapter is disabled; edit outside of disable_adapter()")


def to_pack(model: EditedModel, adapter: Adapter) -> EditPack:
    """An adapter as a pack; see :meth:`AlphaEditModel.to_pack`."""
    journal, name = adapter.journal, model.architecture.rewrite_name
    pack = EditPack(
        factors={name(layer): delta.to("cpu") for layer, delta in adapter.factors.items()},
        config=journal.config or model.alphaedit_config,
        records=journal.records,
        targets=None if journal.targets is None else journal.targets.float().cpu(),
        contexts=journal.contexts or (),
        fan_in_fan_out=model.architecture.conv1d,
        base=model.base_fingerprint,
        null_space=journal.null_space,
        parents=journal.parents,
        compression=adapter.compression,
        decisions=journal.decisions,
    )
    adapter.known_journal()
    return pack

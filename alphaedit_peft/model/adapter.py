"""An adapter that knows its edits: PEFT's LoRA layers, and the journal that goes with them.

In: a PEFT model. Out: what an adapter holds, as values (edits, records, factors), and the one place
that writes factors into its layers, keeps its journal, and puts both back when something fails.
``editable`` decides what to write. It is the active adapter, or where several are active the one
that a call names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.decide import in_force
from alphaedit_peft.editing.report import MomentProducts
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.editing.state import EditState, Journal, Snapshot
from alphaedit_peft.edits import Edit
from alphaedit_peft.factor import KeptFactor
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.metric import kind
from alphaedit_peft.model import lora_layer
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.compress import Compression, require_rows


class AdapterModel(PeftModelForCausalLM):
    """The state of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    alphaedit_config: AlphaEditConfig
    architecture: Architecture
    base_fingerprint: BaseFingerprint
    resources: Resources
    _journals: dict[str, Journal]
    _snapshots: dict[str, deque[Snapshot]]
    _stamps: dict[str, tuple[int, ...]]  # of the factors that a journal belongs to
    _sources: dict[str, str]  # where adapters were loaded from
    _solvers: dict[str, Mapping[int, KeptFactor]]  # what the next batch's solve begins with
    _moments: dict[str, Mapping[int, MomentProducts]]  # of the last call's rows, for its figures
    _compressions: dict[str, Compression]
    _undecided: frozenset[str]  # settings that the user left open
    _chosen: str | None = None  # the adapter that the call under way names
    base_model: Any  # PEFT's LoraModel
    config: Any  # the base model's

    @property
    def edits(self) -> list[Edit]:
        """The edits in the active adapters, in the order they were made; each has its id.

        Raises:
            RuntimeError: an adapter's factors were changed behind this model's back.
        """
        names = self.active_adapters if self._chosen is None else [self._chosen]
        journals = [journal for journal in map(self._known_journal, names) if journal is not None]
        return [r.edit for journal in journals for r in journal.records if r.role == "own"]

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """The active adapter's journal: every edit with its row, batch and role."""
        journal = self._known_journal(self._active)
        return () if journal is None else journal.records

    @property
    def factors(self) -> dict[int, LowRankDelta]:
        """The active adapter's update by rewrite layer: A (n, d_in), B (d_out, n)."""
        rank = self._journal().rank
        return {
            layer: lora_layer.read_factors(self._lora_layer(layer), self._active, rank)
            for layer in self.alphaedit_config.rewrite_layers or ()
        }

    @property
    def merged(self) -> bool:
        """Whether edits are written into the base weights at the moment."""
        return any(layer.merged for layer in lora_layer.lora_layers(self).values())

    @property
    def _active(self) -> str:
        """The adapter that is read and written."""
        if self._chosen is not None:
            return self._chosen
        names = self.active_adapters
        if len(names) != 1:
            raise RuntimeError(
                f"adapters {names} are active; name the one that is meant: edit(edits, into=...), "
                "save_pretrained(folder, selected_adapters=[...]), adapter_name=... elsewhere; or "
                "choose one with set_adapter(name)"
            )
        return names[0]

    @contextmanager
    def _on(self, adapter_name: str | None) -> Iterator[None]:
        """Read and write the adapter of that name; None: the only active one."""
        name = self._active if adapter_name is None else adapter_name
        if name not in self.peft_config:
            raise ValueError(
                f"adapter {name!r} is not loaded; this model has {[*self.peft_config]}"
            )
        before, self._chosen = self._chosen, name
        try:
            yield
        finally:
            self._chosen = before

    def _journal(self) -> Journal:
        name = self._active
        if name not in self._journals:
            raise RuntimeError(
                f"adapter {name!r} is a plain LoRA: without the sidecar folder "
                "'alphaedit/' of a pack of this model's rewrite layers its edits are not known, so "
                "it can be used but not edited"
            )
        return self._journals[name]

    def _known_journal(self, adapter_name: str) -> Journal | None:
        """An adapter's journal, known to go with its factors; None for a plain LoRA."""
        journal = self._journals.get(adapter_name)
        if journal is not None and self._stamps[adapter_name] != self._stamp(adapter_name):
            raise RuntimeError(
                f"the factors of adapter {adapter_name!r} are not those its edits were written to: "
                "hotswap_adapter, training or something else changed them, so its edits are no "
                f"longer known; load the pack with load_adapter(folder, {adapter_name!r}), or drop "
                f"the adapter with delete_adapter({adapter_name!r})"
            )
        return journal

    def _stamp(self, adapter_name: str) -> tuple[int, ...]:
        layers = self.alphaedit_config.rewrite_layers or ()
        return tuple(n for i in layers for n in lora_layer.stamp(self._lora_layer(i), adapter_name))

    def _lora_layer(self, layer: int) -> Any:
        return self.get_base_model().get_submodule(self.architecture.rewrite_name(layer))

    def _require_editable(self) -> None:
        self._journal()
        self._known_journal(self._active)
        require_rows(self._compressions.get(self._active), "edit it or take edits out of it")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() is on; edit outside of it, or in no_grad()")
        if self.merged:
            raise RuntimeError("the edits are merged into the base weights; call unmerge() first")
        if any(layer.disable_adapters for layer in lora_layer.lora_layers(self).values()):
            raise RuntimeError("the adapter is disabled; edit outside of disable_adapter()")

    def _state(self) -> EditState:
        journal = self._journal()
        factors = self.factors
        targets = journal.targets
        if targets is None:  # a pack saved without them: editing goes on, repour cannot
            targets = torch.full((journal.rank, self.config.hidden_size), torch.nan)
        return EditState(factors, journal.records, targets, self._solvers.get(self._active, {}))

    def _grams(self, factors: Mapping[int, LowRankDelta]) -> dict[int, Tensor]:
        """A A^T (n, n) by layer, as far as the last solves have it for these factors."""
        if not kind(self.alphaedit_config.objective).rows_are_keys:
            return {}  # G is another one
        kept = self._solvers.get(self._active, {})
        found = {layer: kept[layer].gram_of(factors[layer].A) for layer in kept.keys() & factors}
        return {layer: gram for layer, gram in found.items() if gram is not None}

    def _write(self, layer: int, delta: LowRankDelta) -> None:
        lora_layer.write_factors(self._lora_layer(layer), self._active, delta)

    @contextmanager
    def _all_or_nothing(self, before: EditState) -> Iterator[None]:
        """Put the factors back if the block does not end, whatever the reason."""
        try:
            yield
        except BaseException:
            for layer, delta in before.factors.items():
                self._write(layer, delta)
            raise

    def _commit(
        self,
        state: EditState,
        contexts: tuple[str, ...],
        parents: tuple[dict[str, Any], ...],
    ) -> None:
        journal = self._journal()
        self._compressions.pop(self._active, None)
        self._solvers[self._active] = state.kept
        self._keep(
            replace(
                journal,
                records=state.records,
                targets=state.targets if state.targets.isfinite().all() else None,
                rank=state.rank,
                contexts=contexts,
                null_space=self.resources.provenance() or journal.null_space,
                parents=parents,
                decisions=tuple(in_force(journal.decisions, self.alphaedit_config)),
            )
        )

    def _keep(self, journal: Journal) -> None:
        """Hold a journal for the factors as they are now."""
        name = self._active
        self._journals[name], self._stamps[name] = journal, self._stamp(name)
        lora_config: Any = self.peft_config[name]
        lora_config.r = lora_config.lora_alpha = max(1, journal.rank)

    def _forget(self, adapter_name: str) -> None:
        """Drop all that is known of an adapter's edits."""
        for known in (self._journals, self._snapshots, self._stamps, self._sources):
            known.pop(adapter_name, None)
        self._compressions.pop(adapter_name, None)
        self._solvers.pop(adapter_name, None)
        self._moments.pop(adapter_name, None)

    def _remember(self, snapshot: Snapshot) -> None:
        depth = self.alphaedit_config.rollback_depth
        self._snapshots.setdefault(self._active, deque(maxlen=depth)).append(snapshot)

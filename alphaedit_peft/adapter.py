"""An adapter that knows its edits: PEFT's LoRA layers, and the journal that goes with them.

In: a PEFT model. Out: what the active adapter holds, as values (edits, records, factors), and the
one place that writes factors into its layers, keeps its journal, and puts both back when something
fails. ``editable`` decides what to write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM

from alphaedit_peft import live
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.architecture import Architecture
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.journal import Journal, Snapshot
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.hub import push_pack


class AdapterModel(PeftModelForCausalLM):
    """The state of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    alphaedit_config: AlphaEditConfig
    architecture: Architecture
    base_fingerprint: BaseFingerprint
    resources: Resources
    _journals: dict[str, Journal]
    _snapshots: dict[str, deque[Snapshot]]
    base_model: Any  # PEFT's LoraModel
    config: Any  # the base model's

    @property
    def edits(self) -> list[Edit]:
        """The edits in the active adapter, in the order they were made; each has its id."""
        return [record.edit for record in self.records if record.role == "own"]

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """The active adapter's journal: every edit with its row, batch and role."""
        journal = self._journals.get(self._active)
        return () if journal is None else journal.records

    @property
    def factors(self) -> dict[int, LowRankDelta]:
        """The active adapter's update by rewrite layer: A (n, d_in), B (d_out, n)."""
        rank = self._journal().rank
        return {
            layer: live.read_factors(self._lora_layer(layer), self._active, rank)
            for layer in self.alphaedit_config.rewrite_layers or ()
        }

    @property
    def merged(self) -> bool:
        """Whether edits are written into the base weights at the moment."""
        return any(layer.merged for layer in live.lora_layers(self).values())

    @property
    def _active(self) -> str:
        names = self.active_adapters
        if len(names) != 1:
            raise RuntimeError(f"adapters {names} are active; choose one with set_adapter(name)")
        return names[0]

    def _journal(self) -> Journal:
        if self._active not in self._journals:
            raise RuntimeError(
                f"adapter {self._active!r} is a plain LoRA: without the sidecar folder "
                "'alphaedit/' of a pack its edits are not known, so it can be used but not edited"
            )
        return self._journals[self._active]

    def _lora_layer(self, layer: int) -> Any:
        return self.get_base_model().get_submodule(self.architecture.rewrite_name(layer))

    def _require_editable(self) -> None:
        self._journal()
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode() is on; edit outside of it, or in no_grad()")
        if self.merged:
            raise RuntimeError("the edits are merged into the base weights; call unmerge() first")
        if any(layer.disable_adapters for layer in live.lora_layers(self).values()):
            raise RuntimeError("the adapter is disabled; edit outside of disable_adapter()")

    def _state(self) -> EditState:
        journal = self._journal()
        factors = self.factors
        targets = journal.targets
        if targets is None:  # a pack saved without them: editing goes on, repour cannot
            targets = torch.full((journal.rank, self.config.hidden_size), torch.nan)
        return EditState(factors, journal.records, targets)

    def _write(self, layer: int, delta: LowRankDelta) -> None:
        live.write_factors(self._lora_layer(layer), self._active, delta)

    @contextmanager
    def _all_or_nothing(self, before: EditState) -> Iterator[None]:
        """Put the factors back if the block does not end, whatever the reason."""
        try:
            yield
        except BaseException:
            for layer, delta in before.factors.items():
                self._write(layer, delta)
            raise

    def _commit(self, state: EditState, contexts: tuple[str, ...]) -> None:
        journal = self._journal()
        self._keep(
            replace(
                journal,
                records=state.records,
                targets=state.targets if state.targets.isfinite().all() else None,
                rank=state.rank,
                contexts=contexts,
                null_space=self.resources.provenance() or journal.null_space,
            )
        )

    def _keep(self, journal: Journal) -> None:
        self._journals[self._active] = journal
        lora_config: Any = self.peft_config[self._active]
        lora_config.r = lora_config.lora_alpha = max(1, journal.rank)

    def _remember(self, snapshot: Snapshot) -> None:
        depth = self.alphaedit_config.rollback_depth
        self._snapshots.setdefault(self._active, deque(maxlen=depth)).append(snapshot)

    def to_pack(self) -> EditPack:
        """The active adapter as an :class:`EditPack`, a value that stands without the model."""
        journal = self._journal()
        names = self.architecture.rewrite_name
        return EditPack(
            factors={names(layer): delta.to("cpu") for layer, delta in self.factors.items()},
            config=self.alphaedit_config,
            records=journal.records,
            targets=None if journal.targets is None else journal.targets.float().cpu(),
            contexts=journal.contexts or (),
            fan_in_fan_out=self.architecture.conv1d,
            base=self.base_fingerprint,
            null_space=journal.null_space,
            parents=journal.parents,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
    ) -> None:
        """Write the active adapter as a pack: a standard LoRA folder with its sidecar.

        Args:
            save_directory: where to; the folder is replaced in one step.
            dtype: of the factors on disk; float32 lets editing go on with the same bits.
            safe_serialization: as in PEFT; only True will do.
            selected_adapters: as in PEFT; None or the active adapter alone.

        Raises:
            ValueError: another format, or other adapters.
            OSError: the folder cannot be written; what was there is untouched.
        """
        if not safe_serialization:
            raise ValueError(
                f"safe_serialization={safe_serialization!r} asks for a pickle, and packs are "
                "safetensors only; leave it out"
            )
        if selected_adapters is not None and list(selected_adapters) != [self._active]:
            raise ValueError(
                f"selected_adapters={selected_adapters!r} cannot be saved, since a pack is one "
                f"adapter, the active {self._active!r}; choose it with set_adapter(name)"
            )
        self.to_pack().save_pretrained(save_directory, dtype=dtype)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Save the active adapter as a pack on the Hub; see ``pack.hub.push_pack``."""
        return push_pack(
            self.to_pack(),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

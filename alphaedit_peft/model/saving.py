"""Saving as methods of a model: an adapter as a pack, on disk or on the Hub.

In: an adapter with its journal. Out: an :class:`EditPack`, which stands without the model, or its
folder.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alphaedit_peft import parallel
from alphaedit_peft.model.adapter import AdapterModel
from alphaedit_peft.pack import EditPack


class SavingModel(AdapterModel):
    """The saving part of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    def to_pack(self, adapter_name: str | None = None) -> EditPack:
        """An adapter as an :class:`EditPack`, a value that stands without the model.

        Args:
            adapter_name: which one; None: the active one.

        Raises:
            RuntimeError: a plain LoRA, one whose factors were changed behind this model's back, or
                several active adapters and none named.
        """
        with self._on(adapter_name):
            journal = self._journal()
            names = self.architecture.rewrite_name
            pack = EditPack(
                factors={names(layer): delta.to("cpu") for layer, delta in self.factors.items()},
                config=self.alphaedit_config,
                records=journal.records,
                targets=None if journal.targets is None else journal.targets.float().cpu(),
                contexts=journal.contexts or (),
                fan_in_fan_out=self.architecture.conv1d,
                base=self.base_fingerprint,
                null_space=journal.null_space,
                parents=journal.parents,
                compression=self._compressions.get(self._active),
                decisions=journal.decisions,
            )
            self._known_journal(self._active)
            return pack

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
    ) -> None:
        """Write an adapter as a pack: a standard LoRA folder with its sidecar.

        Of several processes (``accelerate launch``), which all have the same pack, the main one
        writes it.

        Args:
            save_directory: where to; the folder is replaced in one step.
            dtype: of the factors on disk; None: float32, which lets editing go on with the same
                bits, or what the pack was compressed to.
            safe_serialization: as in PEFT; only True will do.
            selected_adapters: as in PEFT, but one adapter; None: the active one.

        Raises:
            ValueError: another format, or several adapters, or one that is not loaded.
            RuntimeError: as ``to_pack``.
            OSError: the folder cannot be written; what was there is untouched.
        """
        if not safe_serialization:
            raise ValueError(
                f"safe_serialization={safe_serialization!r} asks for a pickle, and packs are "
                "safetensors only; leave it out"
            )
        chosen = [None] if selected_adapters is None else list(selected_adapters)
        if len(chosen) != 1 or chosen[0] not in (None, *self.peft_config):
            raise ValueError(
                f"selected_adapters={selected_adapters!r} cannot be saved, since a pack is one "
                f"loaded adapter, of {[*self.peft_config]}; name one, or choose it with "
                "set_adapter(name)"
            )
        pack = self.to_pack(chosen[0])
        if parallel.is_main():
            pack.save_pretrained(save_directory, dtype=dtype)

    def push_to_hub(  # type: ignore[override]  # noqa: PLR0913
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        subfolder: str | None = None,
        texts: bool = True,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Save the active adapter as a pack on the Hub, in one commit; see ``EditPack``'s own."""
        return self.to_pack().push_to_hub(
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            subfolder=subfolder,
            texts=texts,
            dtype=dtype,
        )

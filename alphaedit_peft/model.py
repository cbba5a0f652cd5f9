"""The edited model: a PEFT model whose LoRA adapter is the edits made so far.

In: a base model and an :class:`AlphaEditConfig`, or a base model and a pack. Out:
:class:`AlphaEditModel`, a ``PeftModelForCausalLM`` that edits itself (see ``editable``), and here:
wraps, merges, unmerges, saves and loads.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import live
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editable import EditableModel
from alphaedit_peft.editing.journal import Journal
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.fitting import check_fit
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.hub import push_pack


def get_alphaedit_model(
    base: nn.Module,
    config: AlphaEditConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    null_space: NullSpace | None = None,
    key_moments: KeyMoments | None = None,
    adapter_name: str = "default",
) -> AlphaEditModel:
    """Wrap a base model for editing; without edits it computes the same bits as its base.

    Args:
        base: a causal language model from transformers.
        config: see :class:`AlphaEditConfig`; fields left at None are filled for this model.
        tokenizer: loaded from ``base.name_or_path`` at the first edit where not given.
        null_space: loaded from ``config.null_space`` at the first edit where not given.
        key_moments: for ``objective="memit"`` only.
        adapter_name: PEFT's name of the adapter that holds the edits.

    Raises:
        ValueError: a model that cannot be edited, or settings that do not fit it.
    """
    resources = Resources(tokenizer, null_space, key_moments)
    return AlphaEditModel(base, config, resources=resources, adapter_name=adapter_name)


class AlphaEditModel(EditableModel):
    """A causal language model and its edits; make one with :func:`get_alphaedit_model`.

    What PEFT does with a LoRA model works here too: ``generate``, ``set_adapter``, several
    adapters. ``alphaedit_config`` holds the settings, filled for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AlphaEditConfig,
        *,
        resources: Resources | None = None,
        adapter_name: str = "default",
        plain_lora: LoraConfig | None = None,
    ) -> None:
        if live.lora_layers(model):
            raise ValueError(
                f"this {type(model).__name__} carries PEFT adapters already; pass the bare model, "
                "which unload() or merge_and_unload() gives"
            )
        full, architecture = config.resolve(model)
        if config.threshold is None:  # the null space brings its own
            full.threshold = full.threshold_mode = None
        own_fingerprint = fingerprint(model, max(full.rewrite_layers or [0]), architecture)
        super().__init__(model, plain_lora or full.lora_config(architecture, 1), adapter_name)
        live.make_exact(self)
        self.alphaedit_config, self.architecture = full, architecture
        self.base_fingerprint = own_fingerprint
        self.resources = resources or Resources()
        self._journals = {}
        self._snapshots = deque(maxlen=full.rollback_depth)
        if plain_lora is None:
            self._journals[adapter_name] = Journal.empty(self.config.hidden_size)
            for layer, delta in self.factors.items():
                self._write(layer, delta)

    def merge(self, *, safe_merge: bool = False) -> None:
        """Write the active adapter into the base weights: summed in float32, rounded once.

        Args:
            safe_merge: refuse a result that is not finite.

        Raises:
            RuntimeError: a quantised base, whose weights would be rounded to their few bits.
        """
        self._require_mergeable()
        if not self.merged:
            self.base_model.merge_adapter(safe_merge=safe_merge)

    def unmerge(self) -> None:
        """Take the edits out of the base weights, which get their original bits back."""
        for layer in live.lora_layers(self).values():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with the edits in its weights, and no adapter; for deployment.

        Raises:
            RuntimeError: as ``merge``.
        """
        self._require_mergeable()
        self.unmerge()
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped, with its original bits."""
        self.unmerge()
        return self.base_model.unload()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the base alone inside the ``with`` block; a merge is set aside exactly."""
        merged = self.merged
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.unmerge()
        try:
            with super().disable_adapter():
                yield
        finally:
            for parameter, flag in flags:  # PEFT switches training on for adapters it enables
                parameter.requires_grad_(flag)
            if merged:
                self.merge()

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
            null_space=self.resources.provenance() or journal.null_space,
            parents=journal.parents,
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the active adapter as a pack: a standard LoRA folder with its sidecar.

        Args:
            save_directory: where to; the folder is replaced in one step.
            dtype: of the factors on disk; float32 lets editing go on with the same bits.

        Raises:
            OSError: the folder cannot be written; what was there is untouched.
        """
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

    @classmethod
    def from_pretrained(  # type: ignore[override]  # noqa: PLR0913
        cls,
        model: nn.Module,
        model_id: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        null_space: NullSpace | None = None,
        key_moments: KeyMoments | None = None,
        adapter_name: str = "default",
        allow_base_mismatch: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> AlphaEditModel:
        """Load a pack onto its base model.

        A folder without sidecar is a plain LoRA: it loads, with a warning, and cannot be edited.

        Args:
            model: the bare base model.
            model_id: a pack's folder, or a Hub repository.
            tokenizer: as in :func:`get_alphaedit_model`; needed only to go on editing.
            null_space: likewise; it must be the one the edits were made with.
            key_moments: likewise, for MEMIT.
            adapter_name: PEFT's name of the adapter.
            allow_base_mismatch: load onto another base than the pack was made for.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            subfolder: of the pack within the folder or repository.

        Raises:
            PackError: a damaged pack.
            ValueError: another base, unless ``allow_base_mismatch``.
            FileNotFoundError: no such folder.
        """
        resources = Resources(tokenizer, null_space, key_moments)
        where: dict[str, Any] = {"revision": revision, "token": token, "subfolder": subfolder}
        try:
            pack = EditPack.from_pretrained(model_id, **where)
        except FileNotFoundError as error:
            return cls._from_plain_lora(model, model_id, where, adapter_name, error)
        check_fit(pack, model, allow_base_mismatch)
        edited = cls(model, pack.config, resources=resources, adapter_name=adapter_name)
        for layer in edited.alphaedit_config.rewrite_layers or ():
            edited._write(layer, pack.factors[edited.architecture.rewrite_name(layer)])
        contexts = pack.contexts if pack.records else None
        edited._keep(
            Journal(pack.records, pack.targets, pack.rank, contexts, pack.null_space, pack.parents)
        )
        return edited

    @classmethod
    def _from_plain_lora(
        cls,
        model: nn.Module,
        model_id: str | Path,
        where: dict[str, Any],
        adapter_name: str,
        error: FileNotFoundError,
    ) -> AlphaEditModel:
        try:
            lora_config = LoraConfig.from_pretrained(str(model_id), **where)
        except ValueError:
            raise error from None
        lora_config.inference_mode = True
        warnings.warn(
            f"{model_id} has no sidecar folder 'alphaedit/': it is loaded as a plain LoRA, which "
            "can be used and merged but not edited",
            stacklevel=3,
        )
        edited = cls(model, AlphaEditConfig(), adapter_name=adapter_name, plain_lora=lora_config)
        edited.load_adapter(str(model_id), adapter_name, **where)
        return edited

    def _require_mergeable(self) -> None:
        live.make_exact(self)
        for name, layer in live.lora_layers(self).items():
            if not isinstance(layer, live.ExactLinear):
                raise RuntimeError(
                    f"{name} is a {type(layer).__name__}: merging would round the edits to the "
                    "few bits of a quantised weight; use the model unmerged, or load the base in "
                    "bfloat16"
                )

"""The edited model: a PEFT model whose LoRA adapter is the edits made so far.

In: a base model and an :class:`AlphaEditConfig`, or a base model and a pack. Out:
:class:`AlphaEditModel`, a ``PeftModelForCausalLM``. It is a face: its methods say what can be done
and with what, and call the verbs of this folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import parallel
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.capacity import Capacity
from alphaedit_peft.editing.edit_report import EditReport
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.messages import shown
from alphaedit_peft.model import edit, load, lora_layer, merge, prepare
from alphaedit_peft.model.adapter import Adapter, Moved, adapter_of, in_force, name_of, to_pack
from alphaedit_peft.model.join_packs import JoinReport, join
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.pack import EditPack, EditRecord

DEFAULT = "default"  # PEFT's name of an adapter that was given none


def get_alphaedit_model(
    base: nn.Module,
    config: AlphaEditConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    null_space: NullSpace | None = None,
    key_moments: KeyMoments | None = None,
    adapter_name: str = DEFAULT,
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
        TypeError: a config or statistics of another type.
    """
    resources = Resources(tokenizer, null_space, key_moments)
    return AlphaEditModel(base, config, resources=resources, adapter_name=adapter_name)


class AlphaEditModel(PeftModelForCausalLM):
    """A causal language model and its edits; make one with :func:`get_alphaedit_model`.

    What PEFT does with a LoRA model works here too: ``generate``, ``set_adapter``, several
    adapters. ``alphaedit_config`` holds the settings, filled for this model; ``resources`` the
    tokenizer and the statistics; ``edit_adapters`` the adapters whose edits are known, by name;
    ``trained_before`` the base's parameters that required a gradient when they were wrapped;
    ``left_open`` names the settings that were not given, and ``moved`` is what was decided for
    them.
    """

    base_model: Any  # PEFT's LoraModel
    config: Any  # the base model's

    def __init__(
        self,
        model: nn.Module,
        config: AlphaEditConfig,
        *,
        resources: Resources | None = None,
        adapter_name: str = DEFAULT,
        plain_lora: LoraConfig | None = None,
    ) -> None:
        load.require_base(model)
        load.require_name(adapter_name)
        if not isinstance(config, AlphaEditConfig):
            raise TypeError(
                f"config is a {type(config).__name__}, not an AlphaEditConfig; pass "
                "AlphaEditConfig(), with the settings to change"
            )
        full, architecture = config.resolve(model)
        if config.threshold is None:  # the null space brings its own
            full.threshold = full.threshold_mode = None
        own_fingerprint = fingerprint(model, max(full.rewrite_layers or [0]), architecture)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        with torch.inference_mode(False), warnings.catch_warnings():  # factors that may be trained
            # PEFT reads a property by its former name
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
            super().__init__(model, plain_lora or full.lora_config(architecture, 1), adapter_name)
            self.trained_before = frozenset(trained)
            if plain_lora is None:
                names = map(architecture.rewrite_name, full.rewrite_layers or ())
                lora_layer.require_placed(self, names)
            lora_layer.make_exact(self)
            lora_layer.place_factors(self)
            self.alphaedit_config, self.architecture = full, architecture
            self.base_fingerprint = own_fingerprint
            self.resources = resources or Resources()
            self.left_open = config.open_settings
            self.moved: Moved | None = None
            self.edit_adapters: dict[str, Adapter] = {}
            if plain_lora is None:
                load.begin(self, adapter_name)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # noqa: PLR0913
        cls,
        model: nn.Module,
        model_id: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        null_space: NullSpace | None = None,
        key_moments: KeyMoments | None = None,
        adapter_name: str = DEFAULT,
        allow_base_mismatch: bool = False,
        missing_parents: str = "error",
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
            missing_parents: ``warn`` loads a pack without those it was made on top of.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            subfolder: of the pack within the folder or repository.

        Raises:
            PackError: a damaged pack.
            ValueError: another base, unless ``allow_base_mismatch``; a pack made on top of others,
                which are to be loaded first, unless ``missing_parents="warn"``.
            FileNotFoundError: no such folder, or one without an adapter.
            TypeError: a ``model_id`` that is no path, or statistics of another type.
        """
        load.require_path(model_id)
        resources = Resources(tokenizer, null_space, key_moments)
        with torch.inference_mode(False):
            loaded = load.wrap_with_pack(
                partial(cls, resources=resources, adapter_name=adapter_name),
                model,
                model_id,
                {"revision": revision, "token": token, "subfolder": subfolder},
                allow_base_mismatch=allow_base_mismatch,
                missing_parents=missing_parents,
            )
        return loaded.eval()

    @property
    def edits(self) -> list[Edit]:
        """The edits in the adapters in force, in the order they were made; each has its id.

        Those are the active adapters, or the merged ones where some are. An edit that was solved
        anew, with a later one of its key, comes with that one.

        Raises:
            RuntimeError: an adapter's factors were changed behind this model's back.
        """
        known = [name for name in in_force(self) if name in self.edit_adapters]
        return [edit for name in known for edit in self.edit_adapters[name].edits]

    @property
    def records(self) -> tuple[EditRecord, ...]:
        """The active adapter's journal: every edit with its row, batch and role."""
        adapter = self.edit_adapters.get(name_of(self, None))
        return () if adapter is None else adapter.known_journal().records

    @property
    def factors(self) -> dict[int, LowRankDelta]:
        """The active adapter's update by rewrite layer: A (n, d_in), B (d_out, n)."""
        return adapter_of(self, None).factors

    @property
    def merged(self) -> bool:
        """Whether edits are written into the base weights at the moment."""
        return any(layer.merged for layer in lora_layer.lora_layers(self).values())

    def edit(
        self,
        edits: Iterable[Edit | Mapping[str, Any]],
        batch_size: int = 100,
        *,
        into: str | None = None,
        progress: bool = True,
        after_batch: Callable[[], object] | None = None,
    ) -> EditReport:
        """Make edits, in batches; a batch that fails or is interrupted leaves no trace.

        Where several packs are active the edits go into one of them, on top of the others: their
        edits are protected as if they were in the same pack, and are its parents from then on.

        Args:
            edits: :class:`Edit` values or dicts of their fields.
            batch_size: edits solved together. About 100 is the paper's; one at a time drifts.
            into: name of the active adapter that gets the edits; needed where there are several.
            progress: whether to show a progress bar on stderr.
            after_batch: called after each batch, which is then in force; to save a long run's work.

        Returns:
            A result for every edit, made or set aside with the reason, and figures by layer.

        Warns:
            UserWarning: the edits take more of a layer's room than ``config.capacity_bound``.

        Raises:
            ValueError: edits or statistics that cannot be used; says which and why. An edit that
                contradicts a parent's, or a parent that is missing or has changed.
            RuntimeError: the model is merged, disabled, or holds a plain LoRA; several active
                adapters and no ``into``.
        """
        adapter = adapter_of(self, into)
        return edit.edit(
            self, adapter, edits, batch_size, progress=progress, after_batch=after_batch
        )

    def repour(
        self,
        edit_ids: Sequence[str] | None = None,
        *,
        together: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Pour stored target values again: key passes and solves only.

        The model then holds exactly these edits, as if the others had never been made. A target
        value is optimised again only where its row loses some of the edits that shared it. What is
        set in ``alphaedit_config`` and ``resources`` now counts: another ridge, threshold or null
        space takes effect here.

        Args:
            edit_ids: which edits; None: all that stand. Batches keep their order.
            together: all in one batch rather than batch by batch, which measures upper keys anew
                with every edit in place (see docs/tuning.md).
            adapter_name: which active adapter; needed where there are several. It is then poured on
                top of the others as they are now.

        Raises:
            ValueError: an id that is not in the adapter, a pack saved without target values, or a
                parent that is not active.
        """
        edit.repour(self, adapter_of(self, adapter_name), edit_ids, together=together)

    def remove_edits(self, edit_ids: Sequence[str], *, adapter_name: str | None = None) -> None:
        """Take edits out by pouring the others again, as if these had never been made.

        Args:
            edit_ids: of edits in the adapter; a parent's edits are removed from the parent.
            adapter_name: as in ``repour``, which says what is refused too.
        """
        edit.remove_edits(self, adapter_of(self, adapter_name), edit_ids)

    def rollback(self, batches: int = 1, *, adapter_name: str | None = None) -> None:
        """Take back the last batches of edits.

        Within a session the earlier factors come back bit for bit, for the last
        ``config.rollback_depth`` batches; after a load, what remains is poured again.

        Args:
            batches: how many.
            adapter_name: of which active adapter; needed where there are several.

        Raises:
            ValueError: more batches than the adapter holds.
        """
        edit.rollback(self, adapter_of(self, adapter_name), batches)

    def capacity(self, prompts: Sequence[str] = (), *, adapter_name: str | None = None) -> Capacity:
        """How full an adapter is: rows against the room, their crowding, growth, drift.

        Args:
            prompts: texts that should go on as before; how far the next token's distribution has
                moved from the bare base's, with all active adapters, is measured on them.
            adapter_name: which adapter; needed where there are several.

        Raises:
            RuntimeError: a plain LoRA, or factors that something else has changed.
            ValueError: an empty prompt, or an adapter that is not loaded.
        """
        return prepare.capacity(self, adapter_of(self, adapter_name), prompts)

    def join(
        self,
        packs: Sequence[EditPack | str | Path],
        *,
        on_conflict: str = "error",
        adapter_name: str | None = None,
    ) -> JoinReport:
        """Pour packs into an adapter, after the edits that it has; wholly or not at all.

        Key passes and solves only, with this model's settings and contexts (in a model without
        edits, the first pack's contexts). Edits that share a key are in conflict too: each has a
        target value made without the other. Making one of them again with ``edit`` solves them
        together.

        Args:
            packs: values, folders or Hub repositories, poured in this order.
            on_conflict: ``error``, or keep what came ``first`` or ``last``.
            adapter_name: the adapter; needed where several are active.

        Raises:
            ValueError: a pack of another base, null space or layers, or without target values; a
                conflict under ``error``; one id for two edits. Names the pack.
            PackError: a damaged pack.
        """
        return join(self, adapter_of(self, adapter_name), packs, on_conflict)

    def merge(self, *, safe_merge: bool = False) -> None:
        """Write the active adapter into the base weights: summed in float32, rounded once.

        Adapters that are merged already stay so, and the active one is added to them.

        Args:
            safe_merge: refuse a result that is not finite.

        Raises:
            RuntimeError: a quantised base, whose weights would be rounded to their few bits, or an
                adapter that is more than plain LoRA.

        Warns:
            UserWarning: rounding changes an update by more than a tenth; see ``merge_errors``.
        """
        merge.merge(self, safe_merge=safe_merge)

    def merge_errors(self, adapter_names: list[str] | None = None) -> dict[str, float]:
        """How far merging misses the update D, by module: |round(W + D) - W - D| / |D|.

        About 2e-3 |W + D| / |D| in bfloat16, an eighth of that in float16, 1e-7 in float32: few
        edits in a large matrix lose most. The unmerged adapter loses nothing.

        Args:
            adapter_names: which adapters, merged together; None: the active ones.
        """
        return merge.merge_errors(self, adapter_names or self.active_adapters)

    def unmerge(self) -> None:
        """Take the edits out of the base weights, which get their original bits back."""
        merge.unmerge(self)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's name for ``merge``, of several adapters if asked; as exact, all layers or none."""
        merge.merge_adapter(self, adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with the edits in its weights, by ``merge``, and no adapter."""
        return merge.merge_and_unload(self, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped: its bits, and which train."""
        return merge.unload(self)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the base alone inside the ``with`` block; a merge is set aside exactly."""
        with merge.disabled(self):
            yield

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter: as in PEFT what a config describes, or without one a pack to edit into.

        Raises:
            ValueError: a name that is taken, or that nothing can be called.
            RuntimeError: a model that was unloaded.
        """
        how = (low_cpu_mem_usage, autocast_adapter_dtype)
        with torch.inference_mode(False):
            load.add_adapter(self, adapter_name, peft_config, *how)

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        *,
        allow_base_mismatch: bool = False,
        missing_parents: str = "error",
        **kwargs: Any,
    ) -> Any:
        """Load another adapter beside those the model has, as PEFT does; wholly or not at all.

        A pack that edits this model's rewrite layers brings its edits along, so that after
        ``set_adapter(adapter_name)`` they can be read, saved and gone on from. Any other LoRA, and
        one that is to be trained, can be used but not edited. A pack that was made on top of others
        needs them active.

        Args:
            model_id: a folder, or a Hub repository.
            adapter_name: PEFT's name of the adapter; one that is there is replaced.
            is_trainable, torch_device, **kwargs: as in PEFT.
            allow_base_mismatch: load a pack that was made for another base.
            missing_parents: ``error``, or ``warn`` to load a pack without those it stands on.

        Returns:
            What PEFT returns: missing and unexpected keys.

        Raises:
            PackError: a damaged pack.
            ValueError: a pack of another base, unless ``allow_base_mismatch``; one whose parents
                are not active, unless ``missing_parents="warn"``; one of other modules than the
                adapter that it would replace.
        """
        with torch.inference_mode(False):
            return load.load_adapter(
                self,
                model_id,
                adapter_name,
                is_trainable,
                torch_device,
                allow_base_mismatch=allow_base_mismatch,
                missing_parents=missing_parents,
                **kwargs,
            )

    def set_adapter(
        self,
        adapter_name: str | Sequence[str],
        inference_mode: bool = False,
        *,
        missing_parents: str = "error",
    ) -> None:
        """Make one adapter active, or several: their updates then add up.

        Args:
            adapter_name: a name, or a list of names; a pack comes after those it stands on.
            inference_mode: as in PEFT.
            missing_parents: ``error``, or ``warn`` to use a pack without those it stands on.

        Raises:
            ValueError: a name that is not loaded or named twice, none at all, or a pack whose
                parents are not named before it.
        """
        load.set_adapter(self, adapter_name, inference_mode, missing_parents)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model, with its edits; the others stay as they are.

        Raises:
            ValueError: an adapter that is not loaded, or that an active one stands on.
        """
        load.delete_adapter(self, adapter_name)

    def to_pack(self, adapter_name: str | None = None) -> EditPack:
        """An adapter as an :class:`EditPack`, a value that stands without the model.

        Args:
            adapter_name: which one; None: the active one.

        Raises:
            RuntimeError: a plain LoRA, one whose factors were changed behind this model's back, or
                several active adapters and none named.
        """
        return to_pack(self, adapter_of(self, adapter_name))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
    ) -> None:
        """Write adapters as packs: standard LoRA folders with their sidecars, where PEFT has them.

        The adapter ``default`` goes into the folder itself, any other into the folder of its name
        in it; one that is alone there is found by the outer folder too.

        Of several processes (``accelerate launch``), which all have the same pack, the main one
        writes it.

        Args:
            save_directory: where to; a pack's folder is replaced in one step.
            dtype: of the factors on disk; None: float32, which lets editing go on with the same
                bits, or what the pack was compressed to.
            safe_serialization: as in PEFT; only True will do.
            selected_adapters: names, as in PEFT; None: the active one.

        Raises:
            ValueError: another format, or an adapter that is not loaded, or none.
            RuntimeError: as ``to_pack``.
            OSError: the folder cannot be written; what was there is untouched.
        """
        if not safe_serialization:
            raise ValueError(
                f"safe_serialization={safe_serialization!r} asks for a pickle, and packs are "
                "safetensors only; leave it out"
            )
        chosen = [name_of(self, None)] if selected_adapters is None else list(selected_adapters)
        if not chosen or not {*chosen} <= {*self.peft_config}:
            raise ValueError(
                f"selected_adapters={shown(selected_adapters)} cannot be saved: this model has "
                f"{[*self.peft_config]}; name one or more of them, or leave it out for the active "
                "one"
            )
        packs = {name: self.to_pack(name) for name in chosen}
        for name, pack in packs.items() if parallel.is_main() else ():
            place = Path(save_directory, "" if name == DEFAULT else name)
            pack.save_pretrained(place, dtype=dtype)

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

"""Several adapters in one model: added, loaded, made active together, deleted.

In: packs and other LoRAs beside those that the model has. Out: the same model with its journals in
step, or, where loading fails, as it was. A pack that was made on top of others acts beside them:
that they are there is seen to here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.devices import keeps_elsewhere
from alphaedit_peft.editing.state import Journal
from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.fitting import check_beside
from alphaedit_peft.model.merge import MergeableModel
from alphaedit_peft.model.stack import Loaded, needed, require_parents
from alphaedit_peft.pack import EditPack


class SeveralModel(MergeableModel):
    """What :class:`~alphaedit_peft.model.AlphaEditModel` does with more than one adapter."""

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter: an empty pack to edit into, or as in PEFT what a config describes.

        Args:
            adapter_name: a new name.
            peft_config: a PEFT config; None: a pack without edits.
            low_cpu_mem_usage: as in PEFT.
            autocast_adapter_dtype: as in PEFT.

        Raises:
            ValueError: a name that is taken.
        """
        config = peft_config or self.alphaedit_config.lora_config(self.architecture, 1)
        with self._whole_or_not(adapter_name):
            super().add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
            lora_layer.make_exact(self)
            if peft_config is None:
                self._start(adapter_name, Journal.empty(self.config.hidden_size))

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
            is_trainable: as in PEFT.
            torch_device: as in PEFT.
            allow_base_mismatch: load a pack that was made for another base.
            missing_parents: ``error``, or ``warn`` to load a pack without those it stands on.
            **kwargs: as in PEFT.

        Returns:
            What PEFT returns: missing and unexpected keys.

        Raises:
            PackError: a damaged pack.
            ValueError: a pack of another base, unless ``allow_base_mismatch``; one whose parents
                are not active, unless ``missing_parents="warn"``; one of other modules than the
                adapter that it would replace.
        """
        require_path(model_id)
        where = {key: kwargs[key] for key in kwargs.keys() & {"revision", "token", "subfolder"}}
        pack = _pack_or_none(model_id, where)
        self._require_top(adapter_name)
        if pack is not None:
            check_beside(pack, self.get_base_model(), self.base_fingerprint, allow_base_mismatch)
            self._require_same_place(pack, adapter_name)
            beside = [name for name in self.active_adapters if name != adapter_name]
            self._require_parents("this pack", pack.parents, beside, missing_parents)
        with self._whole_or_not(adapter_name):
            if pack is not None and adapter_name in self.peft_config:
                self._make_room(pack, adapter_name)
            if keeps_elsewhere(self.get_base_model()):
                self.hf_device_map: dict[str, Any] = {}  # or PEFT would place the base anew
            found = super().load_adapter(
                model_id, adapter_name, is_trainable, torch_device, **kwargs
            )
            lora_layer.make_exact(self)
            lora_layer.require_factors(self, adapter_name)
            self._forget(adapter_name)
            if pack is not None and not is_trainable and self._edits_same_modules(pack):
                self._take_in(pack, adapter_name, model_id)
        return found

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
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(
                f"adapter_name={adapter_name!r} cannot be made active; name one or more of "
                f"{[*self.peft_config]}, each once"
            )
        for i, name in enumerate(names):
            if name in self._journals:
                parents = self._journals[name].parents
                self._require_parents(f"adapter {name!r}", parents, names[:i], missing_parents)
        self.active_adapter = names[0]  # PEFT looks up one config by it
        self.base_model.set_adapter(names if len(names) > 1 else names[0], inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model, with its edits; the others stay as they are.

        Raises:
            ValueError: an adapter that is not loaded, or that an active one stands on.
        """
        self._require_top(adapter_name)
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)
        self.active_adapter = next(iter(self.active_adapters), self.active_adapter)

    def _require_parents(
        self,
        what: str,
        recorded: Sequence[dict[str, Any]],
        before: Sequence[str],
        rule: str,
    ) -> None:
        known = self._loaded() if needed(recorded) else []
        there = [pack for pack in known if pack.name in before]
        others = [pack for pack in known if pack.name not in before]
        require_parents(what, recorded, there, others, rule)

    def _loaded(self) -> list[Loaded]:
        """The packs in the model; not those whose factors were changed behind its back."""
        known = [name for name in self._journals if self._stamps[name] == self._stamp(name)]
        return [
            Loaded(name, self._sources.get(name, name), self.to_pack(name).digest())
            for name in known
        ]

    @contextmanager
    def _whole_or_not(self, adapter_name: str) -> Iterator[None]:
        """Put an adapter back as it was, or take it out, if the block does not end."""
        base = self.get_base_model()
        before = lora_layer.remembered(base, adapter_name)
        config: Any = self.peft_config.get(adapter_name)
        rank = None if config is None else config.r
        try:
            yield
        except BaseException:
            lora_layer.put_back(base, adapter_name, before)
            self.peft_config.pop(adapter_name, None)
            if config is not None:
                self.peft_config[adapter_name] = config
                config.r = rank
            raise

    def _require_same_place(self, pack: EditPack, adapter_name: str) -> None:
        layers = lora_layer.lora_layers(self.get_base_model())
        there = sorted(name for name, layer in layers.items() if adapter_name in layer.lora_A)
        if there and there != sorted(pack.modules):
            raise ValueError(
                f"adapter {adapter_name!r} changes {there} and this pack {list(pack.modules)}; "
                f"load it under another name, or call delete_adapter({adapter_name!r}) first"
            )

    def _make_room(self, pack: EditPack, adapter_name: str) -> None:
        """Give an adapter that is replaced the rank of the pack, since PEFT loads no other."""
        base = self.get_base_model()
        for name in pack.modules:
            layer: Any = base.get_submodule(name)
            old = lora_layer.read_factors(layer, adapter_name, 0)
            rank = max(1, pack.rank)
            A, B = old.A.new_zeros(rank, old.A.shape[1]), old.B.new_zeros(old.B.shape[0], rank)
            lora_layer.write_factors(layer, adapter_name, LowRankDelta(A, B))

    def _take_in(self, pack: EditPack, adapter_name: str, model_id: str | Path) -> None:
        """Hold a loaded pack's journal; and its factors, which PEFT may have rounded."""
        for name, delta in pack.factors.items():
            layer: Any = self.get_base_model().get_submodule(name)
            dtype = torch.promote_types(layer.lora_A[adapter_name].weight.dtype, torch.float32)
            lora_layer.write_factors(layer, adapter_name, delta.to(dtype))
        with self._on(adapter_name):
            self._keep_pack(pack, model_id)

    def _keep_pack(self, pack: EditPack, model_id: str | Path) -> None:
        """Hold what a pack knows, for the adapter whose factors are the pack's."""
        name = self._active
        contexts = pack.contexts if pack.records else None
        self._keep(
            Journal(
                pack.records,
                pack.targets,
                pack.rank,
                contexts,
                pack.null_space,
                pack.parents,
                pack.decisions,
            )
        )
        here = Path(model_id)
        self._sources[name] = here.resolve().name if here.is_dir() else str(model_id)
        if pack.compression is not None:
            self._compressions[name] = pack.compression

    def _start(self, adapter_name: str, journal: Journal) -> None:
        """Begin an adapter without edits."""
        with self._on(adapter_name):
            for layer in self.alphaedit_config.rewrite_layers or ():
                empty = lora_layer.read_factors(self._lora_layer(layer), adapter_name, 0)
                self._write(layer, empty)
            self._keep(journal)

    def _edits_same_modules(self, pack: EditPack) -> bool:
        layers = self.alphaedit_config.rewrite_layers or ()
        return set(pack.modules) == {self.architecture.rewrite_name(layer) for layer in layers}


def require_path(model_id: object) -> None:
    """Refuse what is neither a path nor a repository's name.

    Raises:
        TypeError: says what was given.
    """
    if not isinstance(model_id, str | os.PathLike):
        raise TypeError(
            f"model_id={model_id!r} is a {type(model_id).__name__}; pass the pack's folder as a "
            "str or Path, or the name of a Hub repository"
        )


def _pack_or_none(model_id: str | Path, where: dict[str, Any]) -> EditPack | None:
    try:
        return EditPack.from_pretrained(model_id, **where)
    except FileNotFoundError:
        return None

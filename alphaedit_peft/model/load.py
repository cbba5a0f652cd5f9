"""Adapters in a model: packs and other LoRAs added, loaded, made active together, deleted.

In: packs and other LoRAs beside those that the model has. Out: the same model, its adapters' edits
in step with PEFT's layers, or, where loading fails, as it was. A pack that was made on top of
others acts beside them: that they are there is seen to here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import nn

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import keeps_elsewhere, require_whole
from alphaedit_peft.editing.state import Journal
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.messages import shown
from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.adapter import EditedModel, make_adapter
from alphaedit_peft.model.rollback import loaded_or_not
from alphaedit_peft.model.stack import require_parents, require_top
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.compatible import check_fit, check_shape
from alphaedit_peft.pack.files import locate, own_folder
from alphaedit_peft.pack.format import ADAPTER_CONFIG, PackError, read_lora
from alphaedit_peft.saving import read_steadily
from alphaedit_peft.solve_metric import kind

Wrapped = TypeVar("Wrapped", bound=EditedModel)


def wrap_with_pack(
    wrap: Callable[..., Wrapped],
    base: nn.Module,
    model_id: str | Path,
    where: Mapping[str, Any],
    *,
    allow_base_mismatch: bool,
    missing_parents: str,
) -> Wrapped:
    """A bare model with a pack on it; see :meth:`AlphaEditModel.from_pretrained`.

    ``wrap`` makes the edited model of a base and a config, or ``plain_lora=`` a LoRA's.
    """
    try:
        pack = EditPack.from_pretrained(model_id, **where)
    except FileNotFoundError as error:
        return _wrap_with_plain_lora(wrap, base, model_id, where, error)
    require_base(base)
    full, architecture = pack.config.resolve(base)
    layers = full.rewrite_layers or ()
    modules = [architecture.rewrite_name(layer) for layer in layers]
    own = None
    if pack.base is not None and not allow_base_mismatch:
        own = fingerprint(base, max(layers), architecture)
    check_fit(pack, base, modules, own)
    require_parents("this pack", pack.parents, missing_parents)
    model = wrap(base, pack.config)
    name = model.active_adapters[0]
    for module, delta in pack.factors.items():
        lora_layer.write_factors(model.get_base_model().get_submodule(module), name, delta)
    _hold_pack(model, name, pack, model_id)
    return model


def add_adapter(
    model: Any,
    adapter_name: str,
    peft_config: Any,
    low_cpu_mem_usage: bool,
    autocast_adapter_dtype: bool,
) -> None:
    """Add an adapter; see :meth:`AlphaEditModel.add_adapter`."""
    require_name(adapter_name)
    lora_layer.require_layers(model.get_base_model())
    config = peft_config or model.alphaedit_config.lora_config(model.architecture, 1)
    with loaded_or_not(model, adapter_name):
        PeftModelForCausalLM.add_adapter(
            model, adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype
        )
        lora_layer.make_exact(model)
        model.edit_adapters.pop(adapter_name, None)  # of one that PEFT itself deleted
        if peft_config is None:
            begin(model, adapter_name)


def begin(model: EditedModel, adapter_name: str) -> None:
    """Let an adapter that PEFT has just made hold no edit."""
    base, layers = model.get_base_model(), model.alphaedit_config.rewrite_layers or ()
    for layer in layers:
        lora: Any = base.get_submodule(model.architecture.rewrite_name(layer))
        empty = lora_layer.read_factors(lora, adapter_name, 0)
        lora_layer.write_factors(lora, adapter_name, empty)
    make_adapter(model, adapter_name, Journal.empty(empty.B.shape[0]))


def load_adapter(
    model: Any,
    model_id: str | Path,
    adapter_name: str,
    is_trainable: bool,
    torch_device: str | None,
    *,
    allow_base_mismatch: bool,
    missing_parents: str,
    **kwargs: Any,
) -> Any:
    """Load an adapter beside the others; see :meth:`AlphaEditModel.load_adapter`."""
    require_path(model_id)
    require_name(adapter_name)
    lora_layer.require_layers(model.get_base_model())
    if not kwargs.get("subfolder") and Path(model_id).is_dir():
        model_id = own_folder(Path(model_id))
    where = {key: kwargs[key] for key in kwargs.keys() & {"revision", "token", "subfolder"}}
    pack = None
    with suppress(FileNotFoundError):  # a LoRA without sidecar, or what PEFT refuses
        pack = EditPack.from_pretrained(model_id, **where)
    require_top(model, adapter_name)
    base = model.get_base_model()
    if pack is not None:
        own = None if allow_base_mismatch else model.base_fingerprint
        check_fit(pack, base, pack.modules, own)
        _require_same_place(base, pack, adapter_name)
        beside = [name for name in model.active_adapters if name != adapter_name]
        require_parents("this pack", pack.parents, missing_parents, model, beside)
    _require_unmerged(model, adapter_name)
    with loaded_or_not(model, adapter_name):
        if pack is not None and adapter_name in model.peft_config:
            _make_room(base, pack, adapter_name)
        if keeps_elsewhere(base):
            model.hf_device_map = {}  # or PEFT would place the base anew
        found = PeftModelForCausalLM.load_adapter(
            model, model_id, adapter_name, is_trainable, torch_device, **kwargs
        )
        lora_layer.make_exact(model)
        lora_layer.require_factors(model, adapter_name)
        model.edit_adapters.pop(adapter_name, None)
        if pack is not None and not is_trainable and edits_same_modules(model, pack):
            for module, delta in pack.factors.items():  # PEFT may have rounded them
                layer: Any = base.get_submodule(module)
                dtype = torch.promote_types(layer.lora_A[adapter_name].weight.dtype, torch.float32)
                lora_layer.write_factors(layer, adapter_name, delta.to(dtype))
            _hold_pack(model, adapter_name, pack, model_id)
    return found


def set_adapter(
    model: Any, adapter_name: str | Sequence[str], inference_mode: bool, missing_parents: str
) -> None:
    """Make adapters active; see :meth:`AlphaEditModel.set_adapter`."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be made active; name one or more of "
            f"{[*model.peft_config]}, each once"
        )
    for i, name in enumerate(names):
        if name in model.edit_adapters:
            parents = model.edit_adapters[name].journal.parents
            require_parents(f"adapter {name!r}", parents, missing_parents, model, names[:i])
    model.active_adapter = names[0]  # PEFT looks up one config by it
    model.base_model.set_adapter(names if len(names) > 1 else names[0], inference_mode)


def delete_adapter(model: Any, adapter_name: str) -> None:
    """Take an adapter out; see :meth:`AlphaEditModel.delete_adapter`."""
    require_top(model, adapter_name)
    left = sorted({*model.peft_config} - {adapter_name})
    if adapter_name not in model.peft_config or not left:
        raise ValueError(
            f"adapter {adapter_name!r} cannot be deleted from {[*model.peft_config]}: one that is "
            "loaded can, if another is left to compute with; unload() gives the base"
        )
    _require_unmerged(model, adapter_name)
    if adapter_name in model.active_adapters:  # PEFT would choose for each layer on its own
        active = [name for name in model.active_adapters if name != adapter_name]
        if not active:
            active = left[:1]
            warnings.warn(
                f"adapter {adapter_name!r} was active; now {active[0]!r} is", stacklevel=3
            )
        for layer in lora_layer.lora_layers(model).values():
            layer.set_adapter(active)
        model.base_model.active_adapter, model.active_adapter = active, active[0]
    PeftModelForCausalLM.delete_adapter(model, adapter_name)
    model.edit_adapters.pop(adapter_name, None)


def require_base(model: object) -> None:
    """Refuse what cannot carry edits: no model, or no bare one, or one without usable weights."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the base model is {shown(model)}; pass a loaded model, such as "
            "AutoModelForCausalLM.from_pretrained(name) gives"
        )
    require_whole(model)
    kind = type(model).__name__
    if any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            f"the weights of this {kind} were made within torch.inference_mode(), so torch neither "
            "differentiates through them nor changes them; load it outside of that, or within "
            "torch.no_grad()"
        )
    if lora_layer.lora_layers(model):
        raise ValueError(
            f"this {kind} carries PEFT adapters already; pass the bare model, "
            "which unload() or merge_and_unload() gives"
        )


def require_name(adapter_name: object) -> None:
    """Refuse, by a ValueError, what torch's modules or a pack's folder cannot be called."""
    named = isinstance(adapter_name, str) and adapter_name
    if not named or any(c in str(adapter_name) for c in "./\\"):
        raise ValueError(
            f"adapter_name={shown(adapter_name)} cannot name an adapter, since modules and a "
            "folder are called by it; use a text without '.', '/' and '\\', such as 'people'"
        )


def edits_same_modules(model: EditedModel, pack: EditPack) -> bool:
    """Whether a pack changes just the model's rewrite modules."""
    layers = model.alphaedit_config.rewrite_layers or ()
    return set(pack.modules) == {model.architecture.rewrite_name(layer) for layer in layers}


def require_path(model_id: object) -> None:
    """Refuse what is neither a path nor a repository's name, by a TypeError."""
    if not isinstance(model_id, str | os.PathLike):
        raise TypeError(
            f"model_id={model_id!r} is a {type(model_id).__name__}; pass the pack's folder as a "
            "str or Path, or the name of a Hub repository"
        )


def _wrap_with_plain_lora(
    wrap: Callable[..., Wrapped],
    base: nn.Module,
    model_id: str | Path,
    where: Mapping[str, Any],
    error: FileNotFoundError,
) -> Wrapped:
    folder = locate(model_id, **where)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise error
    factors, _ = read_steadily(folder, read_lora, PackError)
    for name, delta in factors.items():
        try:
            check_shape(name, delta, base)
        except ValueError as wrong:
            raise PackError(f"{folder}: {wrong}") from None
    lora_config = LoraConfig.from_pretrained(str(folder))
    lora_config.inference_mode = True
    lora_config.target_modules = set(factors)
    model: Any = wrap(base, AlphaEditConfig(), plain_lora=lora_config)
    try:
        found = model.load_adapter(str(folder), model.active_adapters[0])
        if found.missing_keys or found.unexpected_keys:
            raise PackError(f"{folder}: its tensors changed while they were read; load again")
    except BaseException:
        model.unload()
        raise
    warnings.warn(
        f"{model_id} has no sidecar folder 'alphaedit/': it is loaded as a plain LoRA, which "
        "can be used and merged but not edited",
        stacklevel=4,
    )
    return model


def _hold_pack(model: EditedModel, name: str, pack: EditPack, model_id: str | Path) -> None:
    """Hold what a pack knows, for the adapter whose factors are the pack's."""
    contexts = pack.contexts if pack.records else None
    what = (pack.records, pack.targets, pack.rank, contexts)
    made = pack.null_space
    if made is not None:  # earlier versions recorded these settings in the config alone
        made = kind(pack.config.objective).settings_of_rows(pack.config) | made
    take_open(model, pack)
    own = pack.config if pack.records else None
    journal = Journal(*what, made, pack.parents, pack.decisions, own)
    here = Path(model_id)
    source = own_folder(here).resolve().name if here.is_dir() else str(model_id)
    make_adapter(model, name, journal, source=source, compression=pack.compression)


def take_open(model: EditedModel, pack: EditPack) -> None:
    """Let what a pack's rows are made with hold for the model, where that is still open."""
    config, chosen = model.alphaedit_config, kind(pack.config.objective)
    if pack.rank and kind(config.objective) is chosen:
        for name, value in chosen.settings_of_rows(pack.config).items():
            if getattr(config, name) is None:
                setattr(config, name, value)


def _require_unmerged(model: EditedModel, adapter_name: str) -> None:
    layers = lora_layer.lora_layers(model.get_base_model()).values()
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base weights, which would go on holding "
            "it; call unmerge() first"
        )


def _require_same_place(base: nn.Module, pack: EditPack, adapter_name: str) -> None:
    layers = lora_layer.lora_layers(base)
    there = sorted(name for name, layer in layers.items() if adapter_name in layer.lora_A)
    if there and there != sorted(pack.modules):
        raise ValueError(
            f"adapter {adapter_name!r} changes {there} and this pack {list(pack.modules)}; "
            f"load it under another name, or call delete_adapter({adapter_name!r}) first"
        )


def _make_room(base: nn.Module, pack: EditPack, adapter_name: str) -> None:
    """Give an adapter that is replaced the rank of the pack, since PEFT loads no other."""
    for name in pack.modules:
        layer: Any = base.get_submodule(name)
        old = lora_layer.read_factors(layer, adapter_name, 0)
        rank = max(1, pack.rank)
        A, B = old.A.new_zeros(rank, old.A.shape[1]), old.B.new_zeros(old.B.shape[0], rank)
        lora_layer.write_factors(layer, adapter_name, LowRankDelta(A, B))

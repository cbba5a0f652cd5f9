"""Merging: edits into the base weights and out again, exactly, and for good.

In: a model with edits in its adapters. Out: the same model computing from merged weights, the base
with its original bits, or a plain model that holds the edits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModelForCausalLM
from torch import nn

from alphaedit_peft.messages import shown
from alphaedit_peft.model.lora_layer import (
    ExactLinear,
    lora_layers,
    make_exact,
    merge_again,
    merges,
    refuse_merge,
    require_layers,
    require_plain,
)

LOSS = 0.1  # of an update, rounded away: above it merging warns


def merge(model: Any, *, safe_merge: bool) -> None:
    """Add the active adapters to the base weights; see :meth:`AlphaEditModel.merge`."""
    names = model.active_adapters
    _warn_of_loss(model, names)
    layers = lora_layers(model).values()
    todo = [
        name
        for name in names
        if not all(name in layer.merged_adapters for layer in layers if name in layer.lora_A)
    ]
    if todo:
        model.base_model.merge_adapter(adapter_names=todo, safe_merge=safe_merge)


def merge_errors(model: Any, adapter_names: Sequence[str]) -> dict[str, float]:
    """By module, what rounding loses; see :meth:`AlphaEditModel.merge_errors`."""
    _require_mergeable(model, adapter_names)
    layers = lora_layers(model.get_base_model())
    return {where: layer.rounding_error(adapter_names) for where, layer in layers.items()}


def merge_adapter(model: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Merge adapters by name; see :meth:`AlphaEditModel.merge_adapter`."""
    _require_mergeable(model, adapter_names or model.active_adapters)
    model.base_model.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)


def merge_and_unload(
    model: Any, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None
) -> nn.Module:
    """The merged base alone; see :meth:`AlphaEditModel.merge_and_unload`."""
    _warn_of_loss(model, adapter_names or model.active_adapters)
    unmerge(model)
    found: nn.Module = model.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
    return _trained_as_before(model, found)


def unload(model: Any) -> nn.Module:
    """The base model as it was; see :meth:`AlphaEditModel.unload`."""
    unmerge(model)
    return _trained_as_before(model, model.base_model.unload())


def unmerge(model: Any) -> None:
    """Give the base weights their original bits back."""
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.unmerge()


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Compute with the base alone; see :meth:`AlphaEditModel.disable_adapter`."""
    merged, active = merges(model), list(model.active_adapters)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    unmerge(model)
    try:
        with PeftModelForCausalLM.disable_adapter(model):
            yield
    finally:
        for parameter, flag in flags:  # PEFT switches training on for adapters it enables
            parameter.requires_grad_(flag)
        if model.active_adapters == active:  # set_adapter unmerges, for the adapters it names
            merge_again(merged)


def _trained_as_before(model: Any, base: nn.Module) -> nn.Module:
    """Let those parameters require a gradient that PEFT froze when it wrapped the base."""
    for name, weight in base.named_parameters():
        weight.requires_grad_(weight.requires_grad or name in model.trained_before)
    return base


def _require_mergeable(model: Any, adapters: Sequence[str]) -> None:
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown:
        raise ValueError(
            f"adapters {shown(unknown)} are not loaded, so they cannot be merged; this model has "
            f"{[*model.peft_config]}"
        )
    make_exact(model)
    for layer in require_layers(model).values():
        if isinstance(layer, ExactLinear):
            require_plain(layer, adapters)
        else:
            refuse_merge(layer)


def _warn_of_loss(model: Any, adapters: Sequence[str]) -> None:
    errors = merge_errors(model, adapters)
    where, error = max(errors.items(), key=lambda item: item[1])
    if error > LOSS:
        layer: Any = model.get_base_model().get_submodule(where)
        dtype = str(layer.get_base_layer().weight.dtype).removeprefix("torch.")
        warnings.warn(
            f"merging into {dtype} changes the update of {where} by {error:.0%}, since it is "
            "small beside the weights it is rounded with; use the model unmerged, or load the "
            "base in float32",
            stacklevel=4,
        )

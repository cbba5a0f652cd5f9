"""Whether a pack belongs to the model at hand, found out before that model is touched.

In: a pack or the factors of a plain LoRA, and a base model. Out: nothing, or a sentence: another
base, missing modules, other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.fingerprint import BaseFingerprint, fingerprint, require_same_base
from alphaedit_peft.pack import EditPack, PackError


def check_fit(pack: EditPack, model: nn.Module, allow_base_mismatch: bool) -> None:
    """Refuse a pack that does not fit a bare model.

    Args:
        pack: the pack to load.
        model: the bare base model.
        allow_base_mismatch: whether another base of the same shapes will do.

    Raises:
        ValueError: another base, modules the pack lacks, or other shapes.
    """
    config, architecture = pack.config.resolve(model)
    layers = config.rewrite_layers or []
    if pack.base is not None and not allow_base_mismatch:
        require_same_base(pack.base, fingerprint(model, max(layers), architecture), "this pack")
    for layer in layers:
        name = architecture.rewrite_name(layer)
        if name not in pack.factors:
            raise ValueError(f"this pack has no factors for {name}; it edits {pack.modules}")
        _check_shape(name, pack.factors[name], model)


def check_beside(
    pack: EditPack, model: nn.Module, own: BaseFingerprint, allow_base_mismatch: bool
) -> None:
    """Refuse a pack that does not fit a model which carries other adapters already.

    Args:
        pack: the pack to load.
        model: the base model; LoRA layers may stand in it.
        own: its fingerprint, taken while it was bare.
        allow_base_mismatch: whether another base of the same shapes will do.

    Raises:
        ValueError: another base, or other shapes.
    """
    if pack.base is not None and not allow_base_mismatch:
        require_same_base(pack.base, own, "this pack")
    for name, delta in pack.factors.items():
        _check_shape(name, delta, model)


def check_plain(factors: Mapping[str, LowRankDelta], model: nn.Module, folder: Path) -> None:
    """Refuse a plain LoRA that does not fit a bare model.

    Args:
        factors: by full module name.
        model: the bare base model.
        folder: where they come from, for the message.

    Raises:
        PackError: a module that the model lacks, or one of another shape.
    """
    for name, delta in factors.items():
        try:
            _check_shape(name, delta, model)
        except ValueError as error:
            raise PackError(f"{folder}: {error}") from None


def _check_shape(name: str, delta: LowRankDelta, model: nn.Module) -> None:
    wanted = (delta.B.shape[0], delta.A.shape[1])
    module = _find(name, model)
    weight: Any = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(
            f"this adapter changes {name}, which this {type(model).__name__} has not; load it "
            "onto the base model it was made for"
        )
    shape = tuple(weight.shape)[::-1] if isinstance(module, Conv1D) else tuple(weight.shape)
    if weight.is_floating_point() and shape != wanted:
        raise ValueError(
            f"this pack changes {name} of shape {wanted}, and this model's is {shape}; load "
            "it onto the base model it was made for"
        )


def _find(name: str, model: nn.Module) -> Any:
    """The module of that name, without a LoRA layer around it; None where there is none."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        return None
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module

"""Whether a pack belongs to the model at hand, found out before that model is touched.

In: a pack and a bare base model. Out: nothing, or a sentence: another base, missing modules, other
shapes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from alphaedit_peft.fingerprint import fingerprint, require_same_base
from alphaedit_peft.pack import EditPack


def check_fit(pack: EditPack, model: nn.Module, allow_base_mismatch: bool) -> None:
    """Refuse a pack that does not fit a model.

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
        weight: Any = model.get_submodule(name).weight
        delta = pack.factors[name]
        wanted = (delta.B.shape[0], delta.A.shape[1])
        shape = tuple(weight.shape)[::-1] if architecture.conv1d else tuple(weight.shape)
        if weight.is_floating_point() and shape != wanted:
            raise ValueError(
                f"this pack changes {name} of shape {wanted}, and this model's is {shape}; load "
                "it onto the base model it was made for"
            )

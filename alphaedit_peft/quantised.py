"""Gradients through quantised bases: bitsandbytes' 4-bit layers, on the CPU.

In: a model. Out: the same model for the length of a ``with`` block, on kernels that give gradients.
Where a processor has AVX512-BF16, bitsandbytes (0.50) repacks 4-bit weights at their first use for
a kernel that autograd does not see, so that whatever is optimised through it stays where it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SWITCH = "support_avx512bf16_for_cpu"


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers off bitsandbytes' packed CPU kernel, which has no gradient.

    Weights that are packed already are unpacked for the while, and get their packed bits back; any
    other model is left alone.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, SWITCH, False)]
    kept: list[tuple[Any, Any, dict[str, Any]]] = []
    try:
        for layer in layers:
            setattr(layer, SWITCH, False)
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                kept.append((layer, layer.weight.data, dict(vars(state))))
                _unpack(layer)
        yield
    finally:
        for layer, data, values in kept:
            layer.weight.data = data
            vars(layer.weight.quant_state).clear()
            vars(layer.weight.quant_state).update(values)
        for layer in layers:
            setattr(layer, SWITCH, True)


def _unpack(layer: Any) -> None:
    layer.state_dict()  # bitsandbytes unpacks what it saves, in place
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:  # but leaves scales that were not quantised transposed
        state.absmax = state.absmax.T.reshape(-1).float()

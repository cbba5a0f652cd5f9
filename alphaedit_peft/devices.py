"""Where a model's weights are: on a device, kept elsewhere by accelerate, packed, or split up.

In: a model, or one of its modules. Out: the device it computes on and its weights, wherever they
are kept; or a sentence that refuses weights of which this process holds only a part. Accelerate
leaves an empty weight ("meta") in place of one that it keeps in CPU memory or on disk, and brings
it in for the module's own forward; hooks of type ``AlignDevicesHook`` know where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

SWITCH = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit layers


def computes_on(module: nn.Module) -> torch.device:
    """The device that a module's own weights are on when it runs; the CPU where it has none."""
    weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    device = weights[0].device if weights else torch.device("cpu")
    if device.type != "meta":
        return device
    hook = _offloading(module)
    where = None if hook is None else hook.execution_device
    return torch.device("cpu" if where is None else where)


def supports_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, as solves do; Apple's GPUs do not."""
    return device.type != "mps"


def solving_on(device: torch.device) -> torch.device:
    """Where values of a device are solved with: there, or on the CPU if it lacks float64."""
    return device if supports_float64(device) else torch.device("cpu")


def for_solving(values: Tensor) -> Tensor:
    """Values where they can be made float64: what leaves a model for a solve goes through here."""
    return values.to(solving_on(values.device))


def reads_ids_on(model: Any) -> torch.device:
    """Where token ids go: the device of a model's input embeddings, or of any parameter.

    An offloaded embedding has no device of its own: accelerate moves the ids from the CPU then.
    """
    find = getattr(model, "get_input_embeddings", None)
    weight = find().weight if find else next(model.parameters(), torch.empty(0))
    return torch.device("cpu") if weight.is_meta else weight.device


def held(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, such as ``weight``, with its values, detached.

    It is a copy on the CPU where accelerate keeps it elsewhere, and an empty one ("meta") where
    nothing knows its values.
    """
    parameter: Tensor = getattr(module, name).detach()
    hook = _offloading(module)
    if not parameter.is_meta or hook is None:
        return parameter
    kept: Tensor = hook.weights_map[name]
    return kept.detach().to(parameter.dtype)


def held_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters, as ``named_parameters`` and ``held``."""
    for name, _ in model.named_parameters():
        owner, _, own = name.rpartition(".")
        yield name, held(model.get_submodule(owner), own)


def keeps_elsewhere(model: nn.Module) -> bool:
    """Whether some of a model's weights are brought in only when they are needed."""
    return any(parameter.is_meta for parameter in model.parameters())


def has_no_weights(model: nn.Module) -> bool:
    """Whether a model was made on the meta device: nothing brings in what its weights are."""
    return keeps_elsewhere(model) and not any(map(_offloading, model.modules()))


def brings_to_gpu(model: nn.Module) -> bool:
    """Whether each pass brings weights over to a GPU, which takes as long as thousands of tokens.

    Weights that are brought in to be used on the CPU take a few hundred there at most.
    """
    kept = (m for m in model.modules() if any(p.is_meta for p in m.parameters(recurse=False)))
    return any(computes_on(module).type != "cpu" for module in kept)


@contextmanager
def in_place(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights on its device; what the block changes in them stays.

    Weights that accelerate keeps elsewhere go back to CPU memory, also those that were on disk: the
    files there stay the base's.
    """
    hook = _offloading(module)
    weights = dict(module.named_parameters(recurse=False))
    if hook is None or not any(weight.is_meta for weight in weights.values()):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
        hook.weights_map = {name: held(module, name).cpu().clone() for name in weights}
    finally:
        hook.post_forward(module, torch.empty(0))


def require_whole(model: nn.Module) -> None:
    """Refuse, by a ValueError, a model without weights, or one split by FSDP or parallelism."""
    kind = type(model).__name__
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"the base model is wrapped in {kind}, whose module is what can be edited; pass "
            "model.module, and let each process have all of it"
        )
    if has_no_weights(model):
        raise ValueError(
            f'{kind} has no weights: it was made on the device "meta", where parameters are shapes '
            "alone; load it with from_pretrained, or give it weights first (to_empty, then "
            "load_state_dict)"
        )
    split = _how_split(model)
    if split is not None:
        raise ValueError(
            f"{kind} is split among processes by {split}, and editing reads and writes whole "
            'matrices; load it with device_map="auto", which spreads whole layers over the devices '
            "of one process, or whole in every process (accelerate launch)"
        )


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


def _how_split(model: nn.Module) -> str | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules()):
        return "FSDP"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return "tensor parallelism"
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            return f"FSDP or tensor parallelism ({name} is a DTensor)"
    return None


def _offloading(module: nn.Module) -> Any:
    """The hook that brings a module's own weights in; None where they stay in place."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return None
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def _unpack(layer: Any) -> None:
    layer.state_dict()  # bitsandbytes unpacks what it saves, in place
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:  # but leaves scales that were not quantised transposed
        state.absmax = state.absmax.T.reshape(-1).float()

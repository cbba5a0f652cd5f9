"""An adapter in a model: PEFT's own LoRA layers, grown in place, read back, and merged exactly.

In: a LoRA layer and factors A (n, d_in), B (d_out, n). Out: the same layer with rank n at scaling
1. PEFT's unmerge subtracts what it added, which leaves rounding behind; :class:`ExactLinear` keeps
the original weight while merged and puts its bits back, also when PEFT unmerges by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.devices import computes_on, for_solving, held, in_place
from alphaedit_peft.messages import shown

ROUNDED = (torch.bfloat16, torch.float16)
_NUMBERS = ("r", "lora_alpha", "scaling")


class ExactLinear(lora.Linear):
    """A LoRA layer whose merge rounds once and whose unmerge restores the original bits."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters, or the active ones, to the base weight: summed, then rounded once.

        Raises:
            ValueError: a result that is not finite, under ``safe_merge``.
            RuntimeError: an adapter that is more than plain LoRA.
        """
        asked = check_adapters_to_merge(self, adapter_names)
        names = [name for name in asked if name in self.lora_A]
        if not names:
            return
        require_plain(self, names)
        base: Any = self.get_base_layer()
        together = [*self.merged_adapters, *names]
        with in_place(base):
            if not self.merged:
                self.original: Tensor = base.weight.detach().clone()
            exact = self._sum(self.original, together)
            if safe_merge and not torch.isfinite(exact).all():
                raise ValueError(
                    f"merging adapters {together} gives NaN or infinity; look at the pack"
                )
            base.weight.data.copy_(exact)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit; nothing to do where nothing is merged."""
        if self.merged:
            base: Any = self.get_base_layer()
            with in_place(base):
                base.weight.data.copy_(self.original)
            self.merged_adapters.clear()
            del self.original

    @torch.no_grad()
    def rounding_error(self, adapters: Iterable[str]) -> float:
        """How far merging misses the update D: |round(W + D) - W - D| / |D|, 0 where D is 0.

        Adapters without factors in this layer do not count.
        """
        names = [name for name in adapters if name in self.lora_A]
        base: Any = self.get_base_layer()
        weight = self.original if self.merged else held(base, "weight")
        rounded = self._sum(weight, names).to(weight.dtype)
        wide = torch.float32 if weight.element_size() < 4 else torch.float64
        weight, rounded = for_solving(weight), for_solving(rounded)
        update = sum(for_solving(self.get_delta_weight(name)).to(wide) for name in names)
        if isinstance(update, int) or not update.any():
            return 0.0
        return float((rounded.to(wide) - weight.to(wide) - update).norm() / update.norm())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactLinear:
        """Move or cast as ``nn.Module`` does, but never round factors below float32.

        So ``model.to(torch.bfloat16)`` and ``model.half()`` cast the base alone, as loading onto
        such a base does.
        """
        linears: list[Any] = [*self.lora_A.values(), *self.lora_B.values()]
        before: list[Tensor] = [linear.weight.detach() for linear in linears]
        super()._apply(fn, recurse)
        for linear, exact in zip(linears, before, strict=True):
            weight = linear.weight
            if weight.dtype in ROUNDED and exact.dtype not in ROUNDED:
                linear.weight = nn.Parameter(exact.to(weight.device), weight.requires_grad)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As in PEFT, but to where the base computes if its weight is kept elsewhere."""
        base: Any = self.get_base_layer()
        where = computes_on(base) if device is None and base.weight.is_meta else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, where)

    def _sum(self, weight: Tensor, adapters: Iterable[str]) -> Tensor:
        """W + D in float32 or better."""
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in adapters:
            exact = exact + self.get_delta_weight(name).to(exact)
        return exact


def make_exact(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into an :class:`ExactLinear`, in place.

    Others, such as those of quantised weights, refuse to be merged.
    """
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = ExactLinear
        elif isinstance(module, lora.LoraLayer) and not isinstance(module, ExactLinear):
            layer: Any = module
            layer.merge = partial(refuse_merge, layer)  # PEFT's own calls end here too


def merges(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Every LoRA layer with the adapters that are merged in it, for ``merge_again``."""
    return [(layer, list(layer.merged_adapters)) for layer in lora_layers(model).values()]


def merge_again(before: list[tuple[Any, list[str]]]) -> None:
    """Merge what was merged, by what ``merges`` gave ``before``, where nothing is any more."""
    for layer, names in before:
        if names and not layer.merged:
            layer.merge(adapter_names=names)


def require_placed(model: Any, names: Iterable[str]) -> None:
    """Refuse, and unload, a model where PEFT put a LoRA elsewhere than on the named modules.

    In some families with experts it renames ``target_modules`` that end as their experts' did once,
    and a shared expert's end so too.
    """
    missing = [n for n in names if n not in lora_layers(model.get_base_model())]
    if missing:
        elsewhere = [n for n in lora_layers(model.get_base_model()) if n not in missing]
        model.unload()
        raise ValueError(
            f"PEFT puts the LoRA of {missing[0]} on {shown(elsewhere)} instead, as it renames "
            "targets of models with experts; this model cannot be edited yet"
        )


def require_factors(model: nn.Module, adapter: str) -> None:
    """Refuse an adapter whose factors PEFT left empty, as it does beside weights kept elsewhere."""
    for name, layer in lora_layers(model).items():
        if adapter in layer.lora_A and layer.lora_A[adapter].weight.is_meta:
            raise ValueError(
                f"adapter {adapter!r} changes {name}, whose weight is kept in CPU memory or on "
                "disk until it is needed, so PEFT cannot load factors beside it; load the base "
                "onto devices alone, or merge this adapter into it first"
            )


def refuse_merge(layer: Any, *_: Any, **__: Any) -> NoReturn:
    """What a layer that cannot be merged exactly does instead: a RuntimeError that says why."""
    kind = type(layer.get_base_layer()).__name__
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is not None and not weight.is_floating_point():
        raise RuntimeError(
            f"a {kind} cannot be merged into: its quantised weight would round the edits to its "
            "few bits; use the model unmerged, or load the base in bfloat16 and merge there"
        )
    raise RuntimeError(
        f"a {kind} cannot be merged into exactly, only linear layers can; use the model unmerged, "
        "or load the adapter with peft.PeftModel.from_pretrained to merge it"
    )


def require_plain(layer: Any, adapters: Iterable[str]) -> None:
    """Refuse, by a RuntimeError, to merge what adds more to a layer than (alpha / r) B A."""
    for name in adapters:
        more = "has a LoRA bias" if layer.lora_bias.get(name, False) else ""
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            more = f"is a DoRA or another variant of LoRA ({variant})"
        if more:
            raise RuntimeError(
                f"adapter {name!r} {more}: only plain LoRA can be merged here exactly; use it "
                "unmerged, or load it with peft.PeftModel.from_pretrained to merge it"
            )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """All LoRA layers of a model, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def require_layers(model: nn.Module) -> dict[str, Any]:
    """As ``lora_layers``, of a model that has some.

    Raises:
        RuntimeError: it has been unloaded.
    """
    found = lora_layers(model)
    if not found:
        raise RuntimeError(
            "this model was unloaded, so it has no adapter any more; wrap its base again with "
            "get_alphaedit_model, or with AlphaEditModel.from_pretrained and a pack"
        )
    return found


def read_factors(layer: Any, adapter: str, rank: int) -> LowRankDelta:
    """The first ``rank`` rows of the factors; none where one zero row stands for no edit."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LowRankDelta(for_solving(A.detach()), for_solving(B.detach())).first(rank)


def write_factors(layer: Any, adapter: str, delta: LowRankDelta) -> None:
    """Put factors into a layer: rank n, scaling 1; without a row, one zero row as LoRA needs."""
    A, B = delta.A, delta.B
    if delta.rank == 0:
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    old = layer.lora_A[adapter].weight
    layer.lora_A[adapter] = _linear(A.to(old.device))
    layer.lora_B[adapter] = _linear(B.to(old.device))
    layer.r[adapter] = layer.lora_alpha[adapter] = A.shape[0]
    layer.scaling[adapter] = 1.0


def remembered(model: nn.Module, adapter: str) -> dict[str, dict[str, Any]]:
    """What an adapter is in each LoRA layer, copied, for ``put_back``; empty where it is not."""
    return {
        name: {
            "A": layer.lora_A[adapter].weight.detach().clone() if adapter in layer.lora_A else None,
            "B": layer.lora_B[adapter].weight.detach().clone() if adapter in layer.lora_B else None,
            **{key: getattr(layer, key).get(adapter) for key in _NUMBERS},
        }
        for name, layer in lora_layers(model).items()
    }


def put_back(model: nn.Module, adapter: str, before: dict[str, dict[str, Any]]) -> None:
    """Undo what loading an adapter did, by what ``remembered`` gave ``before``, new layers too."""
    for name, layer in lora_layers(model).items():
        was = before.get(name, {"A": None})
        if was["A"] is not None:
            layer.lora_A[adapter] = _linear(was["A"])
            layer.lora_B[adapter] = _linear(was["B"])
            for key in _NUMBERS:
                getattr(layer, key)[adapter] = was[key]
        elif adapter in layer._all_available_adapter_names():
            layer.delete_adapter(adapter)
        if name not in before:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def stamp(layer: Any, adapter: str) -> tuple[int, ...]:
    """Numbers that change when a layer's factors do: what a journal is known to belong to.

    They are sums over the factors' bits in float32, the same on every device.
    """
    return tuple(_bit_sum(side[adapter].weight) for side in (layer.lora_A, layer.lora_B))


def place_factors(model: nn.Module) -> None:
    """Put zeros where a new adapter's factors are empty, on the devices they compute on."""
    for layer in lora_layers(model).values():
        for adapter, linear in layer.lora_A.items():
            if linear.weight.is_meta:
                B, where = layer.lora_B[adapter].weight, computes_on(layer.get_base_layer())
                layer.lora_A[adapter] = _linear(torch.zeros_like(linear.weight, device=where))
                layer.lora_B[adapter] = _linear(torch.zeros_like(B, device=where))


def _bit_sum(weight: Tensor) -> int:
    bits = weight.detach().float().contiguous().view(torch.int32)
    rows = bits.sum(1, dtype=torch.int64)  # overflow wraps round, always alike
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear

"""The live adapter: PEFT's own LoRA layers, grown in place, read back, and merged exactly.

In: a LoRA layer and factors A (n, d_in), B (d_out, n). Out: the same layer with rank n at scaling
1. PEFT's unmerge subtracts what it added, which leaves rounding behind; :class:`ExactLinear` keeps
the original weight while merged and puts its bits back, also when PEFT unmerges by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from alphaedit_peft.algebra import LowRankDelta


class ExactLinear(lora.Linear):
    """A LoRA layer whose merge rounds once and whose unmerge restores the original bits."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight: summed in float32 or better, rounded once.

        Args:
            safe_merge: refuse a result that is not finite, as in PEFT.
            adapter_names: which adapters; None: the active ones.

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
        weight: Tensor = base.weight
        if not self.merged:
            self.original: Tensor = weight.detach().clone()
        together = [*self.merged_adapters, *names]
        exact = self.original.to(torch.promote_types(weight.dtype, torch.float32))
        for name in together:
            exact = exact + self.get_delta_weight(name).to(exact)
        if safe_merge and not torch.isfinite(exact).all():
            raise ValueError(f"merging adapters {together} gives NaN or infinity; look at the pack")
        weight.data.copy_(exact)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit; nothing to do where nothing is merged."""
        if self.merged:
            base: Any = self.get_base_layer()
            base.weight.data.copy_(self.original)
            self.merged_adapters.clear()
            del self.original


def make_exact(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into an :class:`ExactLinear`, in place."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = ExactLinear


def require_plain(layer: Any, adapters: Iterable[str]) -> None:
    """Refuse to merge adapters that add more to a layer than (alpha / r) B A.

    Raises:
        RuntimeError: a DoRA or another variant, or a LoRA bias; says which adapter.
    """
    for name in adapters:
        more = None
        if name in layer.lora_variant:
            more = (
                f"is a DoRA or another variant of LoRA ({type(layer.lora_variant[name]).__name__})"
            )
        elif layer.lora_bias.get(name, False):
            more = "has a LoRA bias"
        if more:
            raise RuntimeError(
                f"adapter {name!r} {more}: only plain LoRA can be merged here exactly; use it "
                "unmerged, or load it with peft.PeftModel.from_pretrained to merge it"
            )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """All LoRA layers of a model, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def read_factors(layer: Any, adapter: str, rank: int) -> LowRankDelta:
    """The first ``rank`` rows of the factors; none where one zero row stands for no edit."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LowRankDelta(A.detach(), B.detach()).first(rank)


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


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear

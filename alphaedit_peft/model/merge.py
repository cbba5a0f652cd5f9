"""Merging as methods of a model: into the weights and out again, exactly, and for good.

In: a model with edits in its adapters. Out: the same model computing from merged weights, the base
with its original bits, or a plain model that holds the edits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.edit import EditableModel

LOSS = 0.1  # of an update, rounded away: above it merging warns


class MergeableModel(EditableModel):
    """The merging half of :class:`~alphaedit_peft.model.AlphaEditModel`."""

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
        self._require_mergeable(self.active_adapters)
        self._warn_of_loss(self.active_adapters)
        layers = lora_layer.lora_layers(self).values()
        todo = [name for name in self.active_adapters if not _is_merged(name, layers)]
        if todo:
            self.base_model.merge_adapter(adapter_names=todo, safe_merge=safe_merge)

    def merge_errors(self, adapter_names: list[str] | None = None) -> dict[str, float]:
        """How far merging misses the update D, by module: |round(W + D) - W - D| / |D|.

        About 2e-3 |W + D| / |D| in bfloat16, an eighth of that in float16, 1e-7 in float32: few
        edits in a large matrix lose most. The unmerged adapter loses nothing.

        Args:
            adapter_names: which adapters, merged together; None: the active ones.

        Raises:
            RuntimeError: as ``merge``.
        """
        names = adapter_names or self.active_adapters
        self._require_mergeable(names)
        layers = lora_layer.lora_layers(self.get_base_model())
        return {where: layer.rounding_error(names) for where, layer in layers.items()}

    def unmerge(self) -> None:
        """Take the edits out of the base weights, which get their original bits back."""
        for layer in lora_layer.lora_layers(self).values():
            if layer.merged:
                layer.unmerge()

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's name for ``merge``, of several adapters if asked; as exact, all layers or none.

        Raises:
            RuntimeError: as ``merge``.
        """
        self._require_mergeable(adapter_names or self.active_adapters)
        self.base_model.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with the edits in its weights, and no adapter; for deployment.

        Raises:
            RuntimeError: as ``merge``.

        Warns:
            UserWarning: as ``merge``.
        """
        self._require_mergeable(adapter_names or self.active_adapters)
        self._warn_of_loss(adapter_names or self.active_adapters)
        self.unmerge()
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was before it was wrapped, with its original bits."""
        self.unmerge()
        return self.base_model.unload()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute with the base alone inside the ``with`` block; a merge is set aside exactly."""
        merged = [(m, list(m.merged_adapters)) for m in lora_layer.lora_layers(self).values()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.unmerge()
        try:
            with super().disable_adapter():
                yield
        finally:
            for parameter, flag in flags:  # PEFT switches training on for adapters it enables
                parameter.requires_grad_(flag)
            for layer, names in merged:
                if names:
                    layer.merge(adapter_names=names)

    def _require_mergeable(self, adapters: list[str]) -> None:
        lora_layer.make_exact(self)
        for layer in lora_layer.lora_layers(self).values():
            if isinstance(layer, lora_layer.ExactLinear):
                lora_layer.require_plain(layer, adapters)
            else:
                lora_layer.refuse_merge(layer)

    def _warn_of_loss(self, adapters: list[str]) -> None:
        where, error = max(self.merge_errors(adapters).items(), key=lambda item: item[1])
        if error > LOSS:
            layer: Any = self.get_base_model().get_submodule(where)
            dtype = str(layer.get_base_layer().weight.dtype).removeprefix("torch.")
            warnings.warn(
                f"merging into {dtype} changes the update of {where} by {error:.0%}, since it is "
                "small beside the weights it is rounded with; use the model unmerged, or load the "
                "base in float32",
                stacklevel=3,
            )


def _is_merged(adapter: str, layers: Iterable[Any]) -> bool:
    return all(adapter in m.merged_adapters for m in layers if adapter in m.lora_A)

"""Put a model back: after a batch or a load that fails half way, and batches that are taken back.

In: an adapter, and what it was before. Out: the same factors, journal and layers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.state import EditState, Journal, Snapshot
from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.adapter import Adapter, EditedModel


@contextmanager
def all_or_nothing(adapter: Adapter, before: EditState) -> Iterator[None]:
    """Write the factors of ``before`` back if the block does not end, whatever the reason."""
    try:
        yield
    except BaseException:
        for layer, delta in before.factors.items():
            adapter.write(layer, delta)
        raise


@contextmanager
def loaded_or_not(model: EditedModel, adapter_name: str) -> Iterator[None]:
    """Put an adapter back as it was, or take it out, if the block that loads it does not end."""
    base = model.get_base_model()
    before, merged = lora_layer.remembered(base, adapter_name), lora_layer.merges(base)
    config: Any = model.peft_config.get(adapter_name)
    rank, known = None if config is None else config.r, model.edit_adapters.get(adapter_name)
    try:
        yield
    except BaseException:
        lora_layer.put_back(base, adapter_name, before)
        lora_layer.merge_again(merged)
        if config is None:
            model.peft_config.pop(adapter_name, None)
        else:
            model.peft_config[adapter_name], config.r = config, rank
        if known is not None:
            model.edit_adapters[adapter_name] = known
        raise


def remember(adapter: Adapter, journal: Journal, before: EditState, depth: int) -> None:
    """Keep what a batch can be taken back with, of the last ``depth`` batches."""
    factors = {layer: delta.B for layer, delta in before.factors.items()}
    adapter.snapshots.append(Snapshot(journal, factors))
    del adapter.snapshots[: max(0, len(adapter.snapshots) - depth)]


def take_back(adapter: Adapter, batches: int) -> bool:
    """Take back the last batches if they are all remembered; whether they were."""
    if batches > len(adapter.snapshots):
        return False
    for _ in range(batches):
        snapshot = adapter.snapshots.pop()
    for layer, delta in adapter.factors.items():
        B = snapshot.B[layer].to(delta.B.device)
        adapter.write(layer, LowRankDelta(delta.A[: snapshot.journal.rank], B))
    adapter.keep(snapshot.journal)
    return True

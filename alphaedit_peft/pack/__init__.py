"""Edit packs on disk: a standard LoRA folder with a sidecar that remembers the edits.

The public names are imported when they are first used: what needs no model needs no PEFT either.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphaedit_peft.pack.edit_record import EditRecord
    from alphaedit_peft.pack.format import PackError, read_plain_lora
    from alphaedit_peft.pack.pack import EditPack

__all__ = ["EditPack", "EditRecord", "PackError", "read_plain_lora"]
_HOMES = {
    "EditPack": "pack",
    "EditRecord": "edit_record",
    "PackError": "format",
    "read_plain_lora": "format",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

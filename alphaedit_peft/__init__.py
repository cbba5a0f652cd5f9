"""Edit what a language model knows, and keep the edits as a PEFT-style LoRA pack.

The public names are imported when they are first used; importing the package does nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphaedit_peft.config import AlphaEditConfig
    from alphaedit_peft.editing.edit_report import EditReport
    from alphaedit_peft.edits import Edit, read_edits, write_edits
    from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
    from alphaedit_peft.nullspace import KeyMoments, NullSpace
    from alphaedit_peft.pack import EditPack, PackError

__version__ = "0.1.0"
__all__ = [
    "AlphaEditConfig",
    "AlphaEditModel",
    "Edit",
    "EditPack",
    "EditReport",
    "KeyMoments",
    "NullSpace",
    "PackError",
    "get_alphaedit_model",
    "read_edits",
    "write_edits",
]

_HOMES = {
    "AlphaEditConfig": "config",
    "AlphaEditModel": "model",
    "Edit": "edits",
    "EditPack": "pack",
    "EditReport": "editing.edit_report",
    "KeyMoments": "nullspace",
    "NullSpace": "nullspace",
    "PackError": "pack",
    "get_alphaedit_model": "model",
    "read_edits": "edits",
    "write_edits": "edits",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

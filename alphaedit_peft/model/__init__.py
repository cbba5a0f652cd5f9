"""The edited model: PEFT's LoRA layers, and the edits that are in them.

``wrapper`` has :func:`get_alphaedit_model` and :class:`AlphaEditModel`. Below it, one concern a
module: ``editable`` makes edits and takes them back, ``joining`` and ``several`` put packs together
and beside each other, ``merging`` writes into the base and restores it, ``saving`` makes packs.
``adapter`` holds the state that they share; ``live`` is the LoRA layer itself.
"""

from alphaedit_peft.model.join_packs import JoinReport
from alphaedit_peft.model.model import AlphaEditModel, get_alphaedit_model

__all__ = ["AlphaEditModel", "JoinReport", "get_alphaedit_model"]

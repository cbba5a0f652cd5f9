"""The edited model: PEFT's LoRA layers, and the edits that are in them.

``model`` has :func:`get_alphaedit_model` and :class:`AlphaEditModel`, a thin face whose methods
call verbs: ``edit`` makes edits and takes them back (``prepare`` gives it what it works with),
``load`` and ``stack`` put packs beside and on top of each other, ``join_packs`` puts them together,
``merge`` writes into the base and restores it. ``adapter`` holds what belongs to one adapter, and
``lora_layer`` is PEFT's layer, grown and merged exactly.
"""

from alphaedit_peft.model.join_packs import JoinReport
from alphaedit_peft.model.model import AlphaEditModel, get_alphaedit_model

__all__ = ["AlphaEditModel", "JoinReport", "get_alphaedit_model"]

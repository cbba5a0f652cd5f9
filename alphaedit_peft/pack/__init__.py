"""Edit packs on disk: a standard LoRA folder with a sidecar that remembers the edits."""

from alphaedit_peft.pack.format import PackError
from alphaedit_peft.pack.lora import read_plain_lora
from alphaedit_peft.pack.pack import EditPack
from alphaedit_peft.pack.record import EditRecord

__all__ = ["EditPack", "EditRecord", "PackError", "read_plain_lora"]

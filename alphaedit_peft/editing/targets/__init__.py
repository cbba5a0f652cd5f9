"""The search for z, the hidden state that makes the model say the target: groups in, z out.

Section 2.2 of the paper, Eq. 16 of MEMIT. ``search`` holds the loop and ``loss`` what it descends;
``continuation`` runs once what z cannot reach, and the rest at each step; ``autocast`` is autocast.
"""

from alphaedit_peft.editing.targets.search import Targets, optimise_targets

__all__ = ["Targets", "optimise_targets"]

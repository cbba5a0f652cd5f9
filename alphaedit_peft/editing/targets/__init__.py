"""The search for z, the hidden state that makes the model say the target: groups in, z out.

Section 2.2 of the paper, Eq. 16 of MEMIT. ``optimising`` holds the loop and ``rows`` what it reads;
``before`` runs once what z cannot reach, ``suffixes`` the rest at each step, ``resume`` whole rows
where a model's cache does not continue; ``autocast`` is autocast.
"""

from alphaedit_peft.editing.targets.search import Targets, optimise_targets

__all__ = ["Targets", "optimise_targets"]

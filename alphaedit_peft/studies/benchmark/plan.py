"""What a benchmark measures: how many edits, in how many batches, how often, with what beside it.

In: numbers and names. Out: :class:`Plan`, checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphaedit_peft.edits import Edit

OBJECTIVES = ("alphaedit", "memit")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        edits: in a batch.
        batches: one after another, each on top of those before.
        repeats: of everything that is timed, in turn; medians are given.
        objectives: of ``OBJECTIVES``.
        plain_edits: how many of the first batch's edits to make the plain way; 0: none.
        floor: whether to count operations, in an untimed run of the first batch.
        inference: whether to time forward passes with packs of growing rank.

    Raises:
        ValueError: a number below its least, an unknown objective, more plain edits than edits.
    """

    edits: int = 100
    batches: int = 1
    repeats: int = 1
    objectives: tuple[str, ...] = OBJECTIVES
    plain_edits: int = 0
    floor: bool = True
    inference: bool = False

    def __post_init__(self) -> None:
        for name in ("edits", "batches", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        unknown = [name for name in self.objectives if name not in OBJECTIVES]
        if unknown or not self.objectives:
            raise ValueError(f"objectives={self.objectives} must be some of {OBJECTIVES}")
        if not 0 <= self.plain_edits <= self.edits:
            raise ValueError(
                f"plain_edits={self.plain_edits} is outside 0..{self.edits}, the edits of a batch"
            )

    @property
    def needed(self) -> int:
        """How many edits all batches take."""
        return self.edits * self.batches

    def take(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """The first edits, as many as all batches take.

        Raises:
            ValueError: fewer than that.
        """
        if len(edits) < self.needed:
            raise ValueError(
                f"{len(edits)} edits are too few for {self.batches} batches of {self.edits}; give "
                f"{self.needed}, or ask for fewer"
            )
        return tuple(edits[: self.needed])

"""What has been written into a model so far, as one value.

In: the outcome of a batch. Out: :class:`EditState`, which the next batch, a rollback and a repour
begin with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.factoring import KeptFactor
from alphaedit_peft.pack.record import EditRecord


@dataclass(frozen=True)
class EditState:
    """What has been written so far: factors by layer, the journal, and z (n, d) by row.

    ``kept`` are factors of the solve by layer, of these rows or of others: whoever uses them checks
    (``KeptFactor.matching``). No pack holds them.
    """

    factors: Mapping[int, LowRankDelta]
    records: tuple[EditRecord, ...]
    targets: Tensor
    kept: Mapping[int, KeptFactor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """Rows of every ``lora_A``."""
        return self.targets.shape[0]

    @property
    def standing(self) -> tuple[EditRecord, ...]:
        """Records whose row is in force: not superseded."""
        return tuple(r for r in self.records if r.role != "superseded")

    @property
    def protected(self) -> list[bool]:
        """For each row, whether a standing record owns it; later solves keep its output."""
        return protects(self.standing, self.rank)

    @property
    def batches(self) -> list[int]:
        """For each row the batch that made it: the highest among its records, -1 without one."""
        found = [-1] * self.rank
        for record in self.records:
            found[record.row] = max(found[record.row], record.batch)
        return found

    def lost_some(self, members: Sequence[EditRecord]) -> bool:
        """Whether edits that a row's target value was made for are missing among ``members``."""
        row = members[0].row
        made_for = {record.edit.id for record in self.records if record.row == row}
        return made_for != {record.edit.id for record in members}

    @property
    def next_batch(self) -> int:
        """Number of the next batch."""
        return max((record.batch for record in self.records), default=-1) + 1


def protects(records: Sequence[EditRecord], rank: int) -> list[bool]:
    """For each of ``rank`` rows, whether one of the records has it."""
    rows = {record.row for record in records}
    return [row in rows for row in range(rank)]

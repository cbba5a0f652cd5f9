"""What has been written into a model so far, as one value.

In: the outcome of a batch. Out: :class:`EditState`, which the next batch begins with;
:class:`Journal` and :class:`Snapshot`, which a model keeps of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.cholesky import KeptFactor
from alphaedit_peft.pack.edit_record import EditRecord

if TYPE_CHECKING:  # what a page shows of a pack needs no PEFT
    from alphaedit_peft.config import AlphaEditConfig


class _Recorded:
    """What records alone tell."""

    records: tuple[EditRecord, ...]

    @property
    def standing(self) -> tuple[EditRecord, ...]:
        """Records whose row is in force: not superseded."""
        return tuple(r for r in self.records if r.role != "superseded")

    @property
    def born(self) -> dict[int, int]:
        """By row, the batch that made it: the highest among its records."""
        found: dict[int, int] = {}
        for record in self.records:
            found[record.row] = max(found.get(record.row, -1), record.batch)
        return found


@dataclass(frozen=True)
class EditState(_Recorded):
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

    def emptied(self) -> EditState:
        """The same layers without a row."""
        factors = {layer: delta.first(0) for layer, delta in self.factors.items()}
        return EditState(factors, (), self.targets[:0])

    @property
    def batches(self) -> list[int]:
        """For each row the batch that made it, -1 where no record is its own."""
        born = self.born
        return [born.get(row, -1) for row in range(self.rank)]

    @property
    def next_batch(self) -> int:
        """Number of the next batch."""
        return max((record.batch for record in self.records), default=-1) + 1


def protects(records: Sequence[EditRecord], rank: int) -> list[bool]:
    """For each of ``rank`` rows, whether a record has it: later solves keep its output."""
    rows = {record.row for record in records}
    return [row in rows for row in range(rank)]


@dataclass(frozen=True)
class Journal(_Recorded):
    """What an adapter's edits are.

    Args:
        records: in the order made.
        targets: z by row, (rank, d); None where a pack was saved without them.
        rank: rows of every ``lora_A``; 0 in a model without edits.
        contexts: texts put before prompts; None: not sampled yet.
        null_space: provenance of the null space a loaded pack was made with.
        parents: of a loaded pack.
        decisions: what ``auto`` decided at the first edits, as JSON values.
        config: a loaded pack's own, until more is made; None: the model's.
    """

    records: tuple[EditRecord, ...]
    targets: Tensor | None
    rank: int
    contexts: tuple[str, ...] | None
    null_space: dict[str, Any] | None = None
    parents: tuple[dict[str, Any], ...] = ()
    decisions: tuple[dict[str, Any], ...] = ()
    config: AlphaEditConfig | None = None

    @classmethod
    def empty(cls, hidden_size: int) -> Journal:
        """The journal of a model without edits."""
        return cls((), torch.zeros(0, hidden_size, dtype=torch.float32), 0, None)

    def before_batch(self, batch: int) -> list[EditRecord]:
        """Records as they stood before a batch: later edits gone, what they superseded back.

        A row belongs to the latest batch among its edits, so an edit that a later one's row took
        over goes back to the row it had before.
        """
        born = self.born
        left = [record for record in self.records if record.batch < batch]
        latest = {record.edit.question: record.edit.id for record in left}
        places: dict[str, EditRecord] = {}  # id -> the record that stands for it
        for record in sorted(left, key=lambda r: (born[r.row] < batch, born[r.row])):
            places[record.edit.id] = record
        found = []
        for record in left:
            place = places[record.edit.id] is record
            if not place and born[record.row] >= batch:
                continue
            standing = place and latest[record.edit.question] == record.edit.id
            if record.role != "protected":
                record = replace(record, role="own" if standing else "superseded")
            found.append(record)
        return found


@dataclass(frozen=True)
class Snapshot:
    """An adapter before a batch. Rows of A never change, so the B factors and rank suffice."""

    journal: Journal
    B: Mapping[int, Tensor]

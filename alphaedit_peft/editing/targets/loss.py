"""The token rows that a target value is optimised over, and what is read of them.

In: groups of edits that share a key. Out: rows, chunks of groups, and :class:`Reads`, which lays
everything that is read of some rows one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.targets.continuation import Row
from alphaedit_peft.settings import Settings


@dataclass(frozen=True)
class Reads:
    """Everything that is read of some rows, in turn; all (reads,) but ``free``.

    ``rows``: whose read it is, as an index; ``targets``: the token to follow, 0 where none is;
    ``weights``: in the loss; ``free``: which reads have no target.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    free: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Reads:
        """Lay the rows' reads one behind the other."""
        owners: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        free: list[int] = []
        for i, row in enumerate(rows):
            for k in range(len(row.reads)):
                if not row.target:
                    free.append(len(owners))
                owners.append(i)
                targets.append(row.target[k] if row.target else 0)
                weights.append(row.weight / len(row.reads))
        numbers = (owners, targets, free)
        which, wanted, without = (torch.tensor(n, device=device).long() for n in numbers)
        return cls(
            which, wanted, torch.tensor(weights, device=device, dtype=torch.float64), without
        )


def rows_of(group: Group, slot: int, settings: Settings) -> list[Row]:
    """The rows of a group: prompts in every context, the leader's KL row, every anchor once."""
    rows = []
    for member in group.members:
        weight = 1 / (len(group.members) * len(member.rows))
        for row in member.rows:
            reads = tuple(row.target_positions)
            rows.append(Row(slot, row.scoring_ids, row.subject_last, reads, row.target, weight))
    kl = group.leader.kl_row
    rows.append(Row(slot, kl.ids, kl.subject_last, (kl.subject_last,), (), settings.kl_factor))
    asked = {member.rows[0].ids for member in group.members}  # an edit's prompt is no anchor
    anchors = [a for member in group.members for a in member.anchors if a.ids not in asked]
    anchors = list(dict.fromkeys(anchors))
    for anchor in anchors:
        reads = tuple(anchor.target_positions) or (len(anchor.ids) - 1,)
        weight = settings.anchor_factor / len(anchors)
        rows.append(Row(slot, anchor.scoring_ids, anchor.subject_last, reads, (), weight))
    return rows


def chunked(runner: Runner, groups: Sequence[Group]) -> Iterator[list[int]]:
    """Groups with like suffixes together, at most ``target_tokens`` suffix tokens a chunk.

    They are counted as if all rows were padded to the longest, which running them in batches of
    like length keeps below.
    """
    suffixes = [
        [len(row.ids) - row.subject for row in rows_of(group, 0, runner.settings)]
        for group in groups
    ]
    order = sorted(range(len(groups)), key=lambda g: max(suffixes[g]))
    chunk: list[int] = []
    for g in order:
        count = sum(len(suffixes[i]) for i in [*chunk, g])
        if chunk and count * max(suffixes[g]) > runner.target_tokens:
            yield chunk
            chunk = []
        chunk.append(g)
    if chunk:
        yield chunk

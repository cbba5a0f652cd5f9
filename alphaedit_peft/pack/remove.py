"""Take edits out of a pack, from the file alone.

In: a pack and ids of its edits. Out: :class:`Removal`: the pack without them, and how much of each
is still in force. The update is projected onto the rows that stay (``algebra.without_rows``):
what these put out on their stored keys does not change, and what a removed row has in common with
them cannot be told from theirs, so it stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic

from alphaedit_peft import algebra
from alphaedit_peft.pack.contents import Pack, PackContents, require_projected, require_rows
from alphaedit_peft.pack.edit_record import EditRecord, asked, few
from alphaedit_peft.pack.parents import parent_entry

REPOUR = "AlphaEditModel.remove_edits, which writes the others again,"


@dataclass(frozen=True)
class Removal(Generic[Pack]):
    """A pack without some edits, and which part of each, in 0..1, is still in force."""

    pack: Pack
    shares: dict[str, dict[str, float]]  # by id of a removed edit, then module

    def largest(self, name: str) -> float:
        """The largest share of a removed edit, over the modules."""
        return max(self.shares[name].values())


def remove(pack: Pack, ids: Iterable[str], *, max_share: float = 0.5) -> Removal[Pack]:
    """The pack without some edits; see :meth:`EditPack.without`."""
    require_rows(pack.compression, "remove edits from it")
    require_projected(pack, "removed from the file alone", f"use {REPOUR} instead")
    if not 0 <= max_share <= 1:
        raise ValueError(f"max_share={max_share!r} is a share; it must be within 0..1")
    gone = _records_of(pack, ids)
    stay = _staying(pack, gone)
    dropped = sorted({record.row for record in pack.records} - {record.row for record in stay})
    rows = sorted(set(range(pack.rank)).difference(dropped))
    fixed = sorted({record.row for record in stay if record.role != "superseded"})
    factors = {}
    shares: dict[str, dict[str, float]] = {record.edit.id: {} for record in gone}
    for name, delta in pack.factors.items():
        factors[name], inside = algebra.without_rows(delta, rows, fixed, dropped)
        for record in gone:
            shares[record.edit.id][name] = float(inside[dropped.index(record.row)])
    place = {row: i for i, row in enumerate(rows)}
    left = replace(
        pack,
        factors=factors,
        records=tuple(replace(record, row=place[record.row]) for record in stay),
        targets=None if pack.targets is None else pack.targets[rows],
        parents=(*pack.parents, parent_entry("remove", pack)),
        compression=None,
    )
    removal = Removal(left, shares)
    _warn(removal, max_share)
    return removal


def _records_of(pack: PackContents, ids: Iterable[str]) -> list[EditRecord]:
    if isinstance(ids, str):
        raise TypeError(f"ids={ids!r} is one text; pass a list of ids")
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        raise ValueError("ids=[] names no edit; give at least one id")
    own = {record.edit.id: record for record in pack.records if record.role == "own"}
    unknown = [name for name in wanted if name not in own]
    if unknown:
        raise ValueError(f"edit ids {unknown} are not in this pack; it has {few(own)}")
    return [own[name] for name in wanted]


def _staying(pack: PackContents, gone: list[EditRecord]) -> list[EditRecord]:
    """The records that are left: those in force, and superseded ones while their successor stands.

    Raises:
        ValueError: a row that loses some of its edits only.
    """
    names, rows = {record.edit.id for record in gone}, {record.row for record in gone}
    left = [r for r in pack.records if r.role != "superseded"]
    left = [r for r in left if r.role == "protected" or r.edit.id not in names]
    shared = sorted({r.edit.id for r in left if r.row in rows})
    if shared:
        parents = sorted({r.edit.id for r in left if r.row in rows and r.role == "protected"})
        theirs = f"{parents} are a parent's and stay, so use"
        too = theirs if parents else "remove these too, or use"
        raise ValueError(
            f"edits {sorted(names)} share a row with {shared}, since their prompts agree up to the "
            f"subject; a row can only go as a whole: {too} {REPOUR} with the model"
        )
    standing = {asked(record.edit) for record in left}
    kept = [record for record in pack.records if record.row not in rows]
    return [r for r in kept if r.role != "superseded" or asked(r.edit) in standing]


def _warn(removal: Removal[Pack], bound: float) -> None:
    over = {n: share for n in removal.shares if (share := removal.largest(n)) > bound}
    if not over:
        return
    worst = max(over, key=lambda name: over[name])
    warnings.warn(
        f"{len(over)} of {len(removal.shares)} removed edits are still in force by more than "
        f"{bound:.0%} in some layer, {worst!r} by {over[worst]:.0%}: their keys lie close to "
        f"those that stay; {REPOUR} takes them out entirely",
        stacklevel=4,
    )

"""Packs laid beside each other: one list of records and target values, free of conflicts.

In: the edits of an adapter, and packs that are to be poured after them. Out: a :class:`Union`,
whose records can be poured in order. Two edits are in conflict where they contradict each other, or
have one key for which each has its own target value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditPack, EditRecord


@dataclass(frozen=True)
class Union:
    """Packs laid beside each other, for one pour.

    Args:
        stored: all records, with rows counted through, and their target values; no factors.
        keys: (n, d_in), the rows of A at the first rewrite layer.
        pouring: the records that are poured.
        names: edit id -> pack that it came with.
        set_aside: edits left out, with the reason.
    """

    stored: EditState
    keys: Tensor
    pouring: tuple[EditRecord, ...]
    names: Mapping[str, str]
    set_aside: tuple[tuple[Edit, str], ...] = ()


def with_pack(
    union: Union, name: str, pack: EditPack, module: str, rule: str, bound: float
) -> Union:
    """Lay a pack beside those before it.

    A parent's edit that the pack solved anew, with one of its own of the same key, is poured as the
    pack has it.

    Args:
        union: what is there.
        name: of the pack, for messages.
        pack: its own edits are added.
        module: whose rows of A tell which keys are alike.
        rule: ``error``, ``first`` or ``last``.
        bound: cosine from which two rows are one key.

    Raises:
        ValueError: a conflict under ``error``, or one id for two edits.
    """
    rank, batch = union.stored.rank, union.stored.next_batch
    rows = {record.row for record in pack.records if record.role == "own"}
    new = [
        replace(record, row=record.row + rank, batch=record.batch + batch)
        for record in pack.records
        if record.role != "superseded" and record.row in rows
    ]
    carried = {record.edit.id for record in new if record.role == "protected"}
    anew = carried & {record.edit.id for record in union.pouring if record.role == "own"}
    old = [record for record in union.pouring if record.edit.id not in carried]
    new = [replace(r, role="own") if r.edit.id in anew else r for r in new]
    keys = torch.cat([union.keys, pack.factors[module].A.to(union.keys)])
    names = {**{record.edit.id: name for record in new}, **union.names}
    here = {record.edit.id: name for record in new}
    found = _same_or_contrary(old, new, union.names, here, rule)
    rest, left = ([r for r in part if r not in found] for part in (old, new))
    found |= _same_key(rest, left, keys, (union.names, here), rule, bound)
    assert pack.targets is not None or not pack.records, "checked before"
    targets = union.stored.targets
    if pack.targets is not None:
        targets = torch.cat([targets, pack.targets.to(targets)])
    stored = EditState({}, (*union.stored.records, *new), targets)
    pouring = tuple(record for record in (*old, *new) if record not in found)
    aside = tuple((record.edit, reason) for record, reason in found.items())
    return Union(stored, keys, pouring, names, (*union.set_aside, *aside))


def _same_or_contrary(
    old: Iterable[EditRecord],
    new: Iterable[EditRecord],
    names: Mapping[str, str],
    here: Mapping[str, str],
    rule: str,
) -> dict[EditRecord, str]:
    """Records to leave out because another says the same or otherwise, with the reason."""
    standing = [record for record in old if record.role != "superseded"]
    said = {_words(record): record for record in standing}
    ids = {record.edit.id: record for record in standing}
    found: dict[EditRecord, str] = {}
    for record in new:
        edit, other = record.edit, ids.get(record.edit.id)
        if other is not None and _says(other) != _says(record):
            raise ValueError(
                f"id {edit.id!r} names two edits: {other.edit.question!r} -> "
                f"{other.edit.target_new!r} of {names[edit.id]} and {edit.question!r} -> "
                f"{edit.target_new!r} of {here[edit.id]}; give each its own id"
            )
        other = said.get(_words(record))
        if other is None or record.role != "own":
            continue
        if _says(other) == _says(record):
            found[record] = f"edit {other.edit.id} of {names[other.edit.id]} already says so"
            continue
        why = f"contradict each other: {edit.question!r} -> {other.edit.target_new!r} and "
        why += repr(edit.target_new)
        found |= _settled([other], [record], names, here, why, rule)
    return found


def _same_key(
    old: Sequence[EditRecord],
    new: Sequence[EditRecord],
    keys: Tensor,
    names: tuple[Mapping[str, str], Mapping[str, str]],
    rule: str,
    bound: float,
) -> dict[EditRecord, str]:
    """Records to leave out because a row before them has their key, with the reason."""
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    before, after = _by_row(old), _by_row(new)
    found: dict[EditRecord, str] = {}
    for row, members in after.items():
        for other, others in before.items():
            cosine = float(unit[row] @ unit[other])
            prefixes = {record.prefix for record in others} - {""}
            alike = cosine >= bound or prefixes & {record.prefix for record in members}
            if alike and not found.keys() & {*members, *others}:
                why = f"have one key (cosine {cosine:.4f}), and a target value each"
                found |= _settled(others, members, *names, why, rule)
    return found


def _settled(
    others: Sequence[EditRecord],
    members: Sequence[EditRecord],
    names: Mapping[str, str],
    here: Mapping[str, str],
    why: str,
    rule: str,
) -> dict[EditRecord, str]:
    """Those of two sides that lose, with the reason."""
    old, new = others[0].edit.id, members[0].edit.id
    if rule == "error":
        raise ValueError(
            f"edits {old} of {names[old]} and {new} of {here[new]} {why}; keep one of them with "
            "on_conflict='first' or 'last', and make the other again with edit() if both are wanted"
        )
    if rule == "last" and any(record.role == "protected" for record in others):
        raise ValueError(
            f"edits {old} of {names[old]} and {new} of {here[new]} {why}; the first belongs to a "
            "pack that this one stands on and cannot be taken back here, so join that one too, or "
            "keep it with on_conflict='first'"
        )
    losers, winner = (members, old) if rule == "first" else (others, new)
    reason = f"edits {old} and {new} {why}; {winner} is kept (on_conflict={rule!r})"
    return dict.fromkeys(losers, reason)


def _by_row(records: Iterable[EditRecord]) -> dict[int, list[EditRecord]]:
    found: dict[int, list[EditRecord]] = {}
    for record in records:
        if record.role != "superseded":
            found.setdefault(record.row, []).append(record)
    return found


def _words(record: EditRecord) -> str:
    return " ".join(record.edit.question.split())


def _says(record: EditRecord) -> tuple[str, str]:
    return _words(record), record.edit.target_new.strip()

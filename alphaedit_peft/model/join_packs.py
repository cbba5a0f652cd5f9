"""Packs joined into one adapter, by pouring the stored target values of all of them again.

In: an adapter and packs of the same base, null space and layers, each with its z. Out: the adapter
with the edits of all, in the order given, as if they had been made so; and which edits were left
out, because another says otherwise or has the same key. :meth:`EditPack.join` does it without a
model, on stored keys alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit
from alphaedit_peft.model.adapter import Adapter, EditedModel
from alphaedit_peft.model.edit import rebuild
from alphaedit_peft.model.load import edits_same_modules
from alphaedit_peft.model.prepare import running
from alphaedit_peft.model.stack import (
    Parent,
    adopt,
    describe,
    loaded,
    new_parents,
    others,
    refuse_common,
)
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.compatible import check_fit
from alphaedit_peft.pack.conflicts import by_row, check_rule, says
from alphaedit_peft.pack.parents import stands_on
from alphaedit_peft.pack.record import asked
from alphaedit_peft.pack.value import require_rows


@dataclass(frozen=True)
class JoinReport:
    """What ``join`` did: edits now in the adapter, and those left out, each with the reason."""

    joined: tuple[Edit, ...]
    set_aside: tuple[tuple[Edit, str], ...]


@torch.no_grad()
def join(
    model: EditedModel,
    adapter: Adapter,
    packs: Sequence[EditPack | str | Path],
    on_conflict: str,
) -> JoinReport:
    """Pour packs into an adapter; see :meth:`AlphaEditModel.join`."""
    if isinstance(packs, str | Path | EditPack):
        raise TypeError(f"packs={packs!r} is one pack; pass a list of packs")
    check_rule(on_conflict)
    named = [_named(pack, i) for i, pack in enumerate(packs, 1)]
    if not named:
        raise ValueError("packs=[] names no pack; pass one or more")
    contexts = named[0][1].contexts
    with running(model, adapter, contexts):
        parents = others(model, adapter)
        for i, (name, pack) in enumerate(named):
            _check_joinable(model, name, pack)
            _check_parents_joined(model, name, pack, named[:i])
        first = (model.alphaedit_config.rewrite_layers or [0])[0]
        beside = _own_edits(adapter, parents, first)
        module, bound = model.architecture.rewrite_name(first), model.alphaedit_config.key_cosine
        for name, pack in named:
            beside = with_pack(beside, name, pack, module, on_conflict, bound)
        joined = [record.edit for record in beside.pouring if record.role == "own"]
        ancestors = [
            {
                "operation": "join",
                "name": name,
                "digest": pack.digest(),
                "edits": len(pack.edits),
            }
            for name, pack in named
        ]
        rebuild(model, adapter, beside.pouring, beside.stored, ancestors, contexts)
    return JoinReport(tuple(joined), beside.set_aside)


def _own_edits(adapter: Adapter, parents: Sequence[Parent], first: int) -> PacksBeside:
    """The adapter's own edits, which come first, and those of the packs it stands on."""
    new = new_parents(adapter.journal.parents, parents, adapter.name)
    refuse_common(adapter.edits, new, adapter.name)
    state = adopt(adapter.state(), new)
    if not state.targets.isfinite().all():
        raise ValueError(
            f"adapter {adapter.name!r} was saved without target values, which joining pours "
            "again; make its edits anew with edit()"
        )
    names = {r.edit.id: f"adapter {adapter.name!r}" for r in state.records}
    names |= {r.edit.id: f"adapter {other.name!r}" for other in parents for r in other.own}
    return PacksBeside(state, state.factors[first].A, state.records, names)


def _check_joinable(model: EditedModel, name: str, pack: EditPack) -> None:
    require_rows(pack.compression, f"join it ({name})")
    try:
        check_fit(pack, model.get_base_model(), pack.modules, model.base_fingerprint)
    except ValueError as error:
        raise ValueError(f"{name} cannot be joined: {error}") from None
    if not edits_same_modules(model, pack):
        layers = model.alphaedit_config.rewrite_layers
        raise ValueError(
            f"{name} changes {list(pack.modules)}, and this model's rewrite layers are "
            f"{layers}; join packs of the same layers, or make its edits anew with edit()"
        )
    if pack.targets is None and pack.records:
        raise ValueError(
            f"{name} was saved without target values, which joining pours again; make its "
            "edits anew with edit(), or join the files with EditPack.join"
        )
    given = model.resources.provenance()
    if pack.null_space is None or given is None or not pack.records:
        return
    differ = [
        key for key in ("digest", "threshold", "mode") if pack.null_space.get(key) != given[key]
    ]
    if differ:
        raise ValueError(
            f"{name} was made with null space {pack.null_space}, and this model has {given}: "
            f"{differ} differ; pass null_space= the pack's own, or make its edits anew"
        )


def _check_parents_joined(
    model: EditedModel, name: str, pack: EditPack, earlier: Sequence[tuple[str, EditPack]]
) -> None:
    """A pack's parents are joined before it, or are active beside the adapter."""
    missing = stands_on(pack.parents)
    if missing:
        there = {p.digest for p in loaded(model) if p.name in model.active_adapters}
        there |= {value.digest() for _, value in earlier}
        missing = [parent for parent in missing if parent.get("digest") not in there]
    if missing:
        raise ValueError(
            f"{name} stands on {describe(missing[0])}, which is neither joined before it nor "
            f"active; give that pack too, before {name}"
        )


def _named(pack: EditPack | str | Path, number: int) -> tuple[str, EditPack]:
    if isinstance(pack, EditPack):
        return f"pack {number}", pack
    if not isinstance(pack, str | Path):
        raise TypeError(
            f"packs holds {pack!r}, a {type(pack).__name__}; pass EditPacks, folders or Hub ids"
        )
    folder = Path(pack)
    name = folder.resolve().name if folder.is_dir() else str(pack)
    return f"pack {name!r}", EditPack.from_pretrained(pack)


@dataclass(frozen=True)
class PacksBeside:
    """Packs laid beside each other, to be poured as one.

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
    beside: PacksBeside, name: str, pack: EditPack, module: str, rule: str, bound: float
) -> PacksBeside:
    """Lay a pack beside those before it.

    A parent's edit that the pack solved anew, with one of its own of the same key, is poured as the
    pack has it.

    Args:
        beside: what is there.
        name: of the pack, for messages.
        pack: its own edits are added.
        module: whose rows of A tell which keys are alike.
        rule: ``error``, ``first`` or ``last``.
        bound: cosine from which two rows are one key.

    Raises:
        ValueError: a conflict under ``error``, or one id for two edits.
    """
    rank, batch = beside.stored.rank, beside.stored.next_batch
    rows = {record.row for record in pack.records if record.role == "own"}
    new = [
        replace(record, row=record.row + rank, batch=record.batch + batch)
        for record in pack.records
        if record.role != "superseded" and record.row in rows
    ]
    carried = {record.edit.id for record in new if record.role == "protected"}
    anew = carried & {record.edit.id for record in beside.pouring if record.role == "own"}
    old = [record for record in beside.pouring if record.edit.id not in carried]
    new = [replace(r, role="own") if r.edit.id in anew else r for r in new]
    keys = torch.cat([beside.keys, pack.factors[module].A.to(beside.keys)])
    names = {**{record.edit.id: name for record in new}, **beside.names}
    here = {record.edit.id: name for record in new}
    found = _same_or_contrary(old, new, beside.names, here, rule)
    rest, left = ([r for r in part if r not in found] for part in (old, new))
    found |= _same_key(rest, left, keys, (beside.names, here), rule, bound)
    assert pack.targets is not None or not pack.records, "checked before"
    targets = beside.stored.targets
    if pack.targets is not None:
        targets = torch.cat([targets, pack.targets.to(targets)])
    stored = EditState({}, (*beside.stored.records, *new), targets)
    pouring = tuple(record for record in (*old, *new) if record not in found)
    aside = tuple((record.edit, reason) for record, reason in found.items())
    return PacksBeside(stored, keys, pouring, names, (*beside.set_aside, *aside))


def _same_or_contrary(
    old: Iterable[EditRecord],
    new: Iterable[EditRecord],
    names: Mapping[str, str],
    here: Mapping[str, str],
    rule: str,
) -> dict[EditRecord, str]:
    """Records to leave out because another says the same or otherwise, with the reason."""
    standing = [record for record in old if record.role != "superseded"]
    said = {asked(record.edit): record for record in standing}
    ids = {record.edit.id: record for record in standing}
    found: dict[EditRecord, str] = {}
    for record in new:
        edit, other = record.edit, ids.get(record.edit.id)
        if other is not None and says(other.edit) != says(record.edit):
            raise ValueError(
                f"id {edit.id!r} names two edits: {other.edit.question!r} -> "
                f"{other.edit.target_new!r} of {names[edit.id]} and {edit.question!r} -> "
                f"{edit.target_new!r} of {here[edit.id]}; give each its own id"
            )
        other = said.get(asked(record.edit))
        if other is None or record.role != "own":
            continue
        if says(other.edit) == says(record.edit):
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
    before, after = by_row(old), by_row(new)
    found: dict[EditRecord, str] = {}
    for row, members in after.items():
        for other, theirs in before.items():
            cosine = float(unit[row] @ unit[other])
            prefixes = {record.prefix for record in theirs} - {""}
            alike = cosine >= bound or prefixes & {record.prefix for record in members}
            if alike and not found.keys() & {*members, *theirs}:
                why = f"have one key (cosine {cosine:.4f}), and a target value each"
                found |= _settled(theirs, members, *names, why, rule)
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

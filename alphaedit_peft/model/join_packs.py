"""Packs joined into one adapter, by pouring the stored target values of all of them again.

In: an adapter and packs of the same base, null space and layers, each with its z. Out: the adapter
with the edits of all, in the order given, as if they had been made so; and which edits were left
out, because another says otherwise or has the same key. :meth:`EditPack.join` does it without a
model, on stored keys alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit, told
from alphaedit_peft.messages import shown
from alphaedit_peft.model.adapter import Adapter, EditedModel
from alphaedit_peft.model.edit import rebuild
from alphaedit_peft.model.load import edits_same_modules, take_open
from alphaedit_peft.model.prepare import running
from alphaedit_peft.model.stack import Parent, describe, loaded, others, with_parents
from alphaedit_peft.pack import EditPack, EditRecord
from alphaedit_peft.pack.compatible import check_fit
from alphaedit_peft.pack.conflicts import RULES, by_row, says
from alphaedit_peft.pack.contents import require_rows
from alphaedit_peft.pack.edit_record import asked
from alphaedit_peft.pack.pack import require_packs
from alphaedit_peft.pack.parents import parent_entry, stands_on
from alphaedit_peft.settings import require_one_of


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
    require_one_of("on_conflict", on_conflict, RULES)
    named = [_named(pack, i) for i, pack in enumerate(require_packs(packs), 1)]
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
            beside = beside.with_pack(name, pack, module, on_conflict, bound)
        joined = [record.edit for record in beside.chosen if record.role == "own"]
        ancestors = [parent_entry("join", pack, name=name) for name, pack in named]
        for _, pack in named:
            take_open(model, pack)
        rebuild(model, adapter, beside.chosen, beside.stored, ancestors, contexts)
    return JoinReport(tuple(joined), beside.set_aside)


def _own_edits(adapter: Adapter, parents: Sequence[Parent], first: int) -> _Beside:
    """The adapter's own edits, which come first, and those of the packs it stands on."""
    state = with_parents(adapter, parents)
    if not state.targets.isfinite().all():
        raise ValueError(
            f"adapter {adapter.name!r} was saved without target values, which joining pours "
            "again; make its edits anew with edit()"
        )
    names = {r.edit.id: f"adapter {adapter.name!r}" for r in state.records}
    names |= {r.edit.id: f"adapter {other.name!r}" for other in parents for r in other.own}
    return _Beside(state, state.factors[first].A, state.records, names)


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
    parents = stands_on(pack.parents)
    if not parents:
        return
    there = {p.digest for p in loaded(model) if p.name in model.active_adapters}
    there |= {value.digest() for _, value in earlier}
    for parent in parents:
        if parent.get("digest") not in there:
            raise ValueError(
                f"{name} stands on {describe(parent)}, which is neither joined before it nor "
                f"active; give that pack too, before {name}"
            )


def _named(pack: EditPack | str | Path, number: int) -> tuple[str, EditPack]:
    if isinstance(pack, EditPack):
        return f"pack {number}", pack
    folder = Path(pack)
    name = folder.resolve().name if folder.is_dir() else str(pack)
    return f"pack {name!r}", EditPack.from_pretrained(pack)


@dataclass(frozen=True)
class _Beside:
    """Packs laid beside each other, to be poured as one.

    Args:
        stored: all records, with rows counted through, and their target values; no factors.
        keys: (n, d_in), the rows of A at the first rewrite layer.
        chosen: the records that are poured.
        names: edit id -> pack that it came with.
        set_aside: edits left out, with the reason.
    """

    stored: EditState
    keys: Tensor
    chosen: tuple[EditRecord, ...]
    names: Mapping[str, str]
    set_aside: tuple[tuple[Edit, str], ...] = ()

    def with_pack(self, name: str, pack: EditPack, module: str, rule: str, bound: float) -> _Beside:
        """A pack's own edits added; rows of A in ``module`` are one key from cosine ``bound`` on.

        A parent's edit that the pack solved anew, with one of its own of the same key, is poured as
        the pack has it.

        Raises:
            ValueError: a conflict under the rule ``error``, or one id for two edits.
        """
        rank, batch, targets = self.stored.rank, self.stored.next_batch, self.stored.targets
        rows = {record.row for record in pack.records if record.role == "own"}
        new = [
            replace(record, row=record.row + rank, batch=record.batch + batch)
            for record in pack.records
            if record.role != "superseded" and record.row in rows
        ]
        carried = {record.edit.id for record in new if record.role == "protected"}
        anew = carried & {record.edit.id for record in self.chosen if record.role == "own"}
        old = [record for record in self.chosen if record.edit.id not in carried]
        new = [replace(r, role="own") if r.edit.id in anew else r for r in new]
        keys = torch.cat([self.keys, pack.factors[module].A.to(self.keys)])
        settle = _Settle(self.names, name, rule)
        found = settle.same_or_contrary(old, new)
        rest, left = ([r for r in part if r not in found] for part in (old, new))
        found |= settle.same_key(rest, left, keys, bound)
        if pack.targets is not None:
            targets = torch.cat([targets, pack.targets.to(targets)])
        return _Beside(
            stored=EditState({}, (*self.stored.records, *new), targets),
            keys=keys,
            chosen=tuple(record for record in (*old, *new) if record not in found),
            names={**{record.edit.id: name for record in new}, **self.names},
            set_aside=(*self.set_aside, *((r.edit, reason) for r, reason in found.items())),
        )


@dataclass(frozen=True)
class _Settle:
    """What is left out, with the reason, where a pack ``name`` meets the edits before it.

    Args:
        names: id of an edit before it -> pack that it came with.
        name: of the pack.
        rule: ``error``, ``first`` or ``last``.
    """

    names: Mapping[str, str]
    name: str
    rule: str

    def same_or_contrary(
        self, old: Sequence[EditRecord], new: Sequence[EditRecord]
    ) -> dict[EditRecord, str]:
        """Records to leave out because another says the same or otherwise."""
        standing = [record for record in old if record.role != "superseded"]
        said = {asked(record.edit): record for record in standing}
        ids = {record.edit.id: record.edit for record in standing}
        found: dict[EditRecord, str] = {}
        for record in new:
            edit = record.edit
            namesake, other = ids.get(edit.id, edit), said.get(asked(edit))
            if says(namesake) != says(edit):
                raise ValueError(
                    f"id {edit.id!r} names two edits: {told(namesake)} of {self.names[edit.id]} "
                    f"and {told(edit)} of {self.name}; give each its own id"
                )
            if other is None or record.role != "own":
                continue
            earlier = other.edit
            if says(earlier) == says(edit):
                found[record] = f"edit {earlier.id} of {self.names[earlier.id]} already says so"
                continue
            why = f"contradict each other: {told(earlier)} and {shown(edit.target_new, 40)}"
            found |= self._losers([other], [record], why)
        return found

    def same_key(
        self, old: Sequence[EditRecord], new: Sequence[EditRecord], keys: Tensor, bound: float
    ) -> dict[EditRecord, str]:
        """Records to leave out because a row before them has their key, or they have its."""
        unit = torch.nn.functional.normalize(keys.double(), dim=1)
        before = by_row(old)
        found: dict[EditRecord, str] = {}
        for row, members in by_row(new).items():
            for other, theirs in before.items():
                cosine = float(unit[row] @ unit[other])
                prefixes = {record.prefix for record in theirs} - {""}
                alike = cosine >= bound or prefixes & {record.prefix for record in members}
                if alike and not found.keys() & {*members, *theirs}:
                    why = f"have one key (cosine {cosine:.4f}), and a target value each"
                    found |= self._losers(theirs, members, why)
        return found

    def _losers(
        self, others: Sequence[EditRecord], members: Sequence[EditRecord], why: str
    ) -> dict[EditRecord, str]:
        """Those of two sides that lose by the rule."""
        old, new = others[0].edit.id, members[0].edit.id
        said = f"edits {old} of {self.names[old]} and {new} of {self.name} {why}"
        if self.rule == "error":
            raise ValueError(
                f"{said}; keep one of them with on_conflict='first' or 'last', and make the other "
                "again with edit() if both are wanted"
            )
        if self.rule == "last" and any(record.role == "protected" for record in others):
            raise ValueError(
                f"{said}; the first belongs to a pack that this one stands on and cannot be taken "
                "back here, so join that one too, or keep it with on_conflict='first'"
            )
        losers, winner = (members, old) if self.rule == "first" else (others, new)
        reason = f"edits {old} and {new} {why}; {winner} is kept (on_conflict={self.rule!r})"
        return dict.fromkeys(losers, reason)

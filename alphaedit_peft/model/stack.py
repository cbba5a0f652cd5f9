"""Packs on top of packs: which parents a pack stands on, and how their rows are protected in it.

In: the state of a pack, and of those that are active beside it. Out: that state with the parents'
rows in it: their A, columns of zeros in B, records of role ``protected``. A batch solved on top
then keeps the parents' outputs as it would within one pack, Delta = R^T E (G + D)^-1 A over all
rows, and the pack taken away leaves the parents as they were. A pack names its parents; whether
they are there is found out here too.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit, told
from alphaedit_peft.messages import shown
from alphaedit_peft.model.adapter import Adapter, EditedModel, to_pack
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.contents import require_rows
from alphaedit_peft.pack.edit_record import asked
from alphaedit_peft.pack.parents import BESIDE, MissingParentError, stands_on


@dataclass(frozen=True)
class Loaded:
    """A pack in the model.

    ``name`` and ``source`` are its adapter's; ``digest`` is of the pack as it is now.
    """

    name: str
    source: str
    digest: str


@dataclass(frozen=True)
class Parent(Loaded):
    """An active pack that another one is edited on top of, with what it holds."""

    state: EditState

    @property
    def own(self) -> tuple[EditRecord, ...]:
        """Records of the edits that it makes itself; its own parents are parents too."""
        return tuple(record for record in self.state.records if record.role == "own")

    def recorded(self) -> dict[str, Any]:
        """What a pack on top of it records."""
        known = {"name": self.source, "digest": self.digest, "edits": len(self.own)}
        return {"operation": BESIDE, **known}


def loaded(model: EditedModel) -> list[Loaded]:
    """The packs in a model; not those whose factors were changed behind its back."""
    return [
        Loaded(adapter.name, adapter.source, to_pack(model, adapter).digest())
        for adapter in model.edit_adapters.values()
        if adapter.unchanged
    ]


def others(model: EditedModel, adapter: Adapter) -> tuple[Parent, ...]:
    """The packs that are active beside the one that is edited, as its parents.

    Raises:
        ValueError: that one is not active, or one of the others stands on it.
        RuntimeError: a plain LoRA is active, whose keys are not known.
    """
    target, active = adapter.name, model.active_adapters
    if target not in active:
        raise ValueError(
            f"adapter {target!r} is not active, and edits go into the model as it computes; "
            f"call set_adapter({target!r}), or with a list the packs it stands on and it"
        )
    if len(active) == 1:
        return ()
    require_top(model, target)
    found = (_as_parent(model, name) for name in active if name != target)
    return tuple(parent for parent in found if parent.own)


def require_top(model: EditedModel, target: str) -> None:
    """Refuse, by a ValueError, to change an adapter that an active one stands on."""
    known = model.edit_adapters
    above = [name for name in model.active_adapters if name != target and name in known]
    below = {name: stands_on(known[name].journal.parents) for name in above}
    if target not in known or not any(below.values()):
        return
    own = to_pack(model, known[target]).digest()
    for name, parents in below.items():
        if own in [parent.get("digest") for parent in parents]:
            raise ValueError(
                f"adapter {name!r} was made on top of {target!r}, which would change under it; "
                f"edit into {name!r}, or first make {target!r} active alone"
            )


def _as_parent(model: EditedModel, name: str) -> Parent:
    if name not in model.edit_adapters:
        raise RuntimeError(
            f"adapter {name!r} is active and no pack of edits in this model's rewrite "
            "layers, so what it does for its keys cannot be protected; leave it out of "
            "set_adapter, or merge it into the base before wrapping that for edits"
        )
    adapter = model.edit_adapters[name]
    require_rows(adapter.compression, "edit on top of it")
    return Parent(name, adapter.source, to_pack(model, adapter).digest(), adapter.state())


def describe(parent: Mapping[str, Any]) -> str:
    """A recorded parent in words: its name, number of edits and digest."""
    digest = str(parent.get("digest", ""))[:8]
    return f"pack {parent.get('name')!r} ({parent.get('edits')} edits, digest {digest})"


def adopt(
    state: EditState, parents: Sequence[Parent], carried: Collection[str] = frozenset()
) -> EditState:
    """Take the parents' rows into a pack, protected: their A, zeros in B.

    Args:
        state: of the pack; its own rows stay where they are.
        parents: whose rows come after them.
        carried: ids of parents' edits that are solved anew in a row of this pack, together with
            own edits of the same key; their old row is superseded.
    """
    for parent in parents:
        rows = sorted({record.row for record in parent.own})
        factors = {}
        for layer, delta in state.factors.items():
            nothing = delta.B.new_zeros(delta.rank + len(rows), delta.B.shape[0])
            factors[layer] = delta.extended(parent.state.factors[layer].A[rows], nothing)
        records = [
            replace(
                record,
                row=state.rank + rows.index(record.row),
                role="superseded" if record.edit.id in carried else "protected",
            )
            for record in parent.own
        ]
        known = parent.state.targets[rows].nan_to_num(0.0)  # zeros where a parent has none
        targets = torch.cat([state.targets, known.to(state.targets)])
        state = EditState(factors, (*state.records, *records), targets)
    return state


def without_parents(
    records: Sequence[EditRecord], stored: Sequence[EditRecord], parents: Sequence[Parent]
) -> tuple[list[EditRecord], frozenset[str]]:
    """The records of a pack that are to be poured again, and ids of the parents' edits in them.

    Parents' rows are taken from the parents. An edit of theirs is poured only where it shares a row
    with the pack's own.

    Args:
        records: those to pour, the parents' among them.
        stored: all records of the pack.
        parents: as they are now.
    """
    theirs = {record.edit.id for record in stored if record.role == "protected"}
    alive = {record.edit.id for parent in parents for record in parent.own}
    mine = [record for record in records if record.edit.id not in theirs]
    rows = {record.row for record in mine if record.role == "own"}
    carried = [r for r in records if r.role == "protected" and r.edit.id in alive and r.row in rows]
    kept = [record for record in records if record in mine or record in carried]
    return kept, frozenset(record.edit.id for record in carried)


def with_parents(adapter: Adapter, parents: Sequence[Parent]) -> EditState:
    """The state of an adapter on top of parents, the rows of those that are new to it adopted.

    Raises:
        ValueError: a new parent that holds an edit of the adapter already, or contradicts one; a
            recorded one that is not active, or has changed since.
    """
    target, edits = adapter.name, adapter.edits
    new = new_parents(adapter.journal.parents, parents, target)
    for parent in new:
        both = sorted({edit.id for edit in edits} & {record.edit.id for record in parent.own})
        if both:
            raise ValueError(
                f"edits {both} are both in {target!r} and in {parent.name!r}, which it would stand "
                f"on; take them out of one with remove_edits(ids, adapter_name={target!r})"
            )
    refuse_contradictions(edits, new, "error")
    return adopt(adapter.state(), new)


def refuse_contradictions(
    edits: Iterable[Edit], parents: Sequence[Parent], on_conflict: str
) -> None:
    """Refuse edits that say otherwise than a parent's edit, which a pack on top cannot take back.

    Under ``keep`` they are set aside with the others, so nothing is refused here.
    """
    if on_conflict == "keep":
        return
    said = {asked(r.edit): (parent.name, r.edit) for parent in parents for r in parent.own}
    for edit in edits:
        name, earlier = said.get(asked(edit), ("", edit))
        if earlier.target_new.strip() != edit.target_new.strip():
            raise ValueError(
                f"edits {earlier.id} of adapter {name!r} and {edit.id} contradict each other: "
                f"{told(earlier)} and {shown(edit.target_new, 40)}; a pack "
                f"cannot change another that it stands on, so edit into {name!r}, join the packs "
                "with join(), or set on_conflict='keep' (the earlier one stays)"
            )


def new_parents(
    recorded: Iterable[Mapping[str, Any]], active: Sequence[Parent], target: str
) -> list[Parent]:
    """The active packs that a pack does not stand on yet.

    Raises:
        ValueError: one that it stands on is not active, or has changed since.
    """
    known = {parent.get("digest"): parent for parent in stands_on(recorded)}
    for digest, parent in known.items():
        if digest in {other.digest for other in active}:
            continue
        where = (
            "which is not active; load it and make it active with set_adapter([..., ...]), the "
            "parent first"
        )
        for other in active:
            if other.source == parent.get("name"):
                where = (
                    f"and {other.name!r} is another, or has changed since; take that back, or pour "
                    f"{target!r} on it with repour(adapter_name={target!r})"
                )
                break
        raise ValueError(f"adapter {target!r} was made on top of {describe(parent)}, {where}")
    return [other for other in active if other.digest not in known]


def require_parents(
    what: str,
    recorded: Iterable[Mapping[str, Any]],
    rule: str,
    model: EditedModel | None = None,
    before: Collection[str] = (),
) -> None:
    """See to it that the packs which ``what`` stands on come before it: ``before``, by adapter.

    Raises:
        MissingParentError: a missing parent under the rule ``error``; which, and what to do.
        ValueError: another rule.

    Warns:
        UserWarning: a missing parent under ``warn``.
    """
    if rule not in ("error", "warn"):
        raise ValueError(f"missing_parents={rule!r} is unknown; use 'error' or 'warn'")
    parents = stands_on(recorded)
    there = loaded(model) if model is not None and parents else []
    there.sort(key=lambda pack: pack.name not in before)
    for parent in parents:
        if parent.get("digest") in {pack.digest for pack in there if pack.name in before}:
            continue
        missing, where = f"{what} stands on {describe(parent)}", _whereabouts(parent, there)
        if rule == "error":
            remedy = f"{where}, or use it without, by missing_parents='warn'"
            raise MissingParentError(missing, remedy)
        warnings.warn(
            f"{missing}, {where}; until then it acts otherwise than it was made", stacklevel=4
        )


def _whereabouts(parent: Mapping[str, Any], there: Sequence[Loaded]) -> str:
    for pack in there:
        if pack.digest == parent.get("digest"):
            return (
                f"which is loaded as {pack.name!r} but not active before it; set_adapter with "
                f"{pack.name!r} first in the list makes it so"
            )
    for pack in there:
        if pack.source == parent.get("name"):
            return (
                f"and what is loaded as {pack.name!r} is another, or has changed since; load that "
                "pack as it was (rollback() may bring it back)"
            )
    return "which is not loaded; load it first, and this one beside it with load_adapter"


def require_active(
    recorded: Iterable[Mapping[str, Any]], active: Sequence[Parent], target: str
) -> None:
    """Refuse to pour a pack again where a parent is missing; one that has changed will do."""
    there = {other.digest for other in active} | {other.source for other in active}
    missing = [p for p in stands_on(recorded) if not {p.get("digest"), p.get("name")} & there]
    if missing:
        new_parents(missing, active, target)

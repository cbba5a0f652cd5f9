"""Join packs into one, from their files alone.

In: packs of one base and one null space. Out: :class:`Joined`: the pack whose update puts out on
each pack's stored keys what that pack did (``algebra.join``), together with those it was
edited on top of. Adding the updates of packs made apart would not: each would also act on the
other's keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.compatible import LAYERS, require_joinable
from alphaedit_peft.pack.conflicts import RULES, LeftOut, settle
from alphaedit_peft.pack.contents import Pack, PackContents, require_rows
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.pack.parents import acting, parent_entry, stands_on
from alphaedit_peft.settings import require_one_of

_CHOICES = {"on_conflict": RULES, "ridge_mode": ("relative", "absolute"), "layers": LAYERS}


@dataclass(frozen=True)
class JoinOptions:
    """How packs become one; see :meth:`EditPack.join`."""

    on_conflict: str = "error"
    key_cosine: float = 0.999
    ridge: float | None = None
    ridge_mode: str = "relative"
    norm_guard: float = 2.0
    layers: str = "same"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            require_one_of(name, getattr(self, name), choices)
        if not 0 < self.key_cosine <= 1:
            raise ValueError(f"key_cosine={self.key_cosine!r} must be above 0 and at most 1")
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge={self.ridge!r} must be a number from 0 on, or None")
        guard = self.norm_guard
        if guard != 0 and not 1 <= guard < float("inf"):
            raise ValueError(f"norm_guard={guard!r} must be at least 1, or 0 for no bound")


@dataclass(frozen=True)
class Joined(Generic[Pack]):
    """Several packs as one, the edits left out of it, and the update solved for each module."""

    pack: Pack
    left_out: tuple[LeftOut, ...]
    solved: dict[str, algebra.Joint]


def join(
    packs: Sequence[Pack], how: JoinOptions, names: Sequence[str] | None = None
) -> Joined[Pack]:
    """One pack of several; see :meth:`EditPack.join`."""
    packs = list(packs)
    names = [f"pack {i + 1}" for i in range(len(packs))] if names is None else list(names)
    if not packs:
        raise ValueError("packs=[] holds no pack; give at least one, better two")
    if len(names) != len(packs):
        raise ValueError(f"names={names} are not one for each of the {len(packs)} packs")
    for pack in packs:
        require_rows(pack.compression, "join it with others")
    first = require_joinable(packs, names, how.layers)
    chains = acting(packs, names)
    chosen, left_out = settle(packs, names, how.on_conflict, how.key_cosine)
    solved = {}
    for module, like in first.factors.items():
        parts = _parts(module, like, packs, chains, chosen)
        start = _ridge(torch.cat([rows for rows, _ in parts]), how)
        solved[module] = algebra.join(parts, start, how.norm_guard)
    records, adopted = _adopted(_records(packs, names, chosen), packs)
    joined = replace(
        first,
        factors={module: joint.delta for module, joint in solved.items()},
        records=tuple(records),
        targets=_targets(packs, chosen),
        parents=_parents(packs, names),
    )
    _warn(solved, how.norm_guard)
    return Joined(joined, tuple(left for left in left_out if left.id not in adopted), solved)


def _parts(
    module: str,
    like: LowRankDelta,
    packs: Sequence[PackContents],
    chains: Sequence[Sequence[PackContents]],
    chosen: Sequence[list[int]],
) -> list[tuple[Tensor, Tensor]]:
    """Each pack's rows at a module, and what it and those that act with it put out on them.

    Zeros where a pack does not edit the module. Neighbours in one chain are one part: their |Delta|
    is no sign of a clash.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for number, (pack, chain, kept) in enumerate(zip(packs, chains, chosen, strict=True)):
        rows = like.A.new_zeros(len(kept), like.A.shape[1])
        outputs = like.B.new_zeros(len(kept), like.B.shape[0])
        if module in pack.factors:
            rows = pack.factors[module].A[kept]
            acting_here = [p.factors[module] for p in chain if module in p.factors]
            outputs = torch.stack([algebra.outputs(d, rows) for d in acting_here]).sum(0)
        if number and any(packs[number - 1] is other for other in chain):
            earlier = found.pop()
            rows, outputs = torch.cat([earlier[0], rows]), torch.cat([earlier[1], outputs])
        found.append((rows, outputs))
    return found


def _ridge(rows: Tensor, how: JoinOptions) -> float:
    ridge, keys = how.ridge or 0.0, rows.double()
    if how.ridge_mode == "absolute" or not len(keys):
        return ridge
    return algebra.relative_ridge(keys @ keys.T, ridge)


def _records(
    packs: Sequence[PackContents], names: Sequence[str], chosen: Sequence[list[int]]
) -> list[EditRecord]:
    """The standing records of the rows kept, with rows and batches numbered through.

    Raises:
        ValueError: one id for two edits.
    """
    found: list[EditRecord] = []
    owner: dict[str, str] = {}
    row_before = batch_before = 0
    for pack, name, kept in zip(packs, names, chosen, strict=True):
        place = {row: row_before + i for i, row in enumerate(kept)}
        batches = sorted({r.batch for r in pack.records if r.row in place})
        batch = {number: batch_before + i for i, number in enumerate(batches)}
        for record in pack.records:
            if record.role == "superseded" or record.row not in place:
                continue
            if record.role == "own" and record.edit.id in owner:
                raise ValueError(
                    f"id {record.edit.id!r} names one edit in {owner[record.edit.id]} and another "
                    f"in {name}; give each edit an id of its own"
                )
            if record.role == "own":
                owner[record.edit.id] = name
            found.append(replace(record, row=place[record.row], batch=batch[record.batch]))
        row_before += len(place)
        batch_before += len(batches)
    return found


def _adopted(
    records: Sequence[EditRecord], packs: Sequence[PackContents]
) -> tuple[list[EditRecord], set[str]]:
    """Edits that only an upper pack's row holds any more become the joined pack's own, with ids."""
    theirs = {r.edit.id: r.edit for pack in packs for r in pack.records if r.role == "own"}
    own = {record.edit.id for record in records if record.role == "own"}
    found, adopted = [], set[str]()
    for record in records:
        name = record.edit.id
        if name not in own and theirs.get(name) == record.edit:
            own.add(name)
            adopted.add(name)
            record = replace(record, role="own")
        found.append(record)
    return found, adopted


def _targets(packs: Sequence[PackContents], chosen: Sequence[list[int]]) -> Tensor | None:
    """Target values by row, where every pack that has rows has them."""
    pairs = list(zip(packs, chosen, strict=True))
    if any(kept and pack.targets is None for pack, kept in pairs):
        return None
    found = [pack.targets[kept] for pack, kept in pairs if pack.targets is not None]
    return torch.cat(found) if found else None


def _parents(packs: Sequence[PackContents], names: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The packs joined, and those that they stand on (``beside``) and that are not among them."""
    joined = [parent_entry("join", p, name=n) for n, p in zip(names, packs, strict=True)]
    known = {str(parent["digest"]) for parent in joined}
    found = []
    for parent in (parent for pack in packs for parent in stands_on(pack.parents)):
        if str(parent.get("digest")) not in known:
            known.add(str(parent.get("digest")))
            found.append(dict(parent))
    return (*found, *joined)


def _warn(solved: dict[str, algebra.Joint], guard: float) -> None:
    off = {m: float(joint.drift.max()) for m, joint in solved.items() if len(joint.drift)}
    worst = max(off, key=lambda module: off[module], default=None)
    if worst is None or off[worst] < 0.01:
        return
    joint = solved[worst]
    warnings.warn(
        f"the joined edits' outputs differ by up to {off[worst]:.0%} from the packs' ({worst}, "
        f"ridge {joint.ridge:.3g}, |Delta| {joint.growth:.3g} times that of unrelated packs, "
        f"norm_guard={guard:g}): some keys are nearly alike; make the edits together with edit()",
        stacklevel=4,
    )

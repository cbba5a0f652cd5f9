"""Packs joined into one adapter, by pouring the stored target values of all of them again.

In: an adapter and packs of the same base, null space and layers, each with its z. Out: the adapter
with the edits of all, in the order given, as if they had been made so; and which edits were left
out, because another says otherwise or has the same key. :meth:`EditPack.join` does it without a
model, on stored keys alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alphaedit_peft.edits import Edit
from alphaedit_peft.model.chaining import (
    Parent,
    adopt,
    describe,
    needed,
    new_parents,
    refuse_common,
)
from alphaedit_peft.model.fitting import check_beside
from alphaedit_peft.model.several import SeveralModel
from alphaedit_peft.model.union import Union, with_pack
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.compressing import require_rows

RULES = ("error", "first", "last")


@dataclass(frozen=True)
class JoinReport:
    """What ``join`` did: edits now in the adapter, and those left out, each with the reason."""

    joined: tuple[Edit, ...]
    set_aside: tuple[tuple[Edit, str], ...]


class JoinableModel(SeveralModel):
    """The joining part of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    @torch.no_grad()
    def join(
        self,
        packs: Sequence[EditPack | str | Path],
        *,
        on_conflict: str = "error",
        adapter_name: str | None = None,
    ) -> JoinReport:
        """Pour packs into an adapter, after the edits that it has; wholly or not at all.

        Key passes and solves only, with this model's settings and contexts (in a model without
        edits, the first pack's contexts). Edits that share a key are in conflict too: each has a
        target value made without the other. Making one of them again with ``edit`` solves them
        together.

        Args:
            packs: values, folders or Hub repositories, poured in this order.
            on_conflict: ``error``, or keep what came ``first`` or ``last``.
            adapter_name: the adapter; needed where several are active.

        Raises:
            ValueError: a pack of another base, null space or layers, or without target values; a
                conflict under ``error``; one id for two edits. Names the pack.
            PackError: a damaged pack.
        """
        if isinstance(packs, str | Path | EditPack):
            raise TypeError(f"packs={packs!r} is one pack; pass a list of packs")
        if on_conflict not in RULES:
            raise ValueError(f"on_conflict={on_conflict!r} is unknown; use one of {RULES}")
        named = [_named(pack, i) for i, pack in enumerate(packs, 1)]
        if not named:
            raise ValueError("packs=[] names no pack; pass one or more")
        with self._on(adapter_name), self._bench(named[0][1].contexts):
            others = self._others()
            for i, (name, pack) in enumerate(named):
                self._check_joinable(name, pack)
                self._check_parents_joined(name, pack, named[:i])
            union = self._union(others)
            module = self.architecture.rewrite_name(self._first_layer)
            for name, pack in named:
                union = with_pack(union, name, pack, module, on_conflict, self._key_bound)
            joined = [record.edit for record in union.pouring if record.role == "own"]
            ancestors = [
                {
                    "operation": "join",
                    "name": name,
                    "digest": pack.digest(),
                    "edits": len(pack.edits),
                }
                for name, pack in named
            ]
            self._repour(union.pouring, union.stored, ancestors, named[0][1].contexts)
        return JoinReport(tuple(joined), union.set_aside)

    @property
    def _first_layer(self) -> int:
        return (self.alphaedit_config.rewrite_layers or [0])[0]

    @property
    def _key_bound(self) -> float:
        return self.alphaedit_config.key_cosine

    def _union(self, others: Sequence[Parent]) -> Union:
        """The adapter's own edits, which come first, and those of the packs it stands on."""
        new = new_parents(self._journal().parents, others, self._active)
        refuse_common(self.edits, new, self._active)
        state = adopt(self._state(), new)
        if not state.targets.isfinite().all():
            raise ValueError(
                f"adapter {self._active!r} was saved without target values, which joining pours "
                "again; make its edits anew with edit()"
            )
        names = {r.edit.id: f"adapter {self._active!r}" for r in state.records}
        names |= {r.edit.id: f"adapter {other.name!r}" for other in others for r in other.own}
        return Union(state, state.factors[self._first_layer].A, state.records, names)

    def _check_joinable(self, name: str, pack: EditPack) -> None:
        require_rows(pack.compression, f"join it ({name})")
        try:
            check_beside(pack, self.get_base_model(), self.base_fingerprint, False)
        except ValueError as error:
            raise ValueError(f"{name} cannot be joined: {error}") from None
        if not self._edits_same_modules(pack):
            layers = self.alphaedit_config.rewrite_layers
            raise ValueError(
                f"{name} changes {list(pack.modules)}, and this model's rewrite layers are "
                f"{layers}; join packs of the same layers, or make its edits anew with edit()"
            )
        if pack.targets is None and pack.records:
            raise ValueError(
                f"{name} was saved without target values, which joining pours again; make its "
                "edits anew with edit(), or join the files with EditPack.join"
            )
        given = self.resources.provenance()
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
        self, name: str, pack: EditPack, earlier: Sequence[tuple[str, EditPack]]
    ) -> None:
        """A pack's parents are joined before it, or are active beside the adapter."""
        missing = needed(pack.parents)
        if missing:
            there = {p.digest for p in self._loaded() if p.name in self.active_adapters}
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

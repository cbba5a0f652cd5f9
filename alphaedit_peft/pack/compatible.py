"""Whether packs can be joined: one base, one null space, one shape of the update.

In: packs, with names for messages. Out: an empty pack with all of their modules, to put the joined
edits into; or an error that says which pack differs, and in what.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack.remove import require_projected

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


LAYERS = ("same", "union")
_STATISTICS = ("digest", "threshold", "mode")  # of the null space, that rows depend on


def require_joinable(packs: Sequence[EditPack], names: Sequence[str], layers: str) -> EditPack:
    """Check that packs go together.

    Args:
        packs: at least one.
        names: of the packs.
        layers: ``same`` or ``union``, of the packs' modules.

    Returns:
        The first pack that holds edits, or else the first, emptied; with the modules of all.

    Raises:
        ValueError: what does not go together.

    Warns:
        UserWarning: bases that cannot be compared.
    """
    if layers not in LAYERS:
        raise ValueError(f"layers={layers!r} is unknown; use one of {LAYERS}")
    lead = next((i for i, pack in enumerate(packs) if pack.rank), 0)
    first = packs[lead]
    for name, pack in zip(names, packs, strict=True):
        pair = f"{names[lead]} and {name}"
        require_projected(pack, f"joined ({name})", "make them together with edit()")
        _same_base(first, pack, pair)
        _same_null_space(first, pack, pair)
        if layers == "same" and pack.modules != first.modules:
            raise ValueError(
                f"{pair} edit different modules, {list(first.modules)} and {list(pack.modules)}; "
                "what a pack's keys are at a module that it does not edit is unknown, so they "
                "cannot be protected there: accept that with layers='union', or make the edits "
                "together with edit()"
            )
    return _emptied(first, packs, names)


def _same_base(one: EditPack, other: EditPack, pair: str) -> None:
    if one.fan_in_fan_out != other.fan_in_fan_out:
        raise ValueError(f"{pair} are of different bases: one keeps its weights transposed")
    same = None if one.base is None or other.base is None else one.base.matches(other.base)
    if same is None:
        warnings.warn(
            f"whether {pair} are of one base is not known: a fingerprint is missing, or was taken "
            "of quantised weights",
            stacklevel=6,
        )
    elif not same:
        assert one.base is not None, "compared above"
        assert other.base is not None, "compared above"
        raise ValueError(
            f"{pair} are of different bases: {one.base.describe_mismatch(other.base)}; only edits "
            "of one base can be joined"
        )


def _same_null_space(one: EditPack, other: EditPack, pair: str) -> None:
    if other.rank == 0 or one is other:
        return
    if one.null_space is None or other.null_space is None:
        raise ValueError(
            f"{pair}: one does not say which null space its rows come from, and rows of two "
            "projectors do not go together; make the edits together with edit()"
        )
    differing = [
        f"{key} {one.null_space.get(key)!r} and {other.null_space.get(key)!r}"
        for key in _STATISTICS
        if one.null_space.get(key) != other.null_space.get(key)
    ]
    if differing:
        raise ValueError(
            f"{pair} were made with different null spaces ({'; '.join(differing)}), and rows of "
            "two projectors do not go together; make the edits of one anew with the other's"
        )


def _emptied(first: EditPack, packs: Sequence[EditPack], names: Sequence[str]) -> EditPack:
    factors: dict[str, LowRankDelta] = {}
    for name, pack in zip(names, packs, strict=True):
        for module, delta in pack.factors.items():
            empty = delta.first(0)
            known = factors.setdefault(module, empty)
            shapes = [(d.B.shape[0], d.A.shape[1]) for d in (known, empty)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{module} is {shapes[1]} in {name} and {shapes[0]} in another pack; only "
                    "edits of one base can be joined"
                )
    config = first.config
    union = sorted({layer for pack in packs for layer in pack.config.rewrite_layers or ()})
    if union and config.rewrite_layers != union:
        config = replace(config, rewrite_layers=union)
    bases = [pack.base for pack in packs if pack.base is not None]
    furthest = max(bases, key=lambda base: base.last_layer, default=None)
    return replace(
        first,
        factors=factors,
        records=(),
        targets=None,
        config=config,
        base=furthest,
        compression=None,
    )

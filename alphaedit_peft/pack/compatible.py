"""Whether a pack belongs to the model at hand, and whether packs can be joined with each other.

In: a pack or the factors of a plain LoRA, and a base model that is still untouched; or packs, with
names for messages. Out: nothing, or an empty pack with all of their modules, to put the joined
edits into; or a sentence: another base, another null space, missing modules, other shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.fingerprint import BaseFingerprint, require_same_base
from alphaedit_peft.pack.contents import Pack, PackContents, require_projected
from alphaedit_peft.pack.format import Factors

LAYERS = ("same", "union")
_STATISTICS = ("digest", "threshold", "mode")  # of the null space, that rows depend on


def check_fit(
    pack: PackContents, model: nn.Module, modules: Iterable[str], own: BaseFingerprint | None
) -> None:
    """Refuse a pack that does not fit a base model, in which LoRA layers may stand already.

    Args:
        modules: full names of those that the pack has to have, and the model.
        own: the model's fingerprint, of the bare base; None where another base will do.

    Raises:
        ValueError: another base, modules that one of them lacks, or other shapes.
    """
    if pack.base is not None and own is not None:
        require_same_base(pack.base, own, "this pack")
    for name in modules:
        if name not in pack.factors:
            raise ValueError(f"this pack has no factors for {name}; it edits {pack.modules}")
        check_shape(name, pack.factors[name], model)


def check_shape(name: str, delta: LowRankDelta, model: nn.Module) -> None:
    """Refuse factors whose module, by its full name, the model lacks or has in another shape.

    Raises:
        ValueError: says which shapes differ.
    """
    wanted = (delta.B.shape[0], delta.A.shape[1])
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        module = None
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight: Any = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(
            f"this adapter changes {name}, which this {type(model).__name__} has not; load it "
            "onto the base model it was made for"
        )
    shape = tuple(weight.shape)
    shape = shape[::-1] if type(module).__name__ == "Conv1D" else shape
    if weight.is_floating_point() and shape != wanted:
        raise ValueError(
            f"this pack changes {name} of shape {wanted}, and this model's is {shape}; load "
            "it onto the base model it was made for"
        )


def require_joinable(packs: Sequence[Pack], names: Sequence[str], layers: str) -> Pack:
    """Check that packs, by these names, go together; ``layers`` is one of ``LAYERS``.

    Returns:
        The first pack that holds edits, or else the first, emptied; with the modules of all.

    Raises:
        ValueError: what does not go together.

    Warns:
        UserWarning: bases that cannot be compared.
    """
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


def _same_base(one: PackContents, other: PackContents, pair: str) -> None:
    if one is other:
        return
    if one.fan_in_fan_out != other.fan_in_fan_out:
        raise ValueError(f"{pair} are of different bases: one keeps its weights transposed")
    same = None if one.base is None or other.base is None else one.base.matches(other.base)
    if one.base is None or other.base is None or same is None:
        warnings.warn(
            f"whether {pair} are of one base is not known: a fingerprint is missing, or was taken "
            "of quantised weights",
            stacklevel=5,  # of EditPack.join
        )
    elif not same:
        raise ValueError(
            f"{pair} are of different bases: {one.base.describe_mismatch(other.base)}; only edits "
            "of one base can be joined"
        )


def _same_null_space(one: PackContents, other: PackContents, pair: str) -> None:
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


def _emptied(first: Pack, packs: Sequence[Pack], names: Sequence[str]) -> Pack:
    factors: Factors = {}
    for name, pack in zip(names, packs, strict=True):
        for module, delta in pack.factors.items():
            empty = delta.first(0)
            known = factors.setdefault(module, empty)
            there, here = ((d.B.shape[0], d.A.shape[1]) for d in (known, empty))
            if there != here:
                raise ValueError(
                    f"{module} is {here} in {name} and {there} in another pack; only "
                    "edits of one base can be joined"
                )
    layers = sorted({layer for pack in packs for layer in pack.config.rewrite_layers or ()})
    bases = [pack.base for pack in packs if pack.base is not None]
    return replace(
        first,
        factors=factors,
        records=(),
        targets=None,
        config=replace(first.config, rewrite_layers=layers) if layers else first.config,
        base=max(bases, key=lambda base: base.last_layer, default=None),
        compression=None,
    )

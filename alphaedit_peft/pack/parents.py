"""What a pack was made from, and which packs act together: those on top of others, and those below.

In: packs, with what each records of its parents. Out: the entry that a new pack records, a parent
in words, the parents that a pack stands on (``beside``), and for each of several packs those whose
updates act on its keys besides its own. A pack on top of others holds only what is left to do once
they act.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphaedit_peft.pack.contents import Pack, PackContents

BESIDE = "beside"  # the operation that a pack records of a parent it stands on
_USES = {  # of a parent, by the operation that a pack records
    BESIDE: "on top of",
    "join": "joined from",
    "remove": "taken out of",
    "compress": "compressed from",
}


class MissingParentError(ValueError):
    """A pack that stands on one which is not active before it: which on which, and what to do."""

    def __init__(self, missing: str, remedy: str) -> None:
        super().__init__(f"{missing}, {remedy}")
        self.missing = missing


def parent_entry(operation: str, pack: PackContents, **more: str) -> dict[str, Any]:
    """What a new pack records of one it is made from; what that one had lost by rounding too."""
    entry = {"operation": operation, **more, "digest": pack.digest(), "edits": len(pack.edits)}
    if pack.compression is not None:
        entry["compression"] = pack.compression.to_json()
    return entry


def stands_on(parents: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of a pack's recorded parents that have to act beside it."""
    return [parent for parent in parents if parent.get("operation") == BESIDE]


def parent_in_words(parent: Mapping[str, Any]) -> str:
    """One of a pack's recorded parents: how it was used, its name, number of edits, digest."""
    operation = str(parent.get("operation", "made from"))
    use = _USES.get(operation, operation)
    name = f" {parent['name']}" if parent.get("name") else ""
    edits = f", {parent['edits']} edits" if "edits" in parent else ""
    digest = str(parent.get("digest", ""))[:12] or "unknown"
    made = parent.get("compression")
    rounded = f", {made.get('dtype')} factors" if isinstance(made, Mapping) else ""
    return f"{use}{name}{edits}, digest {digest}{rounded}"


def require_alone(pack: PackContents, what: str, remedy: str) -> None:
    """Refuse ``what`` would take a pack for the whole, as in "it cannot be exported alone".

    Raises:
        ValueError: it stands on others; names them, and the ``remedy``.
    """
    named = " and ".join(parent_in_words(parent) for parent in stands_on(pack.parents))
    if named:
        raise ValueError(
            f"this pack was edited {named}, and holds only what differs from there, so {what}; "
            f"{remedy}"
        )


def acting(packs: Sequence[Pack], names: Sequence[str]) -> list[list[Pack]]:
    """For each pack, the packs among those given that act on its keys as they were made.

    These are itself, those that it stands on, directly or not, and those on top of it, which keep
    its outputs nearly: the sum of their updates is what the chain does.

    Raises:
        ValueError: a pack that comes before one it stands on.

    Warns:
        UserWarning: a pack stands on one that is not given.
    """
    digests = [pack.digest() for pack in packs]
    below = {d: _below(packs, digests, i, names) for i, d in enumerate(digests)}
    for _ in digests:  # chains have at most as many links as there are packs
        below = {d: found.union(*(below[f] for f in found)) for d, found in below.items()}
    one_of = dict(zip(digests, packs, strict=True))
    return [
        [p for other, p in one_of.items() if other == d or other in below[d] or d in below[other]]
        for d in digests
    ]


def _below(
    packs: Sequence[PackContents], digests: Sequence[str], number: int, names: Sequence[str]
) -> set[str]:
    """Digests of the given packs that one of them stands on, each of which comes before it."""
    found: set[str] = set()
    for parent in stands_on(packs[number].parents):
        digest = str(parent.get("digest"))
        if digest not in digests:
            warnings.warn(
                f"{names[number]} was edited {parent_in_words(parent)}, and that pack is not among "
                "those joined (or has changed since), so the joined pack still stands on it and "
                "acts as made only beside it; give that pack too, first, for one that stands alone",
                stacklevel=5,
            )
        elif digests.index(digest) >= digests.index(digests[number]):
            raise ValueError(
                f"{names[number]} was edited on top of {names[digests.index(digest)]}, which comes "
                "after it; give the packs in the order in which they were made, the parent first"
            )
        else:
            found.add(digest)
    return found

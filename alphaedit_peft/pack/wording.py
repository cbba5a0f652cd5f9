"""What a pack records of its making, in words: its parents, and what compression cost.

In: an entry of ``EditPack.parents``, ``EditPack.compression``, or ids of edits. Out: a line of
plain text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphaedit_peft.pack.compress import Compression

_USES = {  # of a parent, by the operation that a pack records
    "beside": "on top of",
    "join": "joined from",
    "remove": "taken out of",
    "compress": "compressed from",
}


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


def compressed(made: Compression) -> str:
    """What was done to a pack's factors, and what it cost at most, in a line."""
    how = f"from {made.rows} rows, " if made.mixed else ""
    delta, outputs = (max(e.values(), default=0.0) for e in (made.delta_errors, made.output_errors))
    return f"{how}{made.dtype}; Delta off by {delta:.2g}, the edits' outputs by {outputs:.2g}"


def few(ids: Collection[str], most: int = 10) -> str:
    """Ids of edits in their order, the first of them and a count where there are many."""
    shown = sorted(ids)
    more = len(shown) - most
    return f"{shown[:most]} and {more} more" if more > 0 else str(shown)

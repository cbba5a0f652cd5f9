"""Which rows of several packs go into one: repetitions and contradictions settled.

In: packs. Out: the rows to keep, and the edits left out with the reason. Two rows of different
packs cannot both stay where they have one key, or where two of their edits fill one prompt alike:
equal edits are kept once, and for others a rule decides. A row stays or goes as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from alphaedit_peft.edits import Edit, told
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.pack.edit_record import EditRecord, asked

RULES = ("error", "first", "last")


@dataclass(frozen=True)
class LeftOut:
    """An edit that did not go into the joined pack: its id, its pack's name, and why."""

    id: str
    pack: str
    reason: str


def says(edit: Edit) -> tuple[str, str]:
    """What an edit asks, word by word, and answers."""
    return asked(edit), edit.target_new.strip()


def by_row(records: Iterable[EditRecord]) -> dict[int, list[EditRecord]]:
    """The records that stand, by their row."""
    found: dict[int, list[EditRecord]] = {}
    for record in records:
        if record.role != "superseded":
            found.setdefault(record.row, []).append(record)
    return found


@dataclass(frozen=True)
class _Row:
    """A row in force: number of its pack, number within that, and its standing records."""

    pack: int
    number: int
    records: tuple[EditRecord, ...]

    @property
    def claims(self) -> dict[str, str]:
        """Filled prompts, word by word, and what each shall be continued by."""
        return dict(says(r.edit) for r in self.records)

    @property
    def own(self) -> bool:
        """Whether an edit of its pack made the row, rather than one of a parent's."""
        return any(record.role == "own" for record in self.records)

    def __str__(self) -> str:
        edits = (record.edit for record in self.records)
        return ", ".join(f"{e.id} ({told(e)})" for e in edits)


def settle(
    packs: Sequence[PackContents], names: Sequence[str], on_conflict: str, key_cosine: float
) -> tuple[list[list[int]], tuple[LeftOut, ...]]:
    """Choose the rows that one pack can hold.

    Args:
        packs: that go together, see ``require_joinable``.
        names: of the packs.
        on_conflict: one of ``RULES``.
        key_cosine: rows at least this alike, in the first module that all edit, are one key.

    Returns:
        Numbers of rows by pack, ascending; and the edits of all other rows in force.

    Raises:
        ValueError: a contradiction under ``error``.
    """
    rows = [
        _Row(number, row, tuple(members))
        for number, pack in enumerate(packs)
        for row, members in sorted(by_row(pack.records).items())
    ]
    gone: dict[int, str] = {}
    pairs = _meetings(packs, rows, key_cosine)
    for u, v in reversed(pairs) if on_conflict == "last" else pairs:  # winners are settled first
        if u in gone or v in gone:
            continue
        loser, reason = _loser(rows[u], rows[v], names, on_conflict)
        gone[u if loser is rows[u] else v] = reason
    left_out = tuple(
        LeftOut(record.edit.id, names[rows[i].pack], reason)
        for i, reason in sorted(gone.items())
        for record in rows[i].records
        if record.role == "own"
    )
    chosen: list[list[int]] = [[] for _ in packs]
    for i, row in enumerate(rows):
        if i not in gone:
            chosen[row.pack].append(row.number)
    return chosen, left_out


def _meetings(
    packs: Sequence[PackContents], rows: Sequence[_Row], key_cosine: float
) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of rows of different packs that share a key or a filled prompt."""
    pairs: set[tuple[int, int]] = set()
    holders: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        contexts = packs[row.pack].contexts  # a prefix tells the key, among equal contexts
        prefixes = {(contexts, record.prefix) for record in row.records if record.prefix}
        for text in (*row.claims, *prefixes):
            pairs.update((j, i) for j in holders.get(text, ()))
            holders.setdefault(text, []).append(i)
    common = [m for m in packs[0].modules if all(m in pack.factors for pack in packs)]
    if common and rows:
        keys = torch.stack([packs[r.pack].factors[common[0]].A[r.number].double() for r in rows])
        unit = torch.nn.functional.normalize(keys, dim=1)
        alike = (unit @ unit.T >= key_cosine).triu(1)
        pairs.update((u, v) for u, v in alike.nonzero().tolist())
    return sorted((u, v) for u, v in pairs if rows[u].pack != rows[v].pack)


def _loser(one: _Row, other: _Row, names: Sequence[str], rule: str) -> tuple[_Row, str]:
    """Which of two rows, an earlier and a later pack's, is left out, and why."""
    said, too = one.claims.items(), other.claims.items()
    if said < too or too < said:
        first = too < said
    elif said == too and one.own != other.own:
        first = one.own
    elif said != too and rule == "error":
        raise ValueError(_contradiction(one, other, names))
    else:
        first = rule != "last"
    keeps, loses = (one, other) if first else (other, one)
    if loses.claims.items() <= keeps.claims.items():
        return loses, f"{names[keeps.pack]} has it too"
    kept = ", ".join(record.edit.id for record in keeps.records)
    return loses, f"edit {kept} of {names[keeps.pack]} has its key or prompt"


def _contradiction(one: _Row, other: _Row, names: Sequence[str]) -> str:
    how = "contradict each other" if one.claims.keys() & other.claims.keys() else "have one key"
    return (
        f"edits {one} of {names[one.pack]} and {other} of {names[other.pack]} {how}, and a key has "
        "one value; choose with on_conflict='first' or 'last', or make them together with edit()"
    )

"""What a reader found in its records: repeats, shared subjects, contradictions.

In: cases in the order read. Out: the cases to keep, and a :class:`DataReport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alphaedit_peft.evaluation.cases import Case

SHOWN = 3


@dataclass(frozen=True)
class DataReport:
    """What was read.

    Attributes:
        source: name of the file or dataset.
        layout: how its records were read.
        records: how many there were.
        kept: how many cases came of them.
        duplicates: record numbers dropped, because their edit was there before.
        shared_subjects: subject -> number of kept cases, where that is more than one. Such edits
            share a key if they are made in one batch.
        contradictions: pairs of record numbers that give one prompt two targets. Both are kept;
            one pack cannot hold both.
    """

    source: str
    layout: str
    records: int
    kept: int
    duplicates: tuple[int, ...] = ()
    shared_subjects: tuple[tuple[str, int], ...] = ()
    contradictions: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.source} ({self.layout}): {self.records} records, {self.kept} cases"]
        if self.duplicates:
            parts.append(
                f"{_many(self.duplicates, 'duplicate')} dropped ({_some(self.duplicates)})"
            )
        if self.shared_subjects:
            sharing = sum(count for _, count in self.shared_subjects)
            parts.append(f"{sharing} cases share {_many(self.shared_subjects, 'subject')}")
        if self.contradictions:
            pairs = [f"{a} and {b}" for a, b in self.contradictions]
            parts.append(f"{_many(pairs, 'contradiction')} (records {_some(pairs)})")
        return "; ".join(parts)


def sift(source: str, layout: str, cases: Sequence[Case]) -> tuple[tuple[Case, ...], DataReport]:
    """Drop repeated edits, and say what else to know; ``cases`` has one entry a record.

    Two edits are the same when subject, prompt and new target are; the first one stays.
    """
    kept: dict[tuple[str, str, str], int] = {}
    targets: dict[tuple[str, str], int] = {}
    duplicates, contradictions = [], []
    for number, case in enumerate(cases):
        edit = case.edit
        asked = (edit.question, edit.subject)
        told = (*asked, edit.target_new)
        if told in kept:
            duplicates.append(number)
            continue
        kept[told] = number
        if asked in targets:
            contradictions.append((targets[asked], number))
        targets.setdefault(asked, number)
    found = tuple(cases[number] for number in kept.values())
    subjects = Counter(case.edit.subject for case in found)
    shared = tuple((subject, n) for subject, n in subjects.items() if n > 1)
    report = DataReport(
        source, layout, len(cases), len(found), tuple(duplicates), shared, tuple(contradictions)
    )
    return found, report


def _some(values: Sequence[object]) -> str:
    more = "" if len(values) <= SHOWN else ", ..."
    return ", ".join(str(value) for value in values[:SHOWN]) + more


def _many(values: Sequence[object], noun: str) -> str:
    return f"{len(values)} {noun}{'s' * (len(values) != 1)}"

"""Where records of datasets come from, and what was found in all of them together.

In: a file, a dataset of ``datasets``, or dicts. Out: :class:`Record` values; and what to know of
all cases together, a :class:`DataReport`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.cases import Case
from alphaedit_peft.messages import PLACE, shown, tail
from alphaedit_peft.nullspace.corpus import dataset_loader
from alphaedit_peft.records import Record, as_records, read_records
from alphaedit_peft.text_files import DataError

LISTED = 3  # entries in a report


def raw_records(
    source: str | Path | Iterable[Mapping[str, Any] | Record],
    split: str | None = None,
    limit: int | None = None,
) -> tuple[str, list[Record]]:
    """A name for the source, and its records, ``limit`` of them at most.

    Args:
        source: a file that ``read_records`` reads, the name of a Hub dataset or a folder that
            ``datasets`` reads, or an iterable of dicts.
        split: of a dataset; must be given there, and only there.
        limit: None for all.

    Raises:
        DataError: no records.
        FileNotFoundError: no such file, and no split that would make it a dataset.
        ImportError: a dataset, without ``datasets`` installed.
    """
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise DataError(f"source={shown(source)} is a {kind}, not a list of records")
        return kind, as_records(islice(source, limit), kind)
    path = Path(source)
    if split is not None and path.is_file():
        raise DataError(f"split={shown(split)} is for datasets, but {path} is a file; leave it out")
    if split is not None:
        found = dataset_loader(f"source={shown(str(source))}")(str(source), split=split)
        return f"{source}:{split}", as_records(islice(found, limit), str(source))
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(
            f"{tail(str(path), PLACE)} is no file; to read a dataset of that name, give its split "
            "too, such as train"
        )
    return path.name, read_records(path)[:limit]


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
            dropped = _many(self.duplicates, "duplicate")
            parts.append(f"{dropped} dropped ({_some(self.duplicates)})")
        if self.shared_subjects:
            sharing = sum(count for _, count in self.shared_subjects)
            parts.append(f"{sharing} cases share {_many(self.shared_subjects, 'subject')}")
        if self.contradictions:
            pairs = [f"{a} and {b}" for a, b in self.contradictions]
            parts.append(f"{_many(pairs, 'contradiction')} (records {_some(pairs)})")
        return "; ".join(parts)


def sift(
    source: str, layout: str, read: Sequence[Case | tuple[Case, ...]]
) -> tuple[tuple[Case, ...], DataReport]:
    """Drop repeated edits, and say what else to know; ``read`` has one entry a record.

    Two edits are the same when subject, prompt and new target are; the first one stays, and gets
    the questions about what follows from the others.
    """
    kept: dict[tuple[str, str, str], Case] = {}
    targets: dict[tuple[str, str], int] = {}
    duplicates, contradictions = [], []
    each = (
        (n, c)
        for n, found in enumerate(read)
        for c in (found if isinstance(found, tuple) else (found,))
    )
    for number, case in each:
        asked = (case.edit.question, case.edit.subject)
        told = (*asked, case.edit.target_new)
        if told in kept:
            duplicates.append(number)
            follows = dict.fromkeys((*kept[told].portability, *case.portability))
            kept[told] = replace(kept[told], portability=tuple(follows))
            continue
        kept[told] = case
        if asked in targets:
            contradictions.append((targets[asked], number))
        targets.setdefault(asked, number)
    subjects = Counter(case.edit.subject for case in kept.values())
    shared = tuple((subject, n) for subject, n in subjects.items() if n > 1)
    report = DataReport(
        source, layout, len(read), len(kept), tuple(duplicates), shared, tuple(contradictions)
    )
    return tuple(kept.values()), report


def _some(values: Sequence[object]) -> str:
    more = "" if len(values) <= LISTED else ", ..."
    return ", ".join(str(value) for value in values[:LISTED]) + more


def _many(values: Sequence[object], noun: str) -> str:
    return f"{len(values)} {noun}{'s' * (len(values) != 1)}"

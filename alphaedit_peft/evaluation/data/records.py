"""Records of datasets: where they are read from, strict access to their fields, what was found.

In: a file, a dataset of ``datasets``, or dicts. Out: :class:`Record`, whose fields are texts, lists
and nested records, or a :class:`DataError` that names file, record and field; and what to know of
all cases together, a :class:`DataReport`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.cases import Case

SHOWN = 60  # characters of a value in an error
LISTED = 3  # entries in a report


class DataError(ValueError):
    """A record that is not what its layout says; names file, record number and field."""


@dataclass(frozen=True)
class Record:
    """One record, with its place: ``source`` is the file, ``number`` counts from 0.

    Raises:
        DataError: values that are no object; of every access, a field that is missing or wrong.
    """

    values: Mapping[str, Any]
    source: str
    number: int
    within: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            shown = _shown(self.values)
            raise DataError(f"{self.source}, record {self.number}: {shown} is not a JSON object")

    def error(self, field: str, problem: str) -> DataError:
        """An error about a field of this record."""
        return DataError(f"{self.source}, record {self.number}, field {self._path(field)}{problem}")

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def allow(self, *fields: str) -> None:
        """Refuse fields that the layout does not have."""
        unknown = sorted(set(self.values) - set(fields))
        if unknown:
            raise self.error(unknown[0], f" is unknown; this layout has {sorted(fields)}")

    def text(self, field: str) -> str:
        """A field that is text, not empty."""
        return self._as_text(field, self._get(field))

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that is a list of texts; nothing where it is missing."""
        return tuple(self._as_text(f"{field}[{i}]", v) for i, v in enumerate(self._list(field)))

    def record(self, field: str) -> Record:
        """A field that is an object."""
        return self._as_record(field, self._get(field))

    def records(self, field: str) -> tuple[Record, ...]:
        """A field that is a list of objects; nothing where it is missing."""
        return tuple(self._as_record(f"{field}[{i}]", v) for i, v in enumerate(self._list(field)))

    def alternatives(self, field: str) -> tuple[str, ...]:
        """A text, a list of texts, or a list of such lists: the answers in it, in order."""
        found: list[str] = []
        waiting = [self._get(field)]
        while waiting:
            value = waiting.pop(0)
            if isinstance(value, str):
                found += [value] if value.strip() else []
            elif isinstance(value, (list, tuple)):
                waiting = [*value, *waiting]
            else:
                raise self.error(field, f" holds {_shown(value)}, which is not text")
        if not found:
            raise self.error(field, f"={_shown(self._get(field))} holds no answer")
        return tuple(dict.fromkeys(found))

    def prompt_with_slot(self, field: str, subject: str) -> str:
        """A whole prompt as an edit's prompt: ``{}`` in the place of the subject.

        Where the subject stands in it more than once, the last one is the slot: keys are causal,
        so only there everything before the answer has been read.

        Raises:
            DataError: the subject does not stand in the prompt, or the prompt holds braces.
        """
        prompt = self.text(field)
        if "{}" in prompt:
            raise self.error(field, f"={_shown(prompt)} holds '{{}}', but should be a whole prompt")
        head, found, tail = prompt.rpartition(subject)
        if not found:
            raise self.error(field, f"={_shown(prompt)} does not hold the subject {subject!r}")
        return head + "{}" + tail

    def _get(self, field: str) -> Any:
        if field not in self.values:
            raise self.error(field, f" is missing; the record has {sorted(self.values)}")
        return self.values[field]

    def _list(self, field: str) -> list[Any]:
        value = self.values[field] if self.has(field) else []
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"={_shown(value)} is a {type(value).__name__}, not a list")
        return list(value)

    def _as_text(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"={_shown(value)} is a {type(value).__name__}, not text")
        if not value.strip():
            raise self.error(field, f"={value!r} is empty; give it a text or drop the record")
        return value

    def _as_record(self, field: str, value: object) -> Record:
        if not isinstance(value, Mapping):
            raise self.error(field, f"={_shown(value)} is a {type(value).__name__}, not an object")
        return Record(value, self.source, self.number, self._path(field))

    def _path(self, field: str) -> str:
        return ".".join(filter(None, (self.within, field)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def raw_records(
    source: str | Path | Iterable[Mapping[str, Any]], split: str | None = None
) -> tuple[str, list[Any]]:
    """A name for the source, and its records.

    Args:
        source: a file (``.jsonl`` has one object a line, others hold a JSON list), the name of a
            Hub dataset or a folder that ``datasets`` reads, or an iterable of dicts.
        split: of a dataset; must be given there, and only there.

    Raises:
        DataError: no JSON, or no list of objects.
        FileNotFoundError: no such file, and no split that would make it a dataset.
        ImportError: a dataset, without ``datasets`` installed.
    """
    if not isinstance(source, (str, Path)):
        kind = type(source).__name__
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise DataError(f"source={source!r} is a {kind}, not a list of records")
        return kind, list(source)
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise DataError(f"split={split!r} is for datasets, but {path} is a file; leave it out")
        if path.suffix == ".jsonl":
            return path.name, _lines(path)
        return path.name, read_list(path, "list of records")
    if split is None:
        raise FileNotFoundError(
            f"{path} is no file; to read a dataset of that name, give its split too, such as train"
        )
    return f"{source}:{split}", _dataset(str(source), split)


def read_list(path: Path, what: str = "list") -> list[Any]:
    """The list in a JSON file; raises DataError where it holds none, or no JSON in UTF-8."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON in UTF-8: {error}") from error
    if not isinstance(found, list):
        raise DataError(f"{path.name} holds a {type(found).__name__}, not a {what}")
    return found


def _lines(path: Path) -> list[Any]:
    records, number = [], 0
    try:
        # newline="\n": JSON strings may hold other line separators
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                number += 1
                if line.strip():
                    records.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not text in UTF-8: {error}") from error
    except ValueError as error:
        raise DataError(f"{path.name}, line {number} is not JSON: {error}") from error
    return records


def _dataset(name: str, split: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"source={name!r} is no file, and to read it as a dataset needs `pip install datasets`"
        ) from error
    return list(load_dataset(name, split=split))


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


def sift(source: str, layout: str, cases: Sequence[Case]) -> tuple[tuple[Case, ...], DataReport]:
    """Drop repeated edits, and say what else to know; ``cases`` has one entry a record.

    Two edits are the same when subject, prompt and new target are; the first one stays.
    """
    kept: dict[tuple[str, str, str], int] = {}
    targets: dict[tuple[str, str], int] = {}
    duplicates, contradictions = [], []
    for number, case in enumerate(cases):
        asked = (case.edit.question, case.edit.subject)
        told = (*asked, case.edit.target_new)
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
    more = "" if len(values) <= LISTED else ", ..."
    return ", ".join(str(value) for value in values[:LISTED]) + more


def _many(values: Sequence[object], noun: str) -> str:
    return f"{len(values)} {noun}{'s' * (len(values) != 1)}"

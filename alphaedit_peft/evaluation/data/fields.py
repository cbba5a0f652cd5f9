"""Strict access to the fields of one record of a dataset.

In: a record as plain JSON values, and where it stands. Out: its fields as texts, lists and nested
records, or a :class:`DataError` that names file, record and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 60


class DataError(ValueError):
    """A record that is not what its layout says; names file, record number and field."""


@dataclass(frozen=True)
class Record:
    """One record, with its place: ``source`` is the file, ``number`` counts from 0."""

    values: Mapping[str, Any]
    source: str
    number: int
    within: str = ""

    @classmethod
    def of(cls, values: object, source: str, number: int) -> Record:
        """A record of what was read, which must be an object.

        Raises:
            DataError: something else.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"{source}, record {number}: {_shown(values)} is not a JSON object")
        return cls(values, source, number)

    def error(self, field: str, problem: str) -> DataError:
        """An error about a field of this record."""
        return DataError(f"{self.source}, record {self.number}, field {self._path(field)}{problem}")

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def allow(self, *fields: str) -> None:
        """Refuse fields that the layout does not have.

        Raises:
            DataError: an unknown field.
        """
        unknown = sorted(set(self.values) - set(fields))
        if unknown:
            raise self.error(unknown[0], f" is unknown; this layout has {sorted(fields)}")

    def text(self, field: str) -> str:
        """A field that is text, not empty.

        Raises:
            DataError: it is missing or something else.
        """
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

"""Records that users give: read from JSON, JSON Lines or CSV, and strict access to their fields.

In: a file, or dicts. Out: :class:`Record`, whose fields are texts, lists and nested records, or a
:class:`DataError` that names file, place and field, what is wrong and what to do.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaedit_peft.messages import LONGEST, PLACE, cut, shown, tail
from alphaedit_peft.text_files import MAX_LINE, DataError, fault, is_text, read_text

SHOWN = 100  # characters of a value in an error, which has place, field and advice beside it
DEEPEST = 32  # of lists and objects within each other
DIGITS = 400  # of a number
HOW = 'write one edit a line: {"subject": ..., "prompt": "... {} ...", "target_new": ...}'
_TEXTS = {"subject", "prompt", "target_new", "target_true", "id"}
LISTS = {"paraphrases", "neighborhood", "anchors", "generation", "references"}
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One record, with its place: ``source`` is the file, ``place`` the line or number in it.

    Raises:
        DataError: values that are no object, or that hold what is no text; of every access, a field
            that is missing or wrong.
    """

    values: Mapping[str, Any]
    source: str
    place: str
    within: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            wrong = f"{shown(self.values, SHOWN)} is a {type(self.values).__name__}, no JSON object"
            raise fault(self.where, wrong, "an edit or case is an object with named fields")
        if not self.within and (wrong := _unsound(self.values)):
            raise fault(self.where, wrong, "mend or drop the record")

    @property
    def where(self) -> str:
        """The file and the place in it."""
        return f"{tail(self.source, PLACE - 30)}, {self.place}"

    def error(self, field: str, problem: str) -> DataError:
        """An error about a field of this record."""
        return DataError(cut(f"{self.where}, field {cut(self._path(field), 60)}{problem}", LONGEST))

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def allow(self, *fields: str) -> None:
        """Refuse fields that the layout does not have."""
        unknown = [name for name in self.values if name not in fields]
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
            value = waiting.pop()
            if isinstance(value, str):
                found += [value] if value.strip() else []
            elif isinstance(value, (list, tuple)):
                waiting += reversed(value)
            else:
                raise self.error(field, f" holds {shown(value, SHOWN)}, which is not text")
        if not found:
            raise self.error(field, f"={shown(self._get(field), SHOWN)} holds no answer")
        return tuple(dict.fromkeys(found))

    def prompt_with_slot(self, field: str, subject: str) -> str:
        """A whole prompt as an edit's prompt: ``{}`` in the place of the subject, if it has none.

        Where the subject stands in it more than once, the last one is the slot: keys are causal,
        so only there everything before the answer has been read. One that is part of a longer
        word ("Iran" in "Iranian") counts only where there is no other.

        Raises:
            DataError: neither stands in the prompt, or both.
        """
        prompt = self.text(field)
        told = f"={shown(prompt, SHOWN)}"
        if "{}" in prompt and subject not in prompt:
            return prompt
        if "{}" in prompt:
            raise self.error(field, f"{told} holds '{{}}', but should be a whole prompt")
        before, after = (r"\b" * bool(re.match(r"\w", end)) for end in (subject[0], subject[-1]))
        words = [m.start() for m in re.finditer(before + re.escape(subject) + after, prompt)]
        start = words[-1] if words else prompt.rfind(subject)
        if start < 0:
            wrong = f"{told} does not hold the subject {shown(subject, SHOWN)}"
            raise self.error(field, f"{wrong}; write it, or '{{}}' in its place")
        return prompt[:start] + "{}" + prompt[start + len(subject) :]

    def _get(self, field: str) -> Any:
        if field not in self.values:
            raise self.error(field, f" is missing; the record has {shown([*self.values])}")
        return self.values[field]

    def _list(self, field: str) -> list[Any]:
        value = self.values[field] if self.has(field) else []
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"={_typed(value)}, not a list")
        return list(value)

    def _as_text(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"={_typed(value)}, not text")
        if not value.strip():
            wrong = f"={shown(value, SHOWN)} is empty; give it a text or drop the record"
            raise self.error(field, wrong)
        return value

    def _as_record(self, field: str, value: object) -> Record:
        if not isinstance(value, Mapping):
            raise self.error(field, f"={_typed(value)}, not an object")
        return Record(value, self.source, self.place, self._path(field))

    def _path(self, field: str) -> str:
        return ".".join(filter(None, (self.within, field)))


def read_records(path: str | Path) -> list[Record]:
    """The records of a file: a JSON list, JSON objects one a line, or a table with a header.

    What the file holds decides, not its name. A table's cells are separated by commas, semicolons
    or tabs; an empty cell is a field that is not there, and ``LISTS`` hold a text or a JSON list.

    Raises:
        DataError: a file of another kind, or damaged; names the line, or the number in a list.
        FileNotFoundError: no such file.
    """
    text = read_text(path)
    begins = text[: _BLANK.match(text).end() + 1].strip()  # type: ignore[union-attr]
    if not begins:
        return []
    read = {"[": _of_list, "{": _of_lines}.get(begins, _of_table)
    return list(read(text, path))


def as_records(values: Iterable[Any], source: str) -> list[Record]:
    """Dicts at hand as records, numbered from 0; what is a record already keeps its place."""
    return [
        value if isinstance(value, Record) else Record(value, source, f"record {number}")
        for number, value in enumerate(values)
    ]


def read_record(line: str, path: str | Path, number: int) -> Record:
    """The record of one line, a JSON object.

    Raises:
        DataError: something else on that line.
    """
    place, remedy = f"{path}, line {number}", "write one JSON object a line"
    if len(line) > MAX_LINE:
        raise fault(place, f"the line is longer than {MAX_LINE:,} characters", remedy)
    return Record(_only_value(line, place, HOW, remedy), str(path), f"line {number}")


def read_object(path: str | Path) -> dict[str, Any]:
    """The one JSON object that a file holds, such as settings; raises as ``read_records``."""
    remedy = "write one JSON object"
    values = _only_value(read_text(path), str(path), remedy, remedy)
    if not isinstance(values, dict):
        raise fault(path, f"it holds a {type(values).__name__}, not an object", remedy)
    if wrong := _unsound(values):
        raise fault(path, wrong, remedy)
    return values


def json_kind(line: str) -> type | None:
    """What JSON value a line holds, and nothing else: dict, list ...; None for other text."""
    try:
        return type(parse_json(line))
    except ValueError:
        return None


def parse_json(text: str) -> Any:
    """The JSON value that a text is, read strictly; blanks may stand around it.

    Raises:
        json.JSONDecodeError: no JSON, or more than that.
        ValueError: NaN or infinity, a field that is there twice, a number of many digits, or
            nesting beyond what the interpreter can follow.
    """
    value, end = _parsed(text, _after_blank(text, 0))
    if (end := _after_blank(text, end)) < len(text):
        raise json.JSONDecodeError("something follows it", text, end)
    return value


def _parsed(text: str, at: int) -> tuple[Any, int]:
    """A JSON value from a place in a text on, and where it ends; raises as ``parse_json``."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice, SHOWN)} is there twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{cut(number, SHOWN)} is no finite number")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_int=_whole, parse_float=_finite, parse_constant=_finite
)


def _of_list(text: str, path: str | Path) -> Iterator[Record]:
    at = _after_blank(text, 0) + 1
    for number in itertools.count():
        place = f"{path}, record {number}"
        at = _after_blank(text, at)
        if number or not text.startswith("]", at):
            values, at = _value(text, at, place, "mend this record")
            yield Record(values, str(path), f"record {number}")
            at = _after_blank(text, at)
            if text.startswith(",", at):
                at += 1
                continue
        if not text.startswith("]", at) or _after_blank(text, at + 1) < len(text):
            raise _no_json(text, at, place, "a comma or the list's end is due", "mend this record")
        return


def _of_lines(text: str, path: str | Path) -> Iterator[Record]:
    """Objects one a line; or over several lines, where the first line is none by itself."""
    first = text.lstrip().partition("\n")[0]
    try:
        _parsed(first[:MAX_LINE], 0)
    except json.JSONDecodeError:
        if len(first) <= MAX_LINE:
            yield from _of_objects(text, path)
            return
    except ValueError:
        pass  # it is JSON, and will be refused with its place
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield read_record(line, path, number)


def _of_objects(text: str, path: str | Path) -> Iterator[Record]:
    at, seen, number = 0, 0, 1
    while (at := _after_blank(text, at)) < len(text):
        number += text.count("\n", seen, at)
        seen = at
        values, at = _value(text, at, f"{path}, line {number}", HOW)
        yield Record(values, str(path), f"line {number}")


def _only_value(text: str, place: str, remedy: str, alone: str) -> Any:
    """The value that a text is; ``alone``: what to do where more stands there."""
    value, end = _value(text, _after_blank(text, 0), place, remedy)
    if _after_blank(text, end) < len(text):
        raise _no_json(text, end, place, "something follows it", alone)
    return value


def _value(text: str, at: int, place: str, remedy: str) -> tuple[Any, int]:
    try:
        return _parsed(text, at)
    except json.JSONDecodeError as error:
        below = text.count("\n", at, error.pos)
        why = error.msg + (f", {below} lines below" if below else "")
        raise _no_json(text, error.pos, place, why, remedy) from None
    except ValueError as error:
        raise fault(place, str(error), remedy) from None


def _no_json(text: str, at: int, place: str, why: str, remedy: str) -> DataError:
    """What stands where JSON should, and what it may be instead."""
    around = text[max(at - 20, text.rfind("\n", 0, at) + 1) : at + 20].partition("\n")[0]
    if why.startswith("Unterminated string"):
        begun = shown(text[at : at + 40].rstrip())
        wrong = f"the text ends within the string {begun}"
        return fault(place, wrong, "close or download it again")
    if at >= len(text.rstrip()):
        return fault(place, f"the text ends in the middle ({why})", "write or download it again")
    if text.startswith("'", at):
        remedy = "it looks like Python, and JSON wants double quotes"
    return fault(place, f"{shown(around)} is no JSON ({why})", remedy)


def _after_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _of_table(text: str, path: str | Path) -> Iterator[Record]:
    header = text.lstrip("\r\n").partition("\n")[0].strip()
    if header.startswith("<"):
        raise fault(path, "it is a web page, or XML", "download the data, not the page about it")
    if "subject" not in (name.strip(' "') for name in re.split("[,;\t]", header.lower())):
        wrong = f"{shown(header, 40)} is no JSON, nor the header of a table with a column 'subject'"
        raise fault(f"{path}, line 1", wrong, HOW)
    delimiter = max(",;\t", key=header.count)
    spaced = f"{delimiter} " in header  # then spaces after separators belong to no cell
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    names: list[str] = []
    line = 1
    try:
        for row in rows:
            place = f"{path}, line {line}"
            if any(row) and names:
                yield Record(_cells(names, row, place), str(path), f"line {line}")
            elif any(row):
                names = _columns(row, place)
            line = rows.line_num + 1
    except csv.Error as error:
        wrong = f"the table cannot be read from here on: {error}"
        raise fault(f"{path}, line {line}", wrong, "check the quotes") from None


def _columns(row: list[str], place: str) -> list[str]:
    names = [name.strip().lower().replace(" ", "_") for name in row]
    for name in filter(None, names):
        if names.count(name) > 1:
            raise fault(place, f"the column {shown(name)} is there twice", "name each once")
    return names


def _cells(names: list[str], row: list[str], place: str) -> dict[str, Any]:
    if len(row) != len(names):
        wrong = f"{len(row)} cells in a table of {len(names)} columns"
        raise fault(place, wrong, "put cells that hold the separator in double quotes")
    found: dict[str, Any] = {}
    for name, cell in zip(names, row, strict=True):
        if not cell:
            continue
        if not name:
            wrong = f"{shown(cell, 40)} stands in a column without a name"
            raise fault(place, wrong, "name it or take it out; pandas: to_csv(..., index=False)")
        found[name] = [cell] if name in LISTS else cell
        if cell.startswith(("[", '{"')) and name not in _TEXTS:
            remedy = "write a JSON list"
            found[name] = _only_value(cell, f"{place}, column {name}", remedy, remedy)
    return found


def _unsound(values: Mapping[str, Any]) -> str:
    """Why no edit can hold such values, or nothing: too deep, or texts that are none."""
    level: list[Any] = [values]
    for _ in range(DEEPEST):
        for value in level:
            if isinstance(value, str) and "\0" in value:
                return f"{shown(value, SHOWN)} holds a NUL character"
            if isinstance(value, str) and not is_text(value):
                return f"{shown(value, SHOWN)} holds half a surrogate pair, which is no character"
        level = [
            inner
            for value in level
            if isinstance(value, (Mapping, list, tuple))
            for inner in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return ""
    return f"lists or objects are nested more than {DEEPEST} deep"


def _typed(value: object) -> str:
    return f"{shown(value, SHOWN)} is a {type(value).__name__}"

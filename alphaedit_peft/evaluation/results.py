"""Results files: what is finished, one entry a line, so that a run can be taken up again.

In: entries as they are finished. Out: those finished before. The first line says how the others
were made; a file that was made otherwise is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaedit_peft import saving
from alphaedit_peft.messages import cut, sentence
from alphaedit_peft.safe_files import (
    MAX_RESULTS_BYTES,
    Field,
    check_fields,
    parse_json,
    read_bytes,
)

SHORT = 60  # characters of a value in an error


@dataclass(frozen=True)
class JsonLines:
    """A file whose first line is ``{kind: head}``.

    Attributes:
        path: the file; its folder must be there.
        kind: what the file holds, one word.
        head: what its lines depend on: how they were made, of what.
    """

    path: Path
    kind: str
    head: Mapping[str, Any]

    def read(self) -> list[dict[str, Any]]:
        """The finished lines; makes the file where it is missing or empty.

        Raises:
            ValueError: a file of something else, or one with another head.
        """
        head = json.loads(json.dumps(self.head))
        first = json.dumps({self.kind: head}, ensure_ascii=False).encode() + b"\n"
        found = read_bytes(self.path, MAX_RESULTS_BYTES) if self.path.exists() else b""
        if first.startswith(found) and found != first:  # new, or killed in the first line
            saving.replace_file(self.path, first)
            return []
        *lines, rest = found.split(b"\n")
        try:
            top, *entries = [parse_json(line, f"line {i}", _why) for i, line in enumerate(lines, 1)]
            before = check_fields(top, {self.kind: Field(dict)})[self.kind]
        except ValueError as error:
            wrong = f"it holds no results of a {self.kind} ({error})"
            raise ValueError(sentence(self.path, wrong, "name another file")) from error
        if before != head:
            wrong = f"it was made with {_difference(before, head)}"
            raise ValueError(sentence(self.path, wrong, "name another file"))
        if rest:  # killed in a line; nothing of the others is written again
            os.truncate(self.path, len(found) - len(rest))
        return entries

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append finished entries."""
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        saving.append(self.path, "".join(lines))


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> str:
    """The fields that differ, those of objects one by one, each as it was and as it is now."""
    told = []
    for name in dict.fromkeys((*before, *now)):
        old, new = (found.get(name, "nothing") for found in (before, now))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            told.append(_difference(old, new, f"{place}{name}."))
        else:
            told.append(f"{place}{name}={_short(old)}, not {_short(new)}")
    return ", ".join(told)


def _why(where: str | Path, wrong: str) -> ValueError:
    return ValueError(f"{where}: {wrong}")


def _short(value: object) -> str:
    return cut(str(value), SHORT)

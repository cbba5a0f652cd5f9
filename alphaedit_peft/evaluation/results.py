"""The results file of a run: judged cases, one a line, so that a run can be taken up again.

In: scores of cases as they are finished. Out: those finished before. The first line says how the
file was judged; a last line that a kill cut off is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.scores import CaseScores


@dataclass(frozen=True)
class Results:
    """A JSON Lines file of scores that were judged in the way ``how``."""

    path: Path
    how: Mapping[str, Any]

    def read(self) -> dict[str, CaseScores]:
        """Scores by case digest; makes the file where it is missing or empty.

        Raises:
            ValueError: a file of something else, or one judged in another way.
        """
        header = json.dumps({"judging": self.how}).encode() + b"\n"
        found = self.path.read_bytes() if self.path.exists() else b""
        if header.startswith(found) and found != header:  # new, or killed in the first line
            self.path.write_bytes(header)
            return {}
        *lines, rest = found.split(b"\n")
        try:
            first, *entries = [json.loads(line) for line in lines]
            before, cases = first["judging"], [CaseScores.from_json(entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no results of an evaluation ({error}); name another file"
            ) from error
        if before != json.loads(json.dumps(self.how)):
            raise ValueError(f"{self.path} was judged with {before}, not {self.how}; name another")
        if rest:
            self.path.write_bytes(b"".join(line + b"\n" for line in lines))
        return {case.digest: case for case in cases}

    def add(self, cases: Iterable[CaseScores]) -> None:
        """Append finished cases."""
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(c.to_json(), ensure_ascii=False) + "\n" for c in cases)

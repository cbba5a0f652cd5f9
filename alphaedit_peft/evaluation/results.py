"""The results file of a judgement: judged cases, one a line, so that it can be taken up again.

In: scores of cases as they are finished. Out: those finished before. The first line says how the
file was judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.lines import JsonLines
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
        entries = self._lines.read()
        try:
            cases = [CaseScores.from_json(entry) for entry in entries]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no results of an evaluation ({error}); name another file"
            ) from error
        return {case.digest: case for case in cases}

    def add(self, cases: Iterable[CaseScores]) -> None:
        """Append finished cases."""
        self._lines.add(case.to_json() for case in cases)

    @property
    def _lines(self) -> JsonLines:
        return JsonLines(self.path, "judging", self.how)

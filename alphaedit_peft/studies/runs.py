"""A run on disk: what it was made with, its finished steps, and the state to go on from.

In: a folder. Out: :class:`RunFolder`, which writes each step's state and lines so that a process
killed at any moment loses no finished step, and :class:`Run`, the findings.

    results.jsonl     the run's head, then a line a batch and a line a judgement
    cases-0004.jsonl  the cases as judged after batch 4, one a line
    state-0004/       the edited state after batch 4; only the last one is kept
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.intervals import Estimate
from alphaedit_peft.evaluation.lines import JsonLines
from alphaedit_peft.evaluation.scores import CaseScores, Scores

STATE = re.compile(r"state-(\d{4,})")


@dataclass(frozen=True)
class Checkpoint:
    """A judgement within a run.

    Attributes:
        batches: how many batches were made by then.
        edits: how many edits were asked for by then; all of them are judged.
        metrics: as in :class:`Scores`, over these edits' cases.
        by_batch: metric -> its mean over each batch's cases, the first batch first: how well edits
            hold by their age.
    """

    batches: int
    edits: int
    metrics: Mapping[str, Estimate]
    by_batch: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Checkpoint:
        """A checkpoint from what ``to_json`` gave."""
        metrics = {name: Estimate(**found) for name, found in values["metrics"].items()}
        by_batch = {name: tuple(means) for name, means in values["by_batch"].items()}
        return cls(values["batches"], values["edits"], metrics, by_batch)


@dataclass(frozen=True)
class Run:
    """What a run found.

    Attributes:
        head: everything that the numbers depend on, as plain JSON values.
        before: the unedited model's scores on all cases.
        checkpoints: in order; the last one is of all edits.
        cases: every case as judged at the end.
        made: how many edits were made; the rest were set aside.
        seconds: of the processor, spent on editing.
    """

    head: Mapping[str, Any]
    before: Scores
    checkpoints: tuple[Checkpoint, ...]
    cases: tuple[CaseScores, ...]
    made: int
    seconds: float

    @property
    def final(self) -> Checkpoint:
        """The judgement of all edits at the end."""
        return self.checkpoints[-1]

    def to_json(self) -> dict[str, Any]:
        """All but single cases and the unedited model, as plain JSON values."""
        return {
            "head": dict(self.head),
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
            "made": self.made,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path
    head: Mapping[str, Any]

    def begin(self) -> list[dict[str, Any]]:
        """The lines of finished steps; none in a new folder, which is made.

        Raises:
            ValueError: the folder holds a run that was made with something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return self._lines.read()

    def add(self, **line: Any) -> None:
        """Append a finished step."""
        self._lines.add([line])

    def cases(self, step: int) -> Path:
        """Where the cases of a judgement are kept."""
        return self.path / f"cases-{step:04d}.jsonl"

    def judged_cases(self, step: int) -> dict[str, CaseScores]:
        """The cases of a finished judgement, by digest."""
        lines = self.cases(step).read_bytes().split(b"\n")[1:-1]  # the head says how
        found = [CaseScores.from_json(json.loads(line)) for line in lines]
        return {case.digest: case for case in found}

    def state(self) -> tuple[int, Path | None]:
        """How many batches the saved state holds, and its folder; (0, None) at the beginning."""
        found = {int(m[1]): p for p in self.path.iterdir() if (m := STATE.fullmatch(p.name))}
        return max(found.items()) if found else (0, None)

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """Save the state after a batch and drop the one before; each folder appears whole."""
        _, old = self.state()
        save(self.path / f"state-{step:04d}")
        if old is not None:
            shutil.rmtree(old)

    @property
    def _lines(self) -> JsonLines:
        return JsonLines(self.path / "results.jsonl", "run", self.head)

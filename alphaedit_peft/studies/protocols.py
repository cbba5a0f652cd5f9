"""How edits are made and when they are judged: one alone, all at once, or batch after batch.

In: a :class:`Study`, a :class:`Method`, a folder. Out: a :class:`Run`. Every protocol can be killed
at any moment and called again: it goes on from the last finished batch, case or judgement, and ends
in the same numbers.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from alphaedit_peft import saving
from alphaedit_peft.evaluation import Case, CaseScores, Judging, Scores
from alphaedit_peft.evaluation.results import JsonLines
from alphaedit_peft.evaluation.summary import NUMBER, Estimate, estimates_from_json, gather
from alphaedit_peft.progress import counting
from alphaedit_peft.safe_files import Field, check_fields, json_lines, refusing
from alphaedit_peft.studies.base import Progress, Study, judged_before
from alphaedit_peft.studies.methods import Editor, Method, opened


@dataclass(frozen=True)
class Schedule:
    """In which order edits are made, and when they are judged."""

    batch_size: int = 100  # edits made together; the last batch may be smaller
    every: int = 0  # judge after every so many batches, and at the end; 0: at the end only
    order: int | None = None  # seed of a shuffle of the cases; None: in the given order

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.every < 0:
            raise ValueError(
                f"batch_size={self.batch_size}, every={self.every}: use batch_size >= 1, every >= 0"
            )

    def ordered(self, cases: Sequence[Case]) -> tuple[Case, ...]:
        """The cases in this order."""
        if self.order is None:
            return tuple(cases)
        return tuple(Random(f"order {self.order}").sample(list(cases), len(cases)))

    def is_due(self, batches: int, last: int) -> bool:
        """Whether a judgement follows this batch."""
        return batches == last or (self.every > 0 and batches % self.every == 0)


_WHOLE = Field(int, 0, 2**31)
_SPENT = {"made": _WHOLE, "seconds": Field((int, float), 0, 1e12)}
LINES = {  # of a run's results, by the field that tells which
    "run": {"run": Field(dict)},
    "batch": {"batch": _WHOLE, **_SPENT},
    "case": {"case": Field(dict), **_SPENT},
    "judged": {"judged": Field(dict)},
}
_CHECKPOINT = {
    "batches": _WHOLE,
    "edits": _WHOLE,
    "metrics": Field(dict),
    "by_batch": Field(dict, each=Field(list, each=NUMBER)),
}


@dataclass(frozen=True)
class Checkpoint:
    """A judgement within a run.

    ``by_batch`` is metric -> its mean over each batch's cases, the first batch first: how well
    edits hold by their age.
    """

    batches: int  # made by then
    edits: int  # asked for by then; all of them are judged
    metrics: Mapping[str, Estimate]  # as in :class:`Scores`, over these edits' cases
    by_batch: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Checkpoint:
        """A checkpoint from what ``to_json`` gave; a ValueError for anything else."""
        check_fields(values, _CHECKPOINT, "judgement")
        metrics = estimates_from_json(values["metrics"])
        by_batch = {name: tuple(means) for name, means in values["by_batch"].items()}
        return cls(values["batches"], values["edits"], metrics, by_batch)


def check_line(line: Mapping[str, Any]) -> None:
    """Refuse what is no line of a run's results."""
    kind = next((name for name in LINES if name in line), "batch")
    check_fields(line, LINES[kind])
    if kind == "judged":
        Checkpoint.from_json(line["judged"])
    elif kind == "case":
        CaseScores.from_json(line["case"])


@dataclass(frozen=True)
class Run:
    """What a run found."""

    head: Mapping[str, Any]  # everything that the numbers depend on, as plain JSON values
    before: Scores  # of the unedited model on all cases
    checkpoints: tuple[Checkpoint, ...]  # in order; the last one is of all edits
    cases: tuple[CaseScores, ...]  # as judged at the end
    made: int  # edits; the rest were set aside
    seconds: float  # of the processor, spent on editing

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


def sequential(
    study: Study,
    method: Method,
    folder: str | Path,
    schedule: Schedule,
    *,
    before: Scores | None = None,
    progress: Progress = lambda text: None,
) -> Run:
    """Make all edits batch after batch in one model; judge all made so far now and then.

    A run that is there in ``folder`` is taken up. ``before`` are the unedited model's scores, where
    they are known; else they are judged and kept beside.

    Raises:
        ValueError: the folder holds a run with something else, or as ``AlphaEditModel.edit``.
    """
    place = RunFolder(Path(folder), _head(study, method, "sequential", asdict(schedule)))
    with place.alone():
        return _gone_on(study, method, place, schedule, before=before, progress=progress)


def _gone_on(
    study: Study,
    method: Method,
    place: RunFolder,
    schedule: Schedule,
    *,
    before: Scores | None,
    progress: Progress,
) -> Run:
    lines = place.begin()
    before = before or judged_before(study, place.path)
    cases, size = schedule.ordered(study.suite.cases), schedule.batch_size
    batches = [cases[start : start + size] for start in range(0, len(cases), size)]
    finished = {line["judged"]["batches"] for line in lines if "judged" in line}
    step, state = place.state()
    place.require_batches(step, lines)
    if len(batches) not in finished:
        with (
            counting(f"{method.name}, batches made", len(batches), "batch", bar=False) as bar,
            opened(study.base, method, study.config, state) as editor,
        ):
            bar.initial = step
            bar.update(step)
            while True:
                if step and schedule.is_due(step, len(batches)) and step not in finished:
                    found = _judged(study, editor, batches[:step], before, place)
                    place.add(judged=found.to_json())
                    progress(f"{method.name}: {found.edits} edits judged")
                if step == len(batches):
                    break
                made = _made(editor, batches[step])
                step += 1
                place.add(batch=step, **made)  # first, so that a saved state always has its line
                place.keep(step, editor.save)
                bar.update(1)
                progress(f"{method.name}: batch {step} of {len(batches)} made")
    scores = place.judged_cases(len(batches), cases)
    run = run_of(place.head, place.begin(), before)
    return replace(run, cases=tuple(scores[case.digest] for case in cases))


def at_once(study: Study, method: Method, folder: str | Path, **options: Any) -> Run:
    """Make all edits as one batch and judge them; options as ``sequential``."""
    return sequential(study, method, folder, Schedule(len(study.suite.cases)), **options)


def single(
    study: Study,
    method: Method,
    folder: str | Path,
    *,
    before: Scores | None = None,
    progress: Progress = lambda text: None,
) -> Run:
    """Make each edit alone in the unedited model, judge its case, and take it back.

    Unedited facts and texts are not asked again after every edit. Arguments and errors are those of
    ``sequential``. With ``generate``, consistency knows the references of one case only.
    """
    place = RunFolder(Path(folder), _head(study, method, "single", {}))
    with place.alone():
        return _each_alone(study, method, place, before, progress)


def _each_alone(
    study: Study, method: Method, place: RunFolder, before: Scores | None, progress: Progress
) -> Run:
    done = {line["case"]["digest"] for line in place.begin() if "case" in line}
    before = before or judged_before(study, place.path)
    with counting(f"{method.name}, edits", len(study.suite.cases), "edit", bar=False) as bar:
        bar.initial = len(done)
        bar.update(len(done))
        for case in [case for case in study.suite.cases if case.digest not in done]:
            # a fresh model: what the first edits decide for all later ones is undone too
            with opened(study.base, method, study.config) as editor:
                made = _made(editor, [case])
                suite = replace(study.suite, cases=[case], unedited=(), texts=())
                found = study.judge(editor.model, suite, None, before)
            place.add(case=found.cases[0].to_json(), **made)
            done.add(case.digest)
            bar.update(1)
            progress(f"{method.name}: {len(done)} of {len(study.suite.cases)} edits judged")
    by_digest = {line["case"]["digest"]: line for line in place.begin() if "case" in line}
    lines = [by_digest[case.digest] for case in study.suite.cases]
    return run_of(place.head, lines, before)


def run_of(head: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], before: Scores) -> Run:
    """What the lines of finished steps say of a run, as far as it was judged."""
    judged = {line["judged"]["batches"]: line["judged"] for line in lines if "judged" in line}
    points = [Checkpoint.from_json(judged[step]) for step in sorted(judged)]
    made = [*{line["batch"]: line for line in lines if "batch" in line}.values()]
    single = [line for line in lines if "case" in line]
    cases = tuple(CaseScores.from_json(line["case"]) for line in single)
    if cases:
        how = asdict(Judging()) | head.get("judging", {})
        metrics = gather(cases, how["level"], how["seed"]).metrics
        points, made = [Checkpoint(len(cases), len(cases), metrics)], single
    spent = sum(line["made"] for line in made), sum(line["seconds"] for line in made)
    return Run(head, before, tuple(points), cases, *spent)


def _head(study: Study, method: Method, protocol: str, schedule: dict[str, Any]) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "schedule": schedule,
        "method": method.to_json(),
        "config": method.config(study.base.model, study.config).to_json(),
        **study.provenance(),
    }


def _made(editor: Editor, batch: Sequence[Case]) -> dict[str, Any]:
    """A batch made, and what goes into its line."""
    start = time.process_time()
    made = editor.edit([case.edit for case in batch])
    return {"made": made, "seconds": time.process_time() - start}


BY_BATCH = ("efficacy", "efficacy_recall", "generalization", "generalization_recall")


def _judged(
    study: Study,
    editor: Editor,
    batches: Sequence[Sequence[Case]],
    before: Scores,
    place: RunFolder,
) -> Checkpoint:
    """All edits so far, judged; means by batch of the metrics that every case of them has."""
    cases = [case for batch in batches for case in batch]
    suite = replace(study.suite, cases=cases)
    found = study.judge(editor.model, suite, place.cases(len(batches)), before)
    metrics = {case.digest: case.metrics for case in found.cases}
    by_batch = {}
    for name in BY_BATCH:
        each = [[metrics[c.digest][name] for c in b if name in metrics[c.digest]] for b in batches]
        if all(each):
            by_batch[name] = tuple(map(mean, each))
    return Checkpoint(len(batches), len(cases), found.metrics, by_batch)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path
    head: Mapping[str, Any]

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder, within the block."""
        return saving.alone(self.path)

    def begin(self) -> list[dict[str, Any]]:
        """The lines of finished steps; none in a new folder, which is made.

        ValueError: the folder holds a run that was made with something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._drop_old()  # where a kill left it
        lines = self._lines.read()
        with refusing(self.path / "results.jsonl"):
            for line in lines:
                check_line(line)
        return lines

    def add(self, **line: Any) -> None:
        """Append a finished step."""
        self._lines.add([line])

    @property
    def _lines(self) -> JsonLines:
        return JsonLines(self.path / "results.jsonl", "run", self.head)

    def cases(self, step: int) -> Path:
        """Where the cases of a judgement are kept."""
        return self.path / f"cases-{step:04d}.jsonl"

    def judged_cases(self, step: int, asked: Iterable[Case]) -> dict[str, CaseScores]:
        """The cases of a finished judgement, by digest.

        ValueError: the file does not hold all that were asked.
        """
        path, scores = self.cases(step), {}
        lines = json_lines(path, cut=True) if path.exists() else ()
        for where, line in islice(lines, 1, None):  # after the head
            with refusing(where):
                case = CaseScores.from_json(line)
            scores[case.digest] = case
        self._require([c.id for c in asked if c.digest not in scores], path, "cases")
        return scores

    def require_batches(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Refuse, with a ValueError, lines that lack one of the batches that a state holds."""
        told = {line["batch"] for line in lines if "batch" in line}
        self._require([n for n in range(1, step + 1) if n not in told], self._lines.path, "batches")

    def state(self) -> tuple[int, Path | None]:
        """How many batches the saved state holds, and its folder; (0, None) at the beginning."""
        states: list[tuple[int, Path | None]] = [(0, None), *self._states()]
        return states[-1]

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """Save the state after a batch and drop those before; each folder appears whole."""
        save(self.path / f"state-{step:04d}")
        self._drop_old()

    def _drop_old(self) -> None:
        for _, old in self._states()[:-1]:
            shutil.rmtree(old)

    def _states(self) -> list[tuple[int, Path]]:
        """Saved states, by the number of batches in them."""
        names = ((re.fullmatch(r"state-(\d{4,})", p.name), p) for p in self.path.iterdir())
        return sorted((int(m[1]), p) for m, p in names if m)

    def _require(self, missing: Sequence[object], path: Path, what: str) -> None:
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} {what} that {self.path} was past, {missing[0]!r} "
                "first: it was cut or exchanged; put it back, or delete the folder to begin again"
            )

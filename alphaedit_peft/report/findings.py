"""What ``alphaedit evaluate`` and ``alphaedit compare`` found, read back from their files.

In: a file or a folder that they wrote. Out: :class:`Finding`, one for each model or method judged:
metrics before and after, over the edits, by age of the edits, and what they depend on. Nothing is
measured here, and nothing in a folder is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from alphaedit_peft.evaluation.summary import (
    NUMBER,
    CaseScores,
    Estimate,
    Scores,
    estimates_from_json,
    gather,
)
from alphaedit_peft.messages import sentence
from alphaedit_peft.safe_files import (
    MAX_RESULTS_BYTES,
    DamagedFileError,
    Field,
    check_fields,
    json_lines,
    read_json,
    refusing,
)
from alphaedit_peft.studies.compare import Comparison
from alphaedit_peft.studies.protocols import Checkpoint, Run, check_line, run_of

COMPARISON, RUN, BEFORE = "comparison.json", "results.jsonl", "before.json"
CASES = b'{"judging": '  # the beginning of what evaluate --out keeps
ADVICE = "give what alphaedit evaluate or compare wrote"
LEVEL, SEED = 0.95, 0  # of intervals over a file of cases, as Judging has them
_ORDER = Field((int, type(None)), 0, 2**63, optional=True)
_JUDGING = {"level": Field(float, 0, 1, optional=True), "seed": Field(int, 0, 2**63, optional=True)}
_HEAD = {
    "method": Field(dict),
    "schedule": Field(dict, optional=True),
    "judging": Field(dict, optional=True),
}
_COMPARISON = {"methods": Field(dict, 1), "before": Field(dict, each=Field(dict))}
_METHOD = {"runs": Field(list, 1, each=Field(dict))}
_EVALUATION = {
    "metrics": Field(dict, each=Field(dict)),
    "before": Field(dict, each=Field(dict), optional=True),
    "settings": Field(dict),
}
_RUN = {"head": Field(dict), "checkpoints": Field(list), "made": Field(int), "seconds": NUMBER}


@dataclass(frozen=True)
class Finding:
    """The scores of one model or method.

    Attributes:
        name: of the method, or of the file.
        source: which file or folder it was read from.
        before: metric -> estimate on the unedited model; empty where it was not judged.
        final: metric -> estimate at the end.
        course: metric -> (edits, estimate) at each judgement, the unedited model first.
        by_batch: metric -> its mean over each batch's cases at the end, the first batch first.
        over: what intervals are over: ``cases``, or such as ``3 orders``.
        seconds: of the processor, an edit; None where no edit was made.
        origin: what the numbers depend on, as plain JSON values.
    """

    name: str
    source: str
    before: Mapping[str, Estimate]
    final: Mapping[str, Estimate]
    course: Mapping[str, Sequence[tuple[int, Estimate]]] = field(default_factory=dict)
    by_batch: Mapping[str, Sequence[float]] = field(default_factory=dict)
    over: str = "cases"
    seconds: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)


def read_findings(paths: Sequence[str | Path]) -> tuple[Finding, ...]:
    """Read results; of two findings of one name, each gets its source's name in front.

    Args:
        paths: each a comparison's JSON or folder, a run's folder, the JSON of ``evaluate --json``,
            or its ``--out`` file of judged cases, with the ``.before`` file beside it.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: something else, or a run without any judgement.
    """
    found = [finding for path in paths for finding in _read(Path(path))]
    names = [finding.name for finding in found]
    names = [f"{f.source}: {f.name}" if names.count(f.name) > 1 else f.name for f in found]
    for i, name in enumerate(names):
        count = f" ({names[:i].count(name) + 1})" if names.count(name) > 1 else ""
        found[i] = replace(found[i], name=name + count)
    return tuple(found)


def _read(path: Path) -> list[Finding]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; {ADVICE}")
    with refusing(path, _none):
        if path.is_dir():
            return _folder(path)
        if path.suffix == ".jsonl" or _begins_as_cases(path):
            return [_cases(path)]
        return _values(_json(path), path.stem)


def _begins_as_cases(path: Path) -> bool:
    """Whether it is a file of judged cases, whatever its name ends in."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(CASES)) == CASES


def _none(where: str | Path, wrong: str) -> DamagedFileError:
    return DamagedFileError(sentence(where, f"it holds no results ({wrong})", ADVICE))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, _none, MAX_RESULTS_BYTES)


def _folder(path: Path) -> list[Finding]:
    """A comparison's folder, finished or not, or that of one run."""
    if (path / COMPARISON).is_file():
        with refusing(path / COMPARISON, _none):
            return _values(_json(path / COMPARISON), path.resolve().name)
    places = [path] if (path / RUN).is_file() else sorted(p.parent for p in path.glob(f"*/{RUN}"))
    if not places:
        raise ValueError(f"neither {COMPARISON} nor {RUN} is in it")
    before = path / BEFORE
    scores = Scores({}, ())
    if before.is_file():
        with refusing(before, _none):
            scores = Scores.from_json(_json(before)["scores"])
    runs: dict[str, list[Run]] = {}
    for place in places:
        run = _run(place / RUN, scores)
        if run.checkpoints:
            runs.setdefault(run.head["method"]["name"], []).append(run)
    if not runs:
        raise ValueError("no run in it was judged yet")
    return [_of_runs(n, path.resolve().name, scores, tuple(f)) for n, f in runs.items()]


def _run(path: Path, before: Scores) -> Run:
    """A run, finished or not; a last line that was cut off is left out."""
    lines = []
    for where, line in json_lines(path, _none, cut=True):
        with refusing(where, _none):
            check_line(line)
            lines.append(line)
    with refusing(path, _none):
        if not lines:
            raise ValueError("it is empty")
        return run_of(_head(lines[0]["run"]), lines, before)


def _head(values: object) -> dict[str, Any]:
    """What a run depends on, as far as it is read here; the rest of it is shown as it is."""
    head = check_fields(values, _HEAD, "run", others=True)
    check_fields(head["method"], {"name": Field(str, 1, 200)}, "run.method", others=True)
    check_fields(head.get("schedule", {}), {"order": _ORDER}, "run.schedule", others=True)
    check_fields(head.get("judging", {}), _JUDGING, "run.judging", others=True)
    return head


def _values(values: Mapping[str, Any], name: str) -> list[Finding]:
    """JSON of a comparison, or of one evaluation."""
    if "methods" in values:
        check_fields(values, _COMPARISON, others=True)
        for found in values["methods"].values():
            check_fields(found, _METHOD, "method", others=True)
        before = Scores(_estimates(values["before"]), ())

        def saved(run: Mapping[str, Any]) -> Run:
            check_fields(run, _RUN, "run")
            points = tuple(map(Checkpoint.from_json, run["checkpoints"]))
            return Run(_head(run["head"]), before, points, (), run["made"], run["seconds"])

        return [
            _of_runs(method, name, before, tuple(saved(run) for run in found["runs"]))
            for method, found in values["methods"].items()
        ]
    check_fields(values, _EVALUATION, others=True)
    metrics = _estimates(values["metrics"])
    origin = {"judging": dict(values["settings"])}
    unedited = _estimates(values.get("before", {}))
    return [Finding(name, name, unedited, _required(metrics), origin=origin)]


def _of_runs(name: str, source: str, before: Scores, runs: tuple[Run, ...]) -> Finding:
    """Runs over several orders as one finding, as far as all of them were judged."""
    common = min(len(run.checkpoints) for run in runs)
    if not common:
        raise ValueError(f"a run of {name} was not judged yet")
    runs = tuple(replace(run, checkpoints=run.checkpoints[:common]) for run in runs)
    heads = [run.head for run in runs]
    orders = tuple(head.get("schedule", {}).get("order") for head in heads)
    whole = Comparison(before, {name: runs}, orders)
    final = whole.final(name)
    course = {metric: _course(whole, name, metric) for metric in final} if common > 1 else {}
    made = sum(run.made for run in runs)
    return Finding(
        name,
        source,
        before.metrics,
        _required(final),
        course,
        {metric: means for metric in final if (means := _by_batch(runs, metric))},
        f"{len(runs)} orders" if len(runs) > 1 else "cases",
        sum(run.seconds for run in runs) / made if made else None,
        {**heads[0], "orders": [order for order in orders if order is not None]},
    )


def _course(whole: Comparison, name: str, metric: str) -> list[tuple[int, Estimate]]:
    """As ``Comparison.course``; without the unedited model where the metric compares with it."""
    if metric in whole.before.metrics:
        return whole.course(name, metric)
    start = Scores({metric: whole.final(name)[metric]}, ())
    return replace(whole, before=start).course(name, metric)[1:]


def _by_batch(runs: Sequence[Run], metric: str) -> list[float]:
    """A metric by batch at the end, the mean over orders; nothing where a run lacks it."""
    values = [run.final.by_batch.get(metric, ()) for run in runs]
    same = len({len(found) for found in values}) == 1
    return [mean(batch) for batch in zip(*values, strict=True)] if same else []


def _cases(path: Path) -> Finding:
    """The judged cases that ``evaluate --out`` keeps, gathered again."""
    how, cases = _lines(path)
    before: Mapping[str, Estimate] = {}
    beside = path.with_name(f"{path.stem}.before{path.suffix}")
    if beside.is_file():
        wanted = {case.digest for case in cases}
        rest = [case for case in _lines(beside)[1] if case.digest in wanted]
        before = gather(rest, LEVEL, SEED).metrics
    final = gather(cases, LEVEL, SEED).metrics
    return Finding(path.stem, path.stem, before, _required(final), origin={"judging": how})


def _lines(path: Path) -> tuple[dict[str, Any], list[CaseScores]]:
    how, cases = None, []
    for where, line in json_lines(path, _none, cut=True):
        with refusing(where, _none):
            if how is None:
                how = check_fields(line, {"judging": Field(dict)})["judging"]
                check_fields(how, _JUDGING, "judging", others=True)
            else:
                cases.append(CaseScores.from_json(line))
    if how is None:
        raise _none(path, "it is empty")
    return how, cases


def _estimates(values: Mapping[str, Any]) -> dict[str, Estimate]:
    return estimates_from_json({n: v for n, v in values.items() if None not in v.values()})


def _required(metrics: Mapping[str, Estimate]) -> Mapping[str, Estimate]:
    if not metrics:
        raise ValueError("no case in it was judged")
    return metrics

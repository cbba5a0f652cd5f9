"""Several methods on the same cases, over several orders of them: one table.

In: a :class:`Study`, methods, a schedule, seeds. Out: a :class:`Comparison`: for each method the
mean of every metric over the seeds with its interval. Each run has a folder of its own below one,
so a comparison that was killed goes on where it stopped. ``choose`` comes before: it finds each
method's own settings, on other cases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from alphaedit_peft.evaluation import Scores, Suite
from alphaedit_peft.evaluation.metrics import METRICS, PERCENT
from alphaedit_peft.evaluation.summary import Estimate, bootstrap
from alphaedit_peft.safe_files import Field, check_fields, read_json, refusing
from alphaedit_peft.saving import replace_file
from alphaedit_peft.solve_metric import kind
from alphaedit_peft.studies.base import Progress, Study, judged_before
from alphaedit_peft.studies.methods import Method, opened
from alphaedit_peft.studies.protocols import Run, Schedule, sequential
from alphaedit_peft.studies.tune import Grid, tune
from alphaedit_peft.tables import Table

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; 1.96 beyond
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064),
    *(2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
SHOWN = (
    *("efficacy", "generalization", "specificity", "efficacy_recall", "generalization_recall"),
    *("specificity_recall", "same_subject_recall", "unedited_recall", "locality_tokens"),
    *("fluency", "consistency", "perplexity"),
)
# what choose tries, six settings for each objective
RIDGES, THRESHOLDS = (0.05, 0.25), (0.02, 0.05, 0.2)
WEIGHTS = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods: the unedited model, and by method one run for each seed."""

    before: Scores
    runs: Mapping[str, tuple[Run, ...]]
    seeds: tuple[int, ...]

    def final(self, method: str) -> dict[str, Estimate]:
        """A method's metrics after all edits, over the seeds (see ``over_seeds``)."""
        return over_seeds([run.final.metrics for run in self.runs[method]])

    def course(self, method: str, metric: str) -> list[tuple[int, Estimate]]:
        """(edits, metric over the seeds) at each judgement, the unedited model first."""
        if metric not in self.before.metrics:
            return []
        together = zip(*(run.checkpoints for run in self.runs[method]), strict=True)
        later = [(c[0].edits, over_seeds([one.metrics for one in c])[metric]) for c in together]
        return [(0, self.before.metrics[metric]), *later]

    def retention(self, method: str, metric: str = "efficacy_recall") -> list[float]:
        """A metric at the end by batch, the first batch first, as a mean over the seeds."""
        values = [run.final.by_batch.get(metric, ()) for run in self.runs[method]]
        return [mean(batch) for batch in zip(*values, strict=True)]

    def ahead(self, method: str, other: str) -> dict[str, Estimate]:
        """By metric of the cases, how much higher it is with one method than with another.

        The interval is over the same drawn cases for both or, with several seeds, over these.
        """
        pairs = zip(self.runs[method], self.runs[other], strict=True)
        apart = [_apart(one, two) for one, two in pairs]
        if len(apart) == 1:
            return {name: bootstrap(values) for name, values in apart[0].items()}
        return {
            name: _student([mean(found[name]) for found in apart])
            for name in apart[0]
            if all(name in found for found in apart)
        }

    def _ahead_of_others(self, method: str) -> list[tuple[str, dict[str, Estimate]]]:
        return [(other, self.ahead(method, other)) for other in self.runs if other != method]

    def differences(self) -> Table:
        """A row a metric of the cases: the first method less each other one, with the bounds."""
        first = next(iter(self.runs))
        ahead = dict(self._ahead_of_others(first))
        rows = [
            [metric, *(_bounds(metric, found[metric]) for found in ahead.values())]
            for metric in SHOWN
            if all(metric in found for found in ahead.values())
        ]
        return Table(["metric", *(f"{first} - {other}" for other in ahead)], rows)

    def rows(self) -> Table:
        """A row a metric: each method's mean with half its interval's width."""
        finals = {name: self.final(name) for name in self.runs}
        rows = []
        for metric in SHOWN:
            found = [final.get(metric) for final in finals.values()]
            if any(found):
                after = (shown(metric, estimate, spread=True) for estimate in found)
                rows.append([metric, shown(metric, self.before.metrics.get(metric)), *after])
        costs = (mean(run.seconds / max(1, run.made) for run in r) for r in self.runs.values())
        rows.append(["seconds an edit", "", *(f"{cost:.2f}" for cost in costs)])
        return Table(["metric", "before", *finals], rows)

    def __str__(self) -> str:
        return self.rows().text()

    def to_json(self) -> dict[str, Any]:
        """Everything but single cases, as plain JSON values."""
        return {
            "seeds": list(self.seeds),
            "before": {metric: e.to_json() for metric, e in self.before.metrics.items()},
            "methods": {
                name: {
                    "final": {metric: e.to_json() for metric, e in self.final(name).items()},
                    "retention": self.retention(name),
                    "ahead_of": {
                        other: {metric: e.to_json() for metric, e in ahead.items()}
                        for other, ahead in self._ahead_of_others(name)
                    },
                    "course": {
                        metric: [[edits, e.to_json()] for edits, e in self.course(name, metric)]
                        for metric in self.final(name)
                    },
                    "runs": [run.to_json() for run in runs],
                }
                for name, runs in self.runs.items()
            },
        }


def compare(
    study: Study,
    methods: Sequence[Method],
    folder: str | Path,
    schedule: Schedule,
    *,
    seeds: Sequence[int] = (0,),
    progress: Progress = lambda text: None,
) -> Comparison:
    """Run every method over every order of the cases.

    Methods have a name of their own each; ``folder`` is of all runs, and what is finished there is
    not done again. ``seeds`` are of the orders, and replace that of ``schedule``.

    Raises:
        ValueError: no method or seed, one twice, a method without its statistics, or a folder of
            another comparison.
    """
    names = [method.name for method in methods]
    for what, given in (("methods", names), ("seeds", list(seeds))):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{what}={given} must hold at least one, and each once")
    for method in methods:
        _require_statistics(study, method)
    place = Path(folder)
    before = judged_before(study, place)
    progress(f"the unedited model: {len(study.suite.cases)} cases judged")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in seeds:
        order = replace(schedule, order=seed)

        def say(text: str, seed: int = seed) -> None:
            progress(f"seed {seed}, {text}")

        for method in methods:
            own = place / f"{method.name}-{seed}"
            run = sequential(study, method, own, order, before=before, progress=say)
            runs[method.name].append(run)
    return Comparison(before, {name: tuple(found) for name, found in runs.items()}, tuple(seeds))


def choose(
    study: Study,
    methods: Sequence[Method],
    probes: Suite,
    folder: str | Path,
    *,
    progress: Progress = lambda text: None,
) -> tuple[tuple[Method, ...], dict[str, Any]]:
    """Give each method the settings that are best for it on cases that it is not compared on.

    Searched is what ``auto`` decides of an objective's solve, ridge and threshold or w, by
    ``tune``, with equally many tries for every method. What was set, and editors of another kind,
    stay as they are. A search that is there in ``folder`` is taken up.

    Args:
        study: with what all methods share.
        probes: the cases to choose by; its texts, held out, measure drift.

    Returns:
        The methods with their settings, and of each what was tried, as plain JSON values.

    Raises:
        ValueError: a method without its statistics, or a folder of another search.
    """
    for method in methods:
        _require_statistics(study, method)
    path, asked = Path(folder) / "search.json", replace(study, suite=probes).provenance()
    asked |= {"config": study.config.to_json(), "tried": [RIDGES, THRESHOLDS, WEIGHTS]}
    known = {"search": json.loads(json.dumps(asked)), "found": {}}
    if path.exists():
        kept = read_json(path)
        with refusing(path):
            check_fields(kept, {"search": Field(dict), "found": Field(dict, each=Field(dict))})
            for found in kept["found"].values():
                check_fields(found, {"recommended": Field(dict)}, "found", others=True)
        if kept["search"] != known["search"]:
            raise ValueError(f"{path} is of another search: name another folder, or delete it")
        known = kept
    chosen = []
    for method in methods:
        config, found = replace(study.config, **method.settings), known["found"]
        is_open = all(getattr(config, name) is None for name in kind(config.objective).decides)
        if method.writer is None and is_open:
            if method.name not in found:
                full = method.config(study.base.model, study.config)
                layers, clamp = tuple(full.rewrite_layers or ()), full.clamp_factor or 1.0
                grid = Grid((layers,), (clamp,), RIDGES, THRESHOLDS, WEIGHTS)

                def say(text: str, name: str = method.name) -> None:
                    progress(f"search, {name}: {text}")

                tuned = tune(study.base, probes, grid, config, how=study.judging, progress=say)
                what = {"method": method.to_json(), "setting": str(tuned.recommended.setting)}
                found[method.name] = what | tuned.to_json()
                replace_file(path, json.dumps(known) + "\n")
            best = found[method.name]["recommended"].items()
            changes = {n: v for n, v in best if n not in ("rewrite_layers", "clamp_factor")}
            method = method.with_settings(**changes)
        chosen.append(method)
    return tuple(chosen), known["found"]


def over_seeds(found: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Each metric's mean over seeds, with Student's 95 % interval, mean +- t s / sqrt(n).

    ``n`` counts seeds. With one seed it is that run's own estimate, whose interval is over cases.
    """
    if len(found) == 1:
        return dict(found[0])
    return {
        name: _student([metrics[name].value for metrics in found])
        for name in found[0]
        if all(name in metrics for metrics in found)
    }


def shown(metric: str, estimate: Estimate | None, *, spread: bool = False) -> str:
    """A metric as in tables, in percent where it is a share, with the interval's half width."""
    if estimate is None:
        return ""
    scale, digits = (100, 1) if METRICS[metric] == PERCENT else (1, 2)
    half = scale * (estimate.high - estimate.low) / 2
    tail = f" ± {half:.{digits}f}" if spread else ""
    return f"{scale * estimate.value:.{digits}f}{tail}"


def _apart(one: Run, two: Run) -> dict[str, list[float]]:
    """By metric that every case has in both runs, case by case the one's less the other's."""
    pairs = [(a.metrics, b.metrics) for a, b in zip(one.cases, two.cases, strict=True)]
    names = set.intersection(*({*a} & {*b} for a, b in pairs))
    return {name: [a[name] - b[name] for a, b in pairs] for name in sorted(names)}


def _bounds(metric: str, estimate: Estimate) -> str:
    """As in tables, signed, with the interval's bounds."""
    scale, digits = (100, 1) if METRICS[metric] == PERCENT else (1, 2)
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"


def _student(values: Sequence[float]) -> Estimate:
    n, middle = len(values), mean(values)
    half = (T_975[n - 2] if n - 2 < len(T_975) else 1.96) * stdev(values) / math.sqrt(n)
    return Estimate(middle, middle - half, middle + half, n)


STATISTICS = {
    "key_moments": "key moments; give them (KeyMoments.collect, alphaedit nullspace --moments-out)",
    "null_space": "a null space; give one (NullSpace.from_texts)",
}


def _require_statistics(study: Study, method: Method) -> None:
    """Refuse a method that lacks its statistics, before hours of work."""
    if method.writer is not None:
        return
    config = method.config(study.base.model, study.config)
    needed = kind(config.objective).needs(config)
    for name, said in STATISTICS.items():
        if name in needed and getattr(study.base, name) is None:
            raise ValueError(f"method {method.name!r} needs {said}, or leave the method out")
    with opened(study.base, method, study.config):
        pass  # refuses settings that do not fit the model

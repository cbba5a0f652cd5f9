"""What the judge found: the metrics of each case, and their means over all cases.

In: numbers by case. Out: :class:`CaseScores` (plain JSON values, a line of a results file) and
:class:`Scores`, the means with their confidence intervals by the bootstrap over cases (Efron 1979),
as JSON and as a text table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaedit_peft.evaluation.metrics import METRICS, PERCENT
from alphaedit_peft.safe_files import Field, check_fields
from alphaedit_peft.tables import Table

SCORED = ("efficacy", "generalization", "specificity")
RESAMPLES = 1000
AT_ONCE = 4_000_000  # drawn indices held at a time

Values = NDArray[np.float64]

NUMBER = Field((int, float), -1e300, 1e300)
_ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": Field(int, 0, 2**48)}
_CASE = {
    "id": Field(str),
    "digest": Field(str),
    "metrics": Field(dict, each=NUMBER),
    "tops": Field(dict, each=Field(list, each=Field(list, each=Field(int, -1, 2**48)))),
    "texts": Field(dict, each=Field(list, each=Field(str))),
}
_SCORES = {"settings": Field(dict), "metrics": Field(dict), "cases": Field(list)}


@dataclass(frozen=True)
class Estimate:
    """A statistic over ``n`` cases, with the bounds of its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float]:
        """The four numbers under their names."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Estimate:
        """An estimate from what ``to_json`` gave; a ValueError for anything else."""
        return cls(**check_fields(values, _ESTIMATE, "estimate"))


@dataclass(frozen=True)
class CaseScores:
    """What was measured on one case.

    Attributes:
        id: of its edit.
        digest: of the case, so that another case of the same edit is not taken for it.
        metrics: name -> value; what the case does not ask for is missing.
        tops: kind of prompt -> the argmax ids at the answer's places of each prompt, which a later
            judgement of an edited model is compared with.
        texts: kind of prompt -> what the model wrote, where it was let to.
    """

    id: str
    digest: str
    metrics: Mapping[str, float]
    tops: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The scores as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CaseScores:
        """Scores from what ``to_json`` gave; a ValueError for other fields or types of them."""
        return cls(**check_fields(values, _CASE, "case scores"))


@dataclass(frozen=True)
class Scores:
    """The metrics over all cases.

    Attributes:
        metrics: name -> mean over the cases that have it (perplexity: over texts' tokens), with
            its interval. Shares are in 0..1.
        cases: what it was made of.
        settings: how it was measured, as plain JSON values.
    """

    metrics: Mapping[str, Estimate]
    cases: tuple[CaseScores, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """A metric's value; raises KeyError where it was not measured."""
        if name not in self.metrics:
            raise KeyError(f"{name!r} was not measured; there are {sorted(self.metrics)}")
        return self.metrics[name].value

    def to_json(self) -> dict[str, Any]:
        """Settings, metrics and cases as plain JSON values."""
        return {
            "settings": dict(self.settings),
            "metrics": estimates_to_json(self.metrics),
            "cases": [case.to_json() for case in self.cases],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scores:
        """Scores from what ``to_json`` gave; a ValueError for anything else."""
        check_fields(values, _SCORES, "scores")
        metrics = estimates_from_json(values["metrics"])
        cases = tuple(CaseScores.from_json(case) for case in values["cases"])
        return cls(metrics, cases, values["settings"])

    def table(self, before: Scores | None = None) -> str:
        """The metrics as a text table, shares in percent, with intervals.

        Args:
            before: of the same cases on the unedited model, for a column beside it.
        """
        interval = f"{100 * self.settings.get('level', 0.95):g} % interval"
        columns = ["metric", *(["before"] if before else []), "value", interval, "cases"]
        rows = []
        for name in METRICS:
            now, then = (of.metrics.get(name) if of else None for of in (self, before))
            if now or then:
                beside = [_number(name, then.value) if then else ""] if before else []
                bounds = f"{_number(name, now.low)} .. {_number(name, now.high)}" if now else ""
                value, n = (_number(name, now.value), now.n) if now else ("", "")
                rows.append([name, *beside, value, bounds, n])
        return Table(columns, rows).text()

    def __str__(self) -> str:
        return self.table()


def estimates_to_json(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Each metric's four numbers, as plain JSON values."""
    return {name: estimate.to_json() for name, estimate in metrics.items()}


def estimates_from_json(metrics: Mapping[str, Any]) -> dict[str, Estimate]:
    """Estimates from what ``estimates_to_json`` gave; a ValueError for anything else."""
    return {name: Estimate.from_json(found) for name, found in metrics.items()}


def gather(
    cases: Sequence[CaseScores], level: float, seed: int, settings: Mapping[str, Any] | None = None
) -> Scores:
    """Mean every metric over the cases that have it; intervals by the bootstrap over cases.

    ``score`` is the harmonic mean of the three means, over the cases that have all three.
    """
    found: dict[str, Estimate] = {}
    for name in METRICS:
        values = [case.metrics[name] for case in cases if name in case.metrics]
        if values:
            found[name] = bootstrap(values, level=level, seed=seed)
    complete = [case.metrics for case in cases if {*SCORED} <= {*case.metrics}]
    rows = [[metrics[name] for name in SCORED] for metrics in complete]
    if rows:
        found["score"] = bootstrap(rows, harmonic, level=level, seed=seed)
    return Scores(found, tuple(cases), settings or {})


def bootstrap(
    values: Sequence[float] | Sequence[Sequence[float]],
    statistic: Callable[[Values], Values] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the cases and its percentile interval; the same seed gives the same bounds.

    Args:
        values: (n,), one number a case, or (n, k), one row a case.
        statistic: takes means over the cases, (draws, k), to (draws,); the mean itself where not
            given.
        level: share of draws within the interval, in 0..1.

    Raises:
        ValueError: no values, values that are not finite, or a level or number out of range.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"{table.size} values, finite or not, give no interval; pass finite ones")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}: use 0 < level < 1, resamples >= 1")
    table = table.reshape(len(table), -1)  # (n, k)
    of_means = statistic or (lambda means: means[:, 0])
    n = len(table)
    random = np.random.default_rng(seed)
    draws, step = [], max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = random.integers(0, n, (min(step, resamples - start), n))
        draws.append(of_means(table[drawn].mean(1)))
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    value = of_means(table.mean(0, keepdims=True))[0]
    return Estimate(float(value), float(low), float(high), n)


def harmonic(means: Values) -> Values:
    """Harmonic mean of each row, 0 where an entry is 0 (ROME's S); (draws, k) -> (draws,)."""
    safe = np.where(means > 0, means, 1.0)
    found = means.shape[1] / (1 / safe).sum(1)
    return np.where((means > 0).all(1), found, 0.0)


def _number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if METRICS[name] == PERCENT else f"{value:.3f}"

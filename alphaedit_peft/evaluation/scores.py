"""What the judge found: one value for each case, and the metrics over all cases.

In: numbers by case. Out: :class:`CaseScores` (plain JSON values, a line of a results file) and
:class:`Scores`, the means with their confidence intervals, as JSON and as a text table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from alphaedit_peft.evaluation.metrics import Estimate, Values, bootstrap
from alphaedit_peft.tables import Table

PERCENT = "percent"
NUMBER = "number"
# how each metric is shown, in the order of the table
METRICS = {
    "efficacy": PERCENT,
    "generalization": PERCENT,
    "specificity": PERCENT,
    "score": PERCENT,
    "efficacy_probability": NUMBER,
    "generalization_probability": NUMBER,
    "efficacy_magnitude": NUMBER,
    "generalization_magnitude": NUMBER,
    "specificity_magnitude": NUMBER,
    "efficacy_recall": PERCENT,
    "generalization_recall": PERCENT,
    "specificity_recall": PERCENT,
    "efficacy_tokens": PERCENT,
    "generalization_tokens": PERCENT,
    "locality_tokens": PERCENT,
    "locality_recall": PERCENT,
    "locality_unchanged": PERCENT,
    "neighborhood_unchanged": PERCENT,
    "same_subject_recall": PERCENT,
    "same_subject_tokens": PERCENT,
    "same_subject_unchanged": PERCENT,
    "portability_recall": PERCENT,
    "portability_tokens": PERCENT,
    "exact_match": PERCENT,
    "exact_match_paraphrases": PERCENT,
    "fluency": NUMBER,
    "consistency": NUMBER,
    "unedited_recall": PERCENT,
    "perplexity": NUMBER,
}
SCORED = ("efficacy", "generalization", "specificity")


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
        """Scores from what ``to_json`` gave.

        Raises:
            ValueError: other fields.
        """
        wanted = {"id", "digest", "metrics", "tops", "texts"}
        if set(values) != wanted:
            raise ValueError(f"case scores have the fields {sorted(wanted)}, not {sorted(values)}")
        return cls(**values)


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
        """A metric's value.

        Raises:
            KeyError: a metric that was not measured.
        """
        if name not in self.metrics:
            raise KeyError(f"{name!r} was not measured; there are {sorted(self.metrics)}")
        return self.metrics[name].value

    def to_json(self) -> dict[str, Any]:
        """Settings, metrics and cases as plain JSON values."""
        return {
            "settings": dict(self.settings),
            "metrics": {name: estimate.to_json() for name, estimate in self.metrics.items()},
            "cases": [case.to_json() for case in self.cases],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scores:
        """Scores from what ``to_json`` gave."""
        metrics = {name: Estimate(**estimate) for name, estimate in values["metrics"].items()}
        cases = tuple(CaseScores.from_json(case) for case in values["cases"])
        return cls(metrics, cases, values["settings"])

    def table(self, before: Scores | None = None) -> str:
        """The metrics as a text table, shares in percent, with intervals.

        Args:
            before: of the same cases on the unedited model, for a column beside it.
        """
        names = [n for n in METRICS if n in self.metrics or (before and n in before.metrics)]
        interval = f"{100 * self.settings.get('level', 0.95):g} % interval"
        columns = ["metric", *(["before"] if before else []), "value", interval, "cases"]
        rows = []
        for name in names:
            now = self.metrics.get(name)
            cells = [name]
            if before:
                cells.append(_shown(name, before.metrics.get(name)))
            bounds = [_number(name, b) for b in (now.low, now.high)] if now else []
            cells += [_shown(name, now), " .. ".join(bounds), str(now.n) if now else ""]
            rows.append(cells)
        return Table(columns, rows).text()

    def __str__(self) -> str:
        return self.table()


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
    rows = [
        [case.metrics[name] for name in SCORED]
        for case in cases
        if all(name in case.metrics for name in SCORED)
    ]
    if rows:
        found["score"] = bootstrap(rows, harmonic, level=level, seed=seed)
    return Scores(found, tuple(cases), settings or {})


def harmonic(means: Values) -> Values:
    """Harmonic mean of each row, 0 where an entry is 0; (draws, k) -> (draws,)."""
    safe = np.where(means > 0, means, 1.0)
    found = means.shape[1] / (1 / safe).sum(1)
    return np.where((means > 0).all(1), found, 0.0)


def _shown(name: str, estimate: Estimate | None) -> str:
    return "" if estimate is None else _number(name, estimate.value)


def _number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if METRICS[name] == PERCENT else f"{value:.3f}"

"""What was tried on probe edits, and which of it to take.

In: settings with the scores they gave. Out: :class:`Tuning`: all of them in order, the recommended
one, and the reason in a sentence that says what is within noise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from alphaedit_peft.evaluation import Scores
from alphaedit_peft.evaluation.intervals import Estimate, Values, bootstrap
from alphaedit_peft.evaluation.scores import SCORED, harmonic


@dataclass(frozen=True)
class Setting:
    """One combination."""

    rewrite_layers: tuple[int, ...]
    clamp_factor: float
    ridge: float
    threshold: float

    def changes(self) -> dict[str, Any]:
        """As fields of :class:`~alphaedit_peft.AlphaEditConfig`."""
        fields = {**asdict(self), "rewrite_layers": list(self.rewrite_layers)}
        return {**fields, "ridge_mode": "relative", "threshold_mode": "energy"}

    def __str__(self) -> str:
        layers = ",".join(map(str, self.rewrite_layers))
        rest = f"clamp {self.clamp_factor:g}, ridge {self.ridge:g}, threshold {self.threshold:g}"
        return f"layers {layers}, {rest}"


@dataclass(frozen=True, eq=False)
class Tried:
    """A setting and what it gave.

    Attributes:
        setting: what was set.
        scores: of the edited model on the probe cases.
        drift: mean KL(unedited || edited) on the held-out texts, nats a token; None without texts.
        made: how many of the edits were made.
    """

    setting: Setting
    scores: Scores
    drift: Estimate | None
    made: int

    @property
    def columns(self) -> tuple[str, ...]:
        """What is averaged: efficacy, generalization and specificity where every case has them.

        Where the cases do not know the old target, their recalls stand in; what is not asked of
        every case is left out.
        """
        cases = self.scores.cases
        choices = ((name, f"{name}_recall") for name in SCORED)
        found = (
            next((name for name in pair if all(name in case.metrics for case in cases)), None)
            for pair in choices
        )
        return tuple(name for name in found if name is not None)

    @cached_property
    def table(self) -> Values:
        """``columns`` of each case, (cases, k)."""
        rows = [[case.metrics[name] for name in self.columns] for case in self.scores.cases]
        return np.asarray(rows, dtype=np.float64)

    @property
    def score(self) -> Estimate:
        """Harmonic mean of the columns' means, with its interval over cases."""
        return bootstrap(self.table.tolist(), harmonic)

    def ahead_of(self, other: Tried) -> Estimate:
        """How much higher its harmonic mean is, with an interval over the same drawn cases."""
        k = self.table.shape[1]
        both = np.concatenate([self.table, other.table], 1)
        return bootstrap(both.tolist(), lambda m: harmonic(m[:, :k]) - harmonic(m[:, k:]))

    def to_json(self) -> dict[str, Any]:
        """Setting and means as plain JSON values."""
        return {
            "setting": self.setting.changes(),
            "score": self.score.to_json(),
            "columns": list(self.columns),
            "metrics": {name: value.to_json() for name, value in self.scores.metrics.items()},
            "drift": None if self.drift is None else self.drift.to_json(),
            "made": self.made,
        }


@dataclass(frozen=True, eq=False)
class Tuning:
    """Everything tried on the same edits.

    Attributes:
        tried: in the grid's order.
        before: scores of the unedited model.
        edits: how many probe edits there are.
    """

    tried: tuple[Tried, ...]
    before: Scores
    edits: int

    @cached_property
    def ranked(self) -> tuple[Tried, ...]:
        """By harmonic mean, the highest first; of equal ones, those that drift less."""
        return tuple(sorted(self.tried, key=lambda t: (-t.score.value, _drift(t))))

    @property
    def recommended(self) -> Tried:
        """The highest harmonic mean; of equal ones, what moves held-out texts least."""
        return self.ranked[0]

    @cached_property
    def even(self) -> tuple[Tried, ...]:
        """Those the recommended one is not clearly ahead of: the interval of the difference holds
        0. The recommended one is the first of them.
        """
        best, *others = self.ranked
        return (best, *(other for other in others if best.ahead_of(other).low <= 0))

    @property
    def reason(self) -> str:
        """Why it is recommended, how far the next one is, and whether that is within noise."""
        best, *others = self.ranked
        if not others:
            return "it is the only setting tried"
        gap, equal = best.ahead_of(others[0]), best.score.value == others[0].score.value
        first = f"its harmonic mean, {best.score.value:.3f}, is the highest"
        if equal and best.drift is not None:
            first += f", and of the equal ones it moves held-out texts least, {_nats(best)}"
        next_one = f"the next one, {others[0].setting}, is {gap.value:.3f} lower"
        bounds = f"95 % interval of the difference {gap.low:.3f} .. {gap.high:.3f}"
        if len(self.even) == 1:
            return f"{first}; {next_one} ({bounds}), which is beyond noise"
        still = min(self.even, key=_drift)
        rest = f"{len(self.even) - 1} of the {len(others)} others are within noise of it"
        if still is not best and best.drift is not None:
            rest += f", of which {still.setting} moves held-out texts least, {_nats(still)}"
        return f"{first}; {next_one} ({bounds}); {rest}"

    def to_json(self) -> dict[str, Any]:
        """Everything but single cases, as plain JSON values."""
        return {
            "edits": self.edits,
            "recommended": self.recommended.setting.changes(),
            "reason": self.reason,
            "within_noise": len(self.even),
            "before": {name: value.to_json() for name, value in self.before.metrics.items()},
            "tried": [tried.to_json() for tried in self.ranked],
        }


def _drift(tried: Tried) -> float:
    return 0.0 if tried.drift is None else tried.drift.value


def _nats(tried: Tried) -> str:
    return f"{_drift(tried):.2g} nats a token"

"""Settings tried on a few edits, and which of them to take.

In: a base with statistics, a suite of probe cases, a grid. Out: :class:`Tuning`: what every
combination scores, the one to take and the reason. Target values are optimised once for each choice
of rewrite layers and clamp; for another ridge, threshold or w they are solved again (``repour``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.evaluation import Judging, Reader, Scores, Suite, evaluate, text_divergence
from alphaedit_peft.evaluation.summary import SCORED, Estimate, Values, bootstrap, harmonic
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.progress import counting
from alphaedit_peft.settings import PRESETS
from alphaedit_peft.solve_metric import kind
from alphaedit_peft.studies.base import Base, Progress

DEPTHS = (0.15, 0.3, 0.45, 0.6)  # where the rewrite layers end, as a share of the blocks
CLAMPS = (0.75, 1.0)
RIDGES = (0.05, 0.25)
THRESHOLDS = (0.01, 0.05)
WEIGHTS = (0.25, 1.0, 4.0, 16.0)  # as many as ridges and thresholds together


@dataclass(frozen=True)
class Grid:
    """What is tried: every combination of layers, clamps, and what an objective's solve turns on.

    That is ridge and threshold of AlphaEdit, w of MEMIT.
    """

    layers: tuple[tuple[int, ...], ...]  # lists of blocks to rewrite
    clamps: tuple[float, ...] = CLAMPS  # bounds on |z - h| / |h|
    ridges: tuple[float, ...] = RIDGES  # relative to the mean |P k|^2 of the edits
    thresholds: tuple[float, ...] = THRESHOLDS  # shares of the keys' energy in the null space
    weights: tuple[float, ...] = WEIGHTS  # times the w that ``auto`` decides

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}={values} must hold at least one, and each once")

    @property
    def size(self) -> int:
        """How many combinations there are for AlphaEdit."""
        return self.size_for("alphaedit")

    def size_for(self, objective: str) -> int:
        """How many combinations there are."""
        return len(self.layers) * len(self.clamps) * len(self.solves(objective))

    def solves(self, objective: str) -> list[dict[str, float]]:
        """What is tried at each choice of layers and clamp: of an objective, what auto decides."""
        lists = {"ridge": self.ridges, "threshold": self.thresholds, "moment_weight": self.weights}
        names = [name for name in lists if name in kind(objective).decides]
        combined = product(*(lists[name] for name in names))
        return [dict(zip(names, values, strict=True)) for values in combined]


def layer_choices(num_blocks: int) -> tuple[tuple[int, ...], ...]:
    """Rewrite layers to try: as many as the depth rule takes, ending at several depths."""
    count = len(default_rewrite_layers(num_blocks))
    lasts = [max(0, min(int(depth * num_blocks), num_blocks - 2)) for depth in DEPTHS]
    return tuple(dict.fromkeys(tuple(range(max(0, last - count + 1), last + 1)) for last in lasts))


def preset_grid(layers: tuple[tuple[int, ...], ...]) -> Grid:
    """Only the layers vary; everything else is as ``auto`` has it."""
    preset = PRESETS["auto"]
    return Grid(layers, (preset["clamp_factor"],), (preset["ridge"],), (preset["threshold"],))


@dataclass(frozen=True)
class Setting:
    """One combination."""

    rewrite_layers: tuple[int, ...]
    clamp_factor: float
    ridge: float | None = None  # what the objective has no use for is None
    threshold: float | None = None
    moment_weight: float | None = None

    @property
    def solve(self) -> dict[str, float]:
        """What the solve turns on, by field."""
        names = ("ridge", "threshold", "moment_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def changes(self) -> dict[str, Any]:
        """As fields of :class:`~alphaedit_peft.AlphaEditConfig`."""
        modes = {"ridge": "relative", "threshold": "energy"}
        scales = {f"{name}_mode": mode for name, mode in modes.items() if name in self.solve}
        searched = {"rewrite_layers": [*self.rewrite_layers], "clamp_factor": self.clamp_factor}
        return searched | self.solve | scales

    def __str__(self) -> str:
        layers = ",".join(map(str, self.rewrite_layers))
        rest = "".join(f", {name} {value:g}" for name, value in self.solve.items())
        return f"layers {layers}, clamp {self.clamp_factor:g}{rest}"


@dataclass(frozen=True, eq=False)
class Tried:
    """A setting and what it gave."""

    setting: Setting
    scores: Scores  # of the edited model on the probe cases
    drift: Estimate | None  # mean KL(unedited || edited) on held-out texts, nats a token
    made: int  # edits

    @property
    def columns(self) -> tuple[str, ...]:
        """What is averaged: efficacy, generalization and specificity where every case has them.

        Where the cases do not know the old target, their recalls stand in; what is not asked of
        every case is left out.
        """
        everywhere = set.intersection(*(set(case.metrics) for case in self.scores.cases))
        pairs = ([name, f"{name}_recall"] for name in SCORED)
        return tuple(found[0] for pair in pairs if (found := [n for n in pair if n in everywhere]))

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
    """Everything tried on the same probe edits, in the grid's order, and the unedited scores."""

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
        """The recommended one, and those it is ahead of by an interval that holds 0."""
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


def tune(
    base: Base,
    suite: Suite,
    grid: Grid,
    config: AlphaEditConfig | None = None,
    *,
    how: Judging | None = None,
    progress: Progress = lambda text: None,
) -> Tuning:
    """Make the suite's edits in every setting of a grid, judge each; the model stays as it was.

    The same seed (of ``config``) gives the same numbers.

    Args:
        base: with the statistics of the objective, of all layers of the grid.
        suite: the probe cases; its texts, held out, measure drift.
        grid: what to try.
        config: all other settings, and the objective.
        how: how to judge; None: prompts as in ``config``, all else by default.
        progress: called with a line of text after each setting.

    Raises:
        ValueError: statistics that are missing, layers they lack, a threshold beyond their reach,
            an edit that the tokenizer cannot place.
    """
    # probes are taken back, so that they fill the model is no reason to warn
    common = replace(config or AlphaEditConfig(), on_conflict="replace", capacity_bound=0.0)
    for name in kind(common.objective).needs(common):
        if getattr(base, name) is None:
            raise ValueError(f"{name}=None: settings are tried with it; make it of texts first")
    size, solves = grid.size_for(common.objective), grid.solves(common.objective)
    asked, how = replace(suite, texts=()), how or Judging.of(common)

    def judge(setting: Setting, model: AlphaEditModel, made: int) -> Tried:
        scores, drift = evaluate(model, base.tokenizer, asked, how=how), None
        if suite.texts:
            reader = Reader(model, base.tokenizer, how.tokens_per_batch)
            drift = text_divergence(reader, model.disable_adapter, suite.texts)
        return Tried(setting, scores, drift, made)

    base.require_rows(suite, common)
    before = evaluate(base.model, base.tokenizer, asked, how=how)
    tried: list[Tried] = []
    with counting("settings tried", size, "setting", bar=False) as bar:
        for layers, clamp in product(grid.layers, grid.clamps):
            for found in _solved(base, suite, Setting(layers, clamp), solves, common, judge):
                tried.append(found)
                progress(f"{len(tried)} of {size}: {found.setting}: {found.score.value:.3f}")
                bar.update(1)
    return Tuning(tuple(tried), before, len(suite.cases))


def _solved(
    base: Base,
    suite: Suite,
    start: Setting,
    solves: Sequence[Mapping[str, Any]],
    common: AlphaEditConfig,
    judge: Callable[[Setting, AlphaEditModel, int], Tried],
) -> Iterator[Tried]:
    """Edits made once, then solved again with every other ridge and threshold, or w; each judged.

    w is counted in that which holds where none is given.
    """
    first = replace(replace(start, **solves[0]), moment_weight=None)
    config = replace(common, moment_weight=None, **first.changes())
    given: dict[str, Any] = {"null_space": base.null_space, "key_moments": base.key_moments}
    model = get_alphaedit_model(base.model, config, tokenizer=base.tokenizer, **given)
    held = model.alphaedit_config
    try:
        size = len(suite.cases)  # one batch: target values then depend on no ridge
        made = len(model.edit(suite.edits, batch_size=size, progress=False).made)
        unit = held.moment_weight
        for solve in solves:
            if "moment_weight" in solve and unit is not None:
                solve = {"moment_weight": float(f"{solve['moment_weight'] * unit:.2g}")}
            setting = replace(start, **solve)
            if any(getattr(held, name) != value for name, value in setting.solve.items()):
                for name, value in setting.solve.items():
                    setattr(held, name, value)
                model.repour()
            yield judge(setting, model, made)
    finally:
        model.unload()

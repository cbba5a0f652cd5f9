"""Seconds and memory of batches of edits, beside the least time that their arithmetic can take.

In: a subject, its statistics, edits, a plan. Out: :class:`Findings`: the time of each batch by
phase (the paper's Table 7 has the sum), AlphaEdit and MEMIT in turn, the plain way on some of the
edits, and forward passes without a pack, with one beside the weights and with it merged. Operations
are counted in runs of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import held
from alphaedit_peft.editing.batch import edit_batch
from alphaedit_peft.editing.report import EditReport
from alphaedit_peft.editing.runner import PHASES, Phases
from alphaedit_peft.edits import Edit
from alphaedit_peft.metric import kind
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.model.adapter import adapter_of
from alphaedit_peft.model.prepare import running
from alphaedit_peft.studies.base import dtype_name
from alphaedit_peft.studies.benchmark.machine import (
    CountedPhases,
    OperationCounter,
    PeakMemory,
    clocked,
    counting_tokens,
    describe_machine,
    floor_seconds,
    matrix_rate,
    timed,
)
from alphaedit_peft.studies.benchmark.plain import PlainModel
from alphaedit_peft.studies.benchmark.subject import Statistics, Subject
from alphaedit_peft.studies.benchmark.timings import (
    Batch,
    Findings,
    Floor,
    Forward,
    PlainSession,
    Plan,
    Session,
)

Say = Callable[[str], object]


def benchmark(
    subject: Subject,
    statistics: Statistics,
    edits: Sequence[Edit],
    plan: Plan,
    progress: Say = lambda text: None,
) -> Findings:
    """Measure a model.

    Args:
        subject: whose model is bare; it is left with the bits it had.
        statistics: a null space, and key moments where MEMIT is measured.
        edits: at least ``plan.needed``; the first ones are taken.
        plan: what to measure.
        progress: called with a line now and then.

    Raises:
        ValueError: too few edits, or a model, edits or statistics that cannot be used.
    """
    chosen = plan.take(edits)
    runs = TimedRuns(subject, statistics, plan, progress)
    runs.warm_up(chosen)
    found: dict[str, list[list[Timing]]] = {name: [] for name in plan.objectives}
    plain = PlainWay(runs, chosen[: plan.plain_edits]) if plan.plain_edits else None
    for repeat in range(plan.repeats):
        turns = [*plan.objectives, *(["plain"] if plain else [])]
        for name in turns[:: -1 if repeat % 2 else 1]:  # there and back: machines change with time
            progress(f"{name}, run {repeat + 1} of {plan.repeats}")
            if plain and name == "plain":
                plain.run()
            else:
                found[name].append(runs.run(name, chosen))
    rates = runs.rates()
    sessions = []
    for objective, timings in found.items():
        batches = tuple(_batch(plan.edits, parts) for parts in zip(*timings, strict=True))
        floor = runs.counted(objective, chosen[: plan.edits], rates) if plan.floor else None
        sessions.append(Session(objective, batches, floor))
    beside = plain.session(rates) if plain else None
    inference = forward_times(subject, progress) if plan.inference else ()
    made = {**statistics.seconds, **runs.first_use}
    return Findings(_head(runs), rates, made, tuple(sessions), beside, inference)


@dataclass(frozen=True)
class Timing:
    """One call of ``edit``."""

    report: EditReport
    total: float
    memory: int
    rows_before: int


@dataclass
class TimedRuns:
    """Batches on one subject, each session with a fresh wrapper around its base."""

    subject: Subject
    statistics: Statistics
    plan: Plan
    say: Say
    first_use: dict[str, float] = field(default_factory=dict)  # seconds, by what was used
    exact_memory: bool = True

    @contextmanager
    def wrapped(
        self, objective: str, config: AlphaEditConfig | None = None
    ) -> Iterator[AlphaEditModel]:
        """A fresh wrapper around the base, its statistics ready for use; unloaded at the end."""
        given, subject = self.statistics, self.subject
        config = replace(config or subject.config, objective=objective)
        needed = kind(objective).needs(config)
        space = given.null_space if "null_space" in needed else None
        names = ("threshold", "threshold_mode")
        own: dict[str, Any] = {name: getattr(space, name, None) for name in names}
        model = get_alphaedit_model(
            subject.model,
            replace(config, **own),
            tokenizer=subject.tokenizer,
            null_space=space,
            key_moments=given.key_moments if "key_moments" in needed else None,
        )
        seconds = timed(lambda: _use(model), subject.device)
        self.first_use.setdefault(f"first use by {objective}", seconds)
        try:
            yield model
        finally:
            model.unload()

    def warm_up(self, edits: Sequence[Edit]) -> None:
        """Two edits, not timed: libraries choose their kernels at the first products."""
        self.say("warming up")
        for objective in self.plan.objectives:
            with self.wrapped(objective, replace(self.subject.config, steps=2)) as model:
                model.edit(edits[:2], progress=False)

    def run(self, objective: str, edits: Sequence[Edit]) -> list[Timing]:
        """All batches with one objective."""
        timings = []
        with self.wrapped(objective) as model:
            for start in range(0, len(edits), self.plan.edits):
                batch = edits[start : start + self.plan.edits]
                work = partial(model.edit, batch, len(batch), progress=False)
                with PeakMemory(self.subject.device) as memory:
                    report, total = clocked(work, self.subject.device)
                rows = max((layer.rank for layer in report.layers), default=0)
                timings.append(Timing(report, total, memory.above, rows - _new_rows(report)))
                self.exact_memory = self.exact_memory and memory.exact
        return timings

    @torch.no_grad()
    def counted(self, objective: str, edits: Sequence[Edit], rates: Mapping[str, float]) -> Floor:
        """The floor of a batch, whose operations are counted in a run of its own."""
        self.say(f"{objective}, counting operations")
        counter = OperationCounter()
        phases = CountedPhases(counter)
        with self.wrapped(objective) as model, ExitStack() as stack:
            adapter = adapter_of(model, None)
            with counter, phases.timed("contexts"):
                runner, metric = stack.enter_context(running(model, adapter))
            runner = replace(runner, phases=phases)
            rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in edits]
            with counting_tokens(runner.model, runner.architecture) as seen, counter:
                edit_batch(runner, metric, adapter.state(), rows, adapter.write)
        return _floor(counter, seen.total() / runner.architecture.num_blocks, rates)

    def rates(self) -> dict[str, float]:
        """Matrix rates in the model's dtype, in autocast's, and in those of the solves."""
        names = {dtype_name(self.subject.weights.dtype), "float32", "float64"}
        names |= {self.subject.config.autocast or "float32"}
        return {n: matrix_rate(getattr(torch, n), self.subject.device) for n in sorted(names)}


def _use(model: AlphaEditModel) -> None:
    """What a metric does once: check and digest its statistics, factorise the moments."""
    resources = model.resources
    metric = resources.find_metric(model.alphaedit_config, model.base_fingerprint)
    resources.provenance()
    for layer, delta in model.factors.items():
        metric.rows(layer, delta.A.new_ones(1, delta.A.shape[1]))


def _new_rows(report: EditReport) -> int:
    return len({result.row for result in report.made})


class PlainWay:
    """Some of the edits the plain way: timed as often as asked, then counted."""

    def __init__(self, runs: TimedRuns, edits: Sequence[Edit]) -> None:
        self._over, self._memory = runs, 0
        self._runs: list[Mapping[str, float]] = []
        with runs.wrapped("alphaedit") as model, running(model, adapter_of(model, None)) as found:
            self._settings, self._architecture = found[0].settings, found[0].architecture
            rows = found[0].renderer.edit_rows
            self._rows = [rows(edit, found[0].contexts) for edit in edits]

    def run(self) -> None:
        """Make the edits once, and take the time."""
        phases = Phases.of(self._over.subject.model)
        with PeakMemory(self._over.subject.device) as peak:  # dense matrices count
            self._edit(phases)
        self._runs.append(phases.seconds)
        self._memory = max(self._memory, peak.above)

    def session(self, rates: Mapping[str, float]) -> PlainSession:
        """What was measured, with its floor where the plan asks for one."""
        plan, floor = self._over.plan, None
        if plan.floor:
            self._over.say("the plain way, counting operations")
            counter = OperationCounter()
            counted = counting_tokens(self._over.subject.model, self._architecture)
            with counted as seen, counter:
                self._edit(CountedPhases(counter))
            floor = _floor(counter, seen.total() / self._architecture.num_blocks, rates)
        return PlainSession(len(self._rows), plan.edits, tuple(self._runs), self._memory, floor)

    def _edit(self, phases: Phases) -> None:
        model, space = self._over.subject.model, self._over.statistics.null_space
        plain = PlainModel.of(model, self._settings, self._architecture, space)
        with hooks.evaluating(model), plain.weights_kept():
            plain.edit_batch(self._rows, phases)


def _floor(counter: OperationCounter, tokens: float, rates: Mapping[str, float]) -> Floor:
    operations = counter.by_phase
    seconds = {phase: floor_seconds(counts, rates) for phase, counts in operations.items()}
    return Floor(operations, seconds, tokens)


def _batch(edits: int, parts: Sequence[Timing]) -> Batch:
    """One batch from its timings in all repeats."""
    first, reports = parts[0].report, [part.report for part in parts]
    return Batch(
        edits=edits,
        rows_before=parts[0].rows_before,
        made=len(first.made),
        rows=_new_rows(first),
        steps=mean(result.steps or 0 for result in first.made) if first.made else 0.0,
        seconds={name: median(report.seconds[name] for report in reports) for name in PHASES},
        totals=tuple(part.total for part in parts),
        contexts=tuple(report.seconds["contexts"] for report in reports),
        memory=max(part.memory for part in parts),
    )


SETTINGS = (
    *("rewrite_layers", "steps", "stop_loss", "learning_rate", "num_contexts", "context_length"),
    *("tokens_per_batch", "target_tokens", "seed"),
)


def _head(runs: TimedRuns) -> dict[str, Any]:
    """All that the figures depend on."""
    subject = runs.subject
    full, architecture = subject.config.resolve(subject.model)
    weights = list(subject.model.parameters())
    return {
        "machine": describe_machine(subject.device),
        "model": {
            "name": subject.name,
            "random": subject.random,
            "type": architecture.model_type,
            "blocks": architecture.num_blocks,
            "parameters": sum(weight.numel() for weight in weights),
            "bytes": sum(weight.nbytes for weight in weights),
            "dtype": dtype_name(subject.weights.dtype),
            "autocast": full.autocast,
        },
        "settings": {name: getattr(full, name) for name in SETTINGS},
        "statistics": runs.statistics.origin,
        "plan": asdict(runs.plan),
        "exact_memory": runs.exact_memory,
    }


def forward_times(
    subject: Subject,
    progress: Say = lambda text: None,
    *,
    ranks: Sequence[int] = (1, 100, 1000),
    tokens: int = 256,
    passes: int = 9,
) -> tuple[Forward, ...]:
    """Time forward passes of one row: the bare model, packs of some ranks, the last one merged.

    Args:
        subject: whose model is bare; it is left with the bits it had.
        progress: called with a line now and then.
        ranks: of the packs.
        tokens: in the row; fewer where the model has fewer positions.
        passes: rounds through all models in turn, after one that does not count; gives medians.
    """
    positions = getattr(subject.model.config, "max_position_embeddings", None) or tokens
    length = min(tokens, positions)
    row = torch.arange(length, device=subject.device)[None] % len(subject.weights)
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(passes + 1):
        progress(f"forward passes, round {number} of {passes}")
        for name, seconds in _round(subject, row, ranks).items():
            times.setdefault(name, []).append(seconds)
    return tuple(
        Forward(name, rank, length, 1000 * median(found[1:]))
        for (name, rank), found in times.items()
    )


@torch.no_grad()
def _round(subject: Subject, row: Tensor, ranks: Sequence[int]) -> dict[tuple[str, int], float]:
    """Seconds of a pass by each model."""

    def seconds(model: nn.Module) -> float:
        with hooks.evaluating(model):
            return timed(lambda: model(input_ids=row, use_cache=False), row.device)

    found = {("base", 0): seconds(subject.model)}
    model = get_alphaedit_model(subject.model, subject.config, tokenizer=subject.tokenizer)
    try:
        for rank in ranks:
            _fill(model, rank)
            found["unmerged", rank] = seconds(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what rounding loses plays no part
            model.merge()
        found["merged", ranks[-1]] = seconds(model)
        model.unmerge()
    finally:
        model.unload()
    return found


def _fill(model: AlphaEditModel, rank: int) -> None:
    """Random factors of a rank, whose update is as large as the weight."""
    random, adapter = torch.Generator().manual_seed(rank), adapter_of(model, None)
    for number, layer in adapter.layers.items():
        A = torch.randn(rank, layer.in_features, generator=random)
        B = torch.randn(layer.out_features, rank, generator=random)
        B *= float(held(layer.get_base_layer(), "weight").float().std()) / rank**0.5
        adapter.write(number, LowRankDelta(A, B))

"""Seconds and memory of batches of edits, beside the least time that their arithmetic can take.

In: a subject, its statistics, edits, a plan. Out: :class:`Findings`: the time of each batch by
phase (the paper's Table 7 has the sum), AlphaEdit and MEMIT in turn, the plain way on some of the
edits, and forward passes without a pack, with one beside the weights and with it merged. Operations
are counted in runs of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import held
from alphaedit_peft.editing.batch import edit_batch
from alphaedit_peft.editing.edit_report import EditReport
from alphaedit_peft.editing.runner import PHASES, Phases
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.model.adapter import adapter_of
from alphaedit_peft.model.prepare import running
from alphaedit_peft.progress import counting
from alphaedit_peft.solve_metric import kind
from alphaedit_peft.studies.base import Progress, dtype_name
from alphaedit_peft.studies.benchmark import machine
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


def benchmark(
    subject: Subject,
    statistics: Statistics,
    edits: Sequence[Edit],
    plan: Plan,
    progress: Progress = lambda text: None,
) -> Findings:
    """Measure a bare model by a plan; it is left with the bits it had.

    ``statistics`` hold key moments where MEMIT is measured; the first ``plan.needed`` edits are
    made; ``progress`` is called with a line now and then.

    Raises:
        ValueError: too few edits, or a model, edits or statistics that cannot be used.
    """
    chosen = plan.take(edits)
    runs = TimedRuns(subject, statistics, plan, progress)
    runs.warm_up(chosen)
    ours = [Batches(runs, name, chosen) for name in plan.objectives]
    plain = PlainWay(runs, chosen[: plan.plain_edits]) if plan.plain_edits else None
    ways: list[Batches | PlainWay] = [*ours, *([plain] if plain else [])]
    with counting("runs timed", plan.repeats * len(ways), "run", bar=False) as bar:
        for repeat in range(plan.repeats):
            for way in ways[:: -1 if repeat % 2 else 1]:  # there and back: machines change
                progress(f"{way.name}, run {repeat + 1} of {plan.repeats}")
                way.run()
                bar.update(1)
    rates = runs.rates()
    sessions = tuple(way.session(rates) for way in ours)
    beside = plain.session(rates) if plain else None
    inference = forward_times(subject, progress) if plan.inference else ()
    made = {**statistics.seconds, **runs.first_use}
    return Findings(_head(runs), rates, made, sessions, beside, inference)


@dataclass
class TimedRuns:
    """Batches on one subject, each session with a fresh wrapper around its base."""

    subject: Subject
    statistics: Statistics
    plan: Plan
    say: Progress
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
        bound, mode = (None, None) if space is None else (space.threshold, space.threshold_mode)
        model = get_alphaedit_model(
            subject.model,
            replace(config, threshold=bound, threshold_mode=mode),
            tokenizer=subject.tokenizer,
            null_space=space,
            key_moments=given.key_moments if "key_moments" in needed else None,
        )

        def use() -> None:  # what is done once: statistics checked, digested and factorised
            resources = model.resources
            metric = resources.find_metric(model.alphaedit_config, model.base_fingerprint)
            resources.provenance()
            for layer, delta in model.factors.items():
                metric.rows(layer, delta.A.new_ones(1, delta.A.shape[1]))

        seconds = machine.timed(use, subject.device)
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

    def rates(self) -> dict[str, float]:
        """Matrix rates in the model's dtype, in autocast's, and in those of the solves."""
        names = {dtype_name(self.subject.weights.dtype), "float32", "float64"}
        names |= {self.subject.config.autocast or "float32"}
        return {
            n: machine.matrix_rate(getattr(torch, n), self.subject.device) for n in sorted(names)
        }


class Batches:
    """All batches with one objective: timed as often as asked, then the first one counted."""

    def __init__(self, over: TimedRuns, objective: str, edits: Sequence[Edit]) -> None:
        self.over, self.name, size = over, objective, over.plan.edits
        self.parts = [edits[start : start + size] for start in range(0, len(edits), size)]
        self.calls: list[list[Call]] = []  # of each run, one for each batch

    def run(self) -> None:
        """Make the batches one on top of the other, and take the time of each."""
        device, calls = self.over.subject.device, []
        with self.over.wrapped(self.name) as model:
            for part in self.parts:
                with machine.PeakMemory(device) as memory:
                    work = partial(model.edit, part, len(part), progress=False)
                    report, total = machine.clocked(work, device)
                calls.append(Call(report, total, memory.above))
                self.over.exact_memory &= memory.exact
        self.calls.append(calls)

    def session(self, rates: Mapping[str, float]) -> Session:
        """What was measured, with the first batch's floor where the plan asks for one."""
        batches = tuple(
            _batch(self.over.plan.edits, calls) for calls in zip(*self.calls, strict=True)
        )
        return Session(self.name, batches, self._counted(rates) if self.over.plan.floor else None)

    @torch.no_grad()
    def _counted(self, rates: Mapping[str, float]) -> Floor:
        self.over.say(f"{self.name}, counting operations")
        counter = machine.OperationCounter(phases := Phases())
        with self.over.wrapped(self.name) as model, counter, ExitStack() as stack:
            adapter = adapter_of(model, None)
            with phases.timed("contexts"):
                runner, metric = stack.enter_context(running(model, adapter))
            runner = replace(runner, phases=phases)
            rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in self.parts[0]]
            with machine.counting_tokens(runner.model, runner.architecture) as tokens:
                edit_batch(runner, metric, adapter.state(), rows, adapter.write)
        return _floor(counter, tokens.total() / runner.architecture.num_blocks, rates)


class Call(NamedTuple):
    """One call of ``edit``: what it reports, its wall seconds, its peak of memory."""

    report: EditReport
    total: float
    memory: int


def _batch(edits: int, calls: Sequence[Call]) -> Batch:
    """One batch of its calls in all runs."""
    reports, made = [call.report for call in calls], calls[0].report.made
    rows = len({result.row for result in made})
    return Batch(
        edits=edits,
        rows_before=max((layer.rank for layer in reports[0].layers), default=0) - rows,
        made=len(made),
        rows=rows,
        steps=mean(result.steps or 0 for result in made) if made else 0.0,
        seconds={name: median(report.seconds[name] for report in reports) for name in PHASES},
        totals=tuple(call.total for call in calls),
        contexts=tuple(report.seconds["contexts"] for report in reports),
        memory=max(call.memory for call in calls),
    )


class PlainWay:
    """Some of the edits the plain way: timed as often as asked, then counted."""

    name = "plain"

    def __init__(self, over: TimedRuns, edits: Sequence[Edit]) -> None:
        self.over, self.memory = over, 0
        self.seconds: list[Mapping[str, float]] = []  # of each run, by phase
        with over.wrapped("alphaedit") as model, running(model, adapter_of(model, None)) as found:
            self.runner = found[0]
            self.rows = [self.runner.renderer.edit_rows(e, self.runner.contexts) for e in edits]

    def run(self) -> None:
        """Make the edits once, and take the time."""
        phases = Phases(self.over.subject.model)
        with machine.PeakMemory(self.over.subject.device) as peak:  # dense matrices count
            self._edit(phases)
        self.seconds.append(phases.seconds)
        self.memory = max(self.memory, peak.above)

    def session(self, rates: Mapping[str, float]) -> PlainSession:
        """What was measured, with its floor where the plan asks for one."""
        plan, floor, architecture = self.over.plan, None, self.runner.architecture
        if plan.floor:
            self.over.say("the plain way, counting operations")
            counter = machine.OperationCounter(phases := Phases())
            with machine.counting_tokens(self.over.subject.model, architecture) as tokens, counter:
                self._edit(phases)
            floor = _floor(counter, tokens.total() / architecture.num_blocks, rates)
        return PlainSession(len(self.rows), plan.edits, tuple(self.seconds), self.memory, floor)

    def _edit(self, phases: Phases) -> None:
        model, space = self.over.subject.model, self.over.statistics.null_space
        plain = PlainModel.of(model, self.runner.settings, self.runner.architecture, space)
        with hooks.evaluating(model), plain.weights_kept():
            plain.edit_batch(self.rows, phases)


def _floor(counter: machine.OperationCounter, tokens: float, rates: Mapping[str, float]) -> Floor:
    seconds = {phase: machine.floor_seconds(n, rates) for phase, n in counter.by_phase.items()}
    return Floor(counter.by_phase, seconds, tokens)


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
        "machine": machine.describe_machine(subject.device),
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
    progress: Progress = lambda text: None,
    *,
    ranks: Sequence[int] = (1, 100, 1000),
    tokens: int = 256,
    passes: int = 9,
) -> tuple[Forward, ...]:
    """Time forward passes of one row: the bare model, packs of ``ranks``, the last one merged.

    Medians of ``passes`` rounds through all models in turn, after one that does not count. The row
    has ``tokens``, fewer where the model has fewer positions; the model is left with its bits.
    """
    length = min(tokens, getattr(subject.model.config, "max_position_embeddings", None) or tokens)
    row = torch.arange(length, device=subject.device)[None] % len(subject.weights)
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(passes + 1):
        progress(f"forward passes, round {number} of {passes}")
        for name, seconds in _round(subject, row, ranks):
            times.setdefault(name, []).append(seconds)
    return tuple(
        Forward(name, rank, length, 1000 * median(found[1:]))
        for (name, rank), found in times.items()
    )


@torch.no_grad()
def _round(
    subject: Subject, row: Tensor, ranks: Sequence[int]
) -> Iterator[tuple[tuple[str, int], float]]:
    """Which model, its rank, and the seconds of a pass by it."""

    def seconds(model: nn.Module) -> float:
        with hooks.evaluating(model):
            return machine.timed(lambda: model(input_ids=row, use_cache=False), row.device)

    yield ("base", 0), seconds(subject.model)
    model = get_alphaedit_model(subject.model, subject.config, tokenizer=subject.tokenizer)
    try:
        for rank in ranks:
            _fill(model, rank)
            yield ("unmerged", rank), seconds(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what rounding loses plays no part
            model.merge()
        yield ("merged", ranks[-1]), seconds(model)
        model.unmerge()
    finally:
        model.unload()


def _fill(model: AlphaEditModel, rank: int) -> None:
    """Random factors of a rank, whose update is as large as the weight."""
    random, adapter = torch.Generator().manual_seed(rank), adapter_of(model, None)
    for number, layer in adapter.layers.items():
        A = torch.randn(rank, layer.in_features, generator=random)
        B = torch.randn(layer.out_features, rank, generator=random)
        B *= float(held(layer.get_base_layer(), "weight").float().std()) / rank**0.5
        adapter.write(number, LowRankDelta(A, B))

"""Seconds and memory of batches of edits, beside the least time that their arithmetic can take.

In: a subject, its statistics, edits, a plan. Out: :class:`Findings`: the time of each batch by
phase (the paper's Table 7 has the sum), AlphaEdit and MEMIT in turn, the plain way on some of the
edits. Operations are counted in runs of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

import torch

from alphaedit_peft import hooks
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.phases import PHASES, Phases
from alphaedit_peft.editing.river import edit_batch
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import live
from alphaedit_peft.studies.benchmark.counting import (
    CountedPhases,
    OperationCounter,
    counting_tokens,
    floor_seconds,
)
from alphaedit_peft.studies.benchmark.findings import Batch, Findings, Floor, PlainSession, Session
from alphaedit_peft.studies.benchmark.inference import forward_times
from alphaedit_peft.studies.benchmark.machine import PeakMemory, describe_machine
from alphaedit_peft.studies.benchmark.plain import PlainModel
from alphaedit_peft.studies.benchmark.plan import Plan
from alphaedit_peft.studies.benchmark.preparing import Statistics, Subject
from alphaedit_peft.studies.benchmark.running import Runner, Say, Timing


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
    runner = Runner(subject, statistics, plan, progress)
    runner.warm_up(chosen)
    found: dict[str, list[list[Timing]]] = {name: [] for name in plan.objectives}
    plain = PlainWay(runner, chosen[: plan.plain_edits]) if plan.plain_edits else None
    for repeat in range(plan.repeats):
        turns = [*plan.objectives, *(["plain"] if plain else [])]
        for name in turns[:: -1 if repeat % 2 else 1]:  # there and back: machines change with time
            progress(f"{name}, run {repeat + 1} of {plan.repeats}")
            if plain and name == "plain":
                plain.run()
            else:
                found[name].append(runner.run(name, chosen))
    rates = runner.rates()
    sessions = []
    for objective, runs in found.items():
        batches = tuple(_batch(plan.edits, parts) for parts in zip(*runs, strict=True))
        floor = _counted(runner, objective, chosen[: plan.edits], rates) if plan.floor else None
        sessions.append(Session(objective, batches, floor))
    beside = plain.session(rates) if plain else None
    inference = forward_times(subject, progress) if plan.inference else ()
    head = _head(subject, statistics, plan, runner)
    made = {**statistics.seconds, **runner.first_use}
    return Findings(head, rates, made, tuple(sessions), beside, inference)


@torch.no_grad()
def _counted(
    runner: Runner, objective: str, edits: Sequence[Edit], rates: Mapping[str, float]
) -> Floor:
    """Count a batch's operations in a run of its own."""
    runner.say(f"{objective}, counting operations")
    model, counter = runner.wrapped(objective), OperationCounter()
    base, architecture = runner.subject.model, model.architecture

    def write(layer: int, delta: LowRankDelta) -> None:
        module = base.get_submodule(architecture.rewrite_name(layer))
        live.write_factors(module, "default", delta)

    phases = CountedPhases(counter)
    try:
        with counter, phases.timed("contexts"):
            contexts = runner.contexts(model)
        bench = runner.bench(model, contexts, phases)
        metric = model.resources.find_objective(bench.config, model.base_fingerprint)
        state = EditState(model.factors, (), torch.zeros(0, model.config.hidden_size))
        rows = [bench.renderer.edit_rows(edit, bench.contexts) for edit in edits]
        with hooks.evaluating(base), counting_tokens(base, architecture) as seen, counter:
            edit_batch(bench, metric, state, rows, write)
    finally:
        model.unload()
    return _floor(counter, seen.total() / architecture.num_blocks, rates)


class PlainWay:
    """Some of the edits the plain way: timed as often as asked, then counted."""

    def __init__(self, runner: Runner, edits: Sequence[Edit]) -> None:
        self._runner = runner
        model = runner.wrapped("alphaedit")
        try:
            self._config, self._architecture = model.alphaedit_config, model.architecture
            contexts = runner.contexts(model)
            renderer = runner.bench(model, contexts, Phases()).renderer
        finally:
            model.unload()
        self._rows = [renderer.edit_rows(edit, contexts) for edit in edits]
        self._runs: list[Mapping[str, float]] = []
        self._memory = 0

    def run(self) -> None:
        """Make the edits once, and take the time."""
        phases = Phases.of(self._runner.subject.model)
        with PeakMemory(self._runner.subject.device) as peak:  # dense matrices count
            self._edit(phases)
        self._runs.append(phases.seconds)
        self._memory = max(self._memory, peak.above)

    def session(self, rates: Mapping[str, float]) -> PlainSession:
        """What was measured, with its floor where the plan asks for one."""
        plan, floor = self._runner.plan, None
        if plan.floor:
            self._runner.say("the plain way, counting operations")
            counter = OperationCounter()
            counted = counting_tokens(self._runner.subject.model, self._architecture)
            with counted as seen, counter:
                self._edit(CountedPhases(counter))
            floor = _floor(counter, seen.total() / self._architecture.num_blocks, rates)
        return PlainSession(len(self._rows), plan.edits, tuple(self._runs), self._memory, floor)

    def _edit(self, phases: Phases) -> None:
        model, space = self._runner.subject.model, self._runner.statistics.null_space
        plain = PlainModel.of(model, self._config, self._architecture, space)
        with hooks.evaluating(model), plain.weights_kept():
            plain.edit_batch(self._rows, phases)


def _floor(counter: OperationCounter, tokens: float, rates: Mapping[str, float]) -> Floor:
    operations = counter.by_phase
    seconds = {phase: floor_seconds(counts, rates) for phase, counts in operations.items()}
    return Floor(operations, seconds, tokens)


def _batch(edits: int, parts: Sequence[Timing]) -> Batch:
    """One batch from its timings in all repeats."""
    first = parts[0].report
    return Batch(
        edits=edits,
        rows_before=parts[0].rows_before,
        made=len(first.made),
        rows=len({result.row for result in first.made}),
        steps=mean(result.steps or 0 for result in first.made) if first.made else 0.0,
        seconds={name: median(part.report.seconds[name] for part in parts) for name in PHASES},
        totals=tuple(part.total for part in parts),
        contexts=tuple(part.report.seconds["contexts"] for part in parts),
        memory=max(part.memory for part in parts),
    )


def _head(subject: Subject, statistics: Statistics, plan: Plan, runner: Runner) -> dict[str, Any]:
    full, architecture = subject.config.resolve(subject.model)
    weights = list(subject.model.parameters())
    autocast = getattr(full, "autocast", None)
    return {
        "machine": describe_machine(subject.device),
        "model": {
            "name": subject.name,
            "random": subject.random,
            "type": architecture.model_type,
            "blocks": architecture.num_blocks,
            "parameters": sum(weight.numel() for weight in weights),
            "bytes": sum(weight.nbytes for weight in weights),
            "dtype": str(subject.weights.dtype).removeprefix("torch."),
            "autocast": autocast,
        },
        "settings": {
            "rewrite_layers": full.rewrite_layers,
            "steps": full.steps,
            "stop_loss": full.stop_loss,
            "learning_rate": full.learning_rate,
            "num_contexts": full.num_contexts,
            "context_length": full.context_length,
            "tokens_per_batch": full.tokens_per_batch,
            "target_tokens": full.target_tokens,
            "seed": full.seed,
        },
        "statistics": statistics.origin,
        "plan": asdict(plan),
        "exact_memory": runner.exact_memory,
    }

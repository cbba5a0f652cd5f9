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
    for repeat in range(plan.repeats):
        for objective in plan.objectives:
            progress(f"{objective}, run {repeat + 1} of {plan.repeats}")
            found[objective].append(runner.run(objective, chosen))
    rates = runner.rates()
    sessions = []
    for objective, runs in found.items():
        batches = tuple(_batch(plan.edits, parts) for parts in zip(*runs, strict=True))
        floor = _counted(runner, objective, chosen[: plan.edits], rates) if plan.floor else None
        sessions.append(Session(objective, batches, floor))
    plain = _plain(runner, chosen[: plan.plain_edits], rates) if plan.plain_edits else None
    inference = forward_times(subject, progress) if plan.inference else ()
    head = _head(subject, statistics, plan, runner)
    made = {**statistics.seconds, **runner.first_use}
    return Findings(head, rates, made, tuple(sessions), plain, inference)


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

    try:
        bench = runner.bench(model, runner.contexts(model), CountedPhases(counter))
        metric = model.resources.find_objective(bench.config, model.base_fingerprint)
        state = EditState(model.factors, (), torch.zeros(0, model.config.hidden_size))
        rows = [bench.renderer.edit_rows(edit, bench.contexts) for edit in edits]
        with hooks.evaluating(base), counting_tokens(base, architecture) as seen, counter:
            edit_batch(bench, metric, state, rows, write)
    finally:
        model.unload()
    return _floor(counter, seen.total() / architecture.num_blocks, rates)


def _plain(runner: Runner, edits: Sequence[Edit], rates: Mapping[str, float]) -> PlainSession:
    """Some of the edits the plain way, timed and then counted."""
    runner.say(f"the plain way, {len(edits)} edits")
    subject, space, plan = runner.subject, runner.statistics.null_space, runner.plan
    model = runner.wrapped("alphaedit")
    try:
        config, architecture = model.alphaedit_config, model.architecture
        contexts = runner.contexts(model)
        renderer = runner.bench(model, contexts, Phases()).renderer
    finally:
        model.unload()
    rows = [renderer.edit_rows(edit, contexts) for edit in edits]
    times: list[Mapping[str, float]] = []
    memory = 0
    counter, floor = OperationCounter(), None
    with hooks.evaluating(subject.model):
        for _ in range(plan.repeats):
            phases = Phases.of(subject.model)
            with PeakMemory(subject.device) as peak:  # dense projectors and caches count
                plain = PlainModel.of(subject.model, config, architecture, space)
                with plain.weights_kept():
                    plain.edit_batch(rows, phases)
            times.append(phases.seconds)
            memory = max(memory, peak.above)
        if plan.floor:
            runner.say("the plain way, counting operations")
            plain = PlainModel.of(subject.model, config, architecture, space)
            counted = counting_tokens(subject.model, architecture)
            with plain.weights_kept(), counted as seen, counter:
                plain.edit_batch(rows, CountedPhases(counter))
            floor = _floor(counter, seen.total() / architecture.num_blocks, rates)
    seconds = {name: median(found[name] for found in times) for name in PHASES}
    return PlainSession(len(edits), plan.edits, seconds, memory, floor)


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

"""Batches of edits run and timed, whatever the objective, on a base that is left as it was.

In: a subject, its statistics, a plan. Out: :class:`Timing` for each batch: what ``edit`` reported,
wall seconds and the peak of memory. The first use of statistics by an objective (checks, digests,
the factorisation of MEMIT's moments) happens before the clock runs and is timed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from alphaedit_peft import hooks
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.contexts import sample_contexts
from alphaedit_peft.editing.phases import Phases
from alphaedit_peft.editing.report import EditReport
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.studies.benchmark.machine import PeakMemory, matrix_rate, timed
from alphaedit_peft.studies.benchmark.plan import Plan
from alphaedit_peft.studies.benchmark.preparing import Statistics, Subject

Say = Callable[[str], object]


@dataclass(frozen=True)
class Timing:
    """One call of ``edit``."""

    report: EditReport
    total: float
    memory: int
    rows_before: int


@dataclass
class Runner:
    """Runs batches on one subject, each with a fresh wrapper around its base."""

    subject: Subject
    statistics: Statistics
    plan: Plan
    say: Say
    first_use: dict[str, float] = field(default_factory=dict)  # seconds, by what was used
    exact_memory: bool = True

    def wrapped(self, objective: str, config: AlphaEditConfig | None = None) -> AlphaEditModel:
        """A fresh wrapper around the base, its statistics ready for use."""
        given, subject = self.statistics, self.subject
        alphaedit = objective == "alphaedit"
        space = given.null_space
        model = get_alphaedit_model(
            subject.model,
            replace(
                config or subject.config,
                objective=objective,
                threshold=space.threshold if alphaedit else None,
                threshold_mode=space.threshold_mode if alphaedit else None,
            ),
            tokenizer=subject.tokenizer,
            null_space=space if alphaedit else None,
            key_moments=None if alphaedit else given.key_moments,
        )
        seconds = timed(lambda: self._use(model), subject.device)
        self.first_use.setdefault(f"first use by {objective}", seconds)
        return model

    def _use(self, model: AlphaEditModel) -> None:
        """What an objective does once: check and digest its statistics, factorise the moments."""
        resources = model.resources
        objective = resources.find_objective(model.alphaedit_config, model.base_fingerprint)
        resources.provenance()
        for layer, delta in model.factors.items():
            objective.rows(layer, delta.A.new_ones(1, delta.A.shape[1]))

    def warm_up(self, edits: Sequence[Edit]) -> None:
        """Two edits, not timed: libraries choose their kernels at the first products."""
        self.say("warming up")
        config = replace(self.subject.config, steps=2)
        for objective in self.plan.objectives:
            model = self.wrapped(objective, config)
            try:
                model.edit(edits[:2], progress=False)
            finally:
                model.unload()

    def run(self, objective: str, edits: Sequence[Edit]) -> list[Timing]:
        """All batches with one objective."""
        model = self.wrapped(objective)
        timings = []
        try:
            for start in range(0, len(edits), self.plan.edits):
                batch = edits[start : start + self.plan.edits]
                reports: list[EditReport] = []
                with PeakMemory(self.subject.device) as memory:
                    total = timed(
                        lambda batch=batch, reports=reports: reports.append(  # type: ignore[misc]
                            model.edit(batch, len(batch), progress=False)
                        ),
                        self.subject.device,
                    )
                rows = max((layer.rank for layer in reports[0].layers), default=0)
                new = len({result.row for result in reports[0].made})
                timings.append(Timing(reports[0], total, memory.above, rows - new))
                self.exact_memory = self.exact_memory and memory.exact
        finally:
            model.unload()
        return timings

    def rates(self) -> dict[str, float]:
        """Matrix rates in the model's dtype, in autocast's, and in those of the solves."""
        names = {str(self.subject.weights.dtype).removeprefix("torch."), "float32", "float64"}
        autocast = getattr(self.subject.config, "autocast", None)
        names |= {autocast} if autocast else set()
        return {n: matrix_rate(getattr(torch, n), self.subject.device) for n in sorted(names)}

    def contexts(self, model: AlphaEditModel) -> tuple[str, ...]:
        """The contexts that the timed runs sample too."""
        with hooks.evaluating(self.subject.model), model.disable_adapter():
            return sample_contexts(
                self.subject.model, self.subject.tokenizer, model.alphaedit_config
            )

    def bench(self, model: AlphaEditModel, contexts: tuple[str, ...], phases: Phases) -> Bench:
        """What the river works with."""
        config, base = model.alphaedit_config, self.subject.model
        return Bench(base, self.subject.tokenizer, config, model.architecture, contexts, phases)

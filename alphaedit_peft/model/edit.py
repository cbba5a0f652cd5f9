"""Make edits, take them back, pour them again: what is written, remembered and put back.

In: a model, the adapter that is meant, edits. Out: the same adapter with longer or shorter factors,
and a report. What is computed comes from ``editing``; a batch that fails half way leaves no trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from alphaedit_peft import parallel
from alphaedit_peft.editing.auto_settings import in_force
from alphaedit_peft.editing.batch import edit_batch
from alphaedit_peft.editing.edit_report import EditReport, EditResult
from alphaedit_peft.editing.groups import sort_out
from alphaedit_peft.editing.memory import within_budget
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.rebuild import rebuild_state
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit, as_edits
from alphaedit_peft.model.adapter import Adapter, EditedModel, require_editable
from alphaedit_peft.model.prepare import capacity, layer_reports, running, settled
from alphaedit_peft.model.rollback import all_or_nothing, remember, take_back
from alphaedit_peft.model.stack import (
    Parent,
    adopt,
    new_parents,
    others,
    refuse_contradictions,
    require_active,
    with_parents,
    without_parents,
)
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.edit_record import few
from alphaedit_peft.pack.parents import BESIDE
from alphaedit_peft.progress import counting
from alphaedit_peft.solve_metric import Metric


@torch.no_grad()
@parallel.in_step()
def edit(
    model: EditedModel,
    adapter: Adapter,
    edits: Iterable[Edit | Mapping[str, Any]],
    batch_size: int,
    *,
    progress: bool,
    after_batch: Callable[[], object] | None = None,
) -> EditReport:
    """Make edits in an adapter, batch by batch; see :meth:`AlphaEditModel.edit`."""
    given = as_edits(edits)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
    with running(model, adapter, edits=given) as (runner, metric):
        on_conflict, parents = runner.settings.on_conflict, others(model, adapter)
        adopted = with_parents(adapter, parents)
        refuse_contradictions(given, parents, on_conflict)
        plan = sort_out(given, [record.edit for record in adopted.standing], on_conflict)
        with runner.phases.timed("contexts"):
            rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in plan.to_make]
        runner = within_budget(runner, metric, rows, batch_size, adopted.rank)
        found = [EditResult(edit, reason) for edit, reason in plan.set_aside]
        with (
            settled(model, adapter, runner, metric, rows[:batch_size]) as (metric, decided),
            counting("edits", len(rows), "edit", shown=progress) as bar,
        ):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                make = (model, adapter, runner, metric, batch)
                found += _make(*make, parents, plan.replaced, bar.update)
                if decided and adapter.journal.rank:  # kept with the first edits
                    told = tuple(decision.to_json() for decision in decided)
                    adapter.keep(replace(adapter.journal, decisions=told))
                if after_batch is not None:
                    after_batch()
        found.sort(key=lambda result: given.index(result.edit))
        with runner.phases.timed("score"):
            layers, full = layer_reports(model, adapter, adopted.rank), capacity(model, adapter)
        report = EditReport(tuple(found), layers, decided, full, runner.phases.seconds)
    if report.made and full.warning:
        warnings.warn(full.warning, stacklevel=5)  # through two decorators and the model's method
    return report


@torch.no_grad()
def repour(
    model: EditedModel,
    adapter: Adapter,
    edit_ids: Sequence[str] | None,
    *,
    together: bool = False,
) -> None:
    """Pour stored target values again; see :meth:`AlphaEditModel.repour`."""
    records = list(adapter.journal.records)
    if edit_ids is not None:
        wanted = _known_ids(adapter, edit_ids)
        records = [r for r in records if r.edit.id in wanted or r.role != "own"]
    rebuild(model, adapter, records, together=together)


def remove_edits(model: EditedModel, adapter: Adapter, edit_ids: Sequence[str]) -> None:
    """Pour all but some edits again; see :meth:`AlphaEditModel.remove_edits`."""
    unwanted = _known_ids(adapter, edit_ids)
    repour(model, adapter, [e.id for e in adapter.edits if e.id not in unwanted])


@torch.no_grad()
def rollback(model: EditedModel, adapter: Adapter, batches: int) -> None:
    """Take back the last batches; see :meth:`AlphaEditModel.rollback`."""
    require_editable(model, adapter)
    journal = adapter.journal
    made = sorted({record.batch for record in journal.records if record.role != "protected"})
    if not isinstance(batches, int) or not 1 <= batches <= len(made):
        raise ValueError(f"batches={batches!r} cannot be taken back; the model has {len(made)}")
    others(model, adapter)  # refuses to change what an active pack stands on
    if not take_back(adapter, batches):
        rebuild(model, adapter, journal.before_batch(made[-batches]))


@parallel.in_step()
def rebuild(
    model: EditedModel,
    adapter: Adapter,
    records: Sequence[EditRecord],
    stored: EditState | None = None,
    ancestors: Sequence[dict[str, Any]] = (),
    contexts: tuple[str, ...] | None = None,
    *,
    together: bool = False,
) -> None:
    """Pour records again, on top of the other active packs; wholly or not at all.

    ``stored`` holds their target values, or the adapter itself; ``ancestors`` are the packs that
    they come from, to be recorded; ``contexts`` are for an adapter that has none yet.

    Raises:
        ValueError: a pack saved without target values, or a parent that is not active.
    """
    journal = adapter.journal
    if stored is None and journal.targets is None and records:
        raise ValueError(
            "this pack was saved without target values, which pouring again needs; make the "
            "edits anew with edit()"
        )
    alone = stored is None and len(model.active_adapters) == 1
    anew = alone and all(record.role != "protected" for record in journal.records)
    with running(model, adapter, contexts, anew=anew) as (runner, metric):
        before, parents = adapter.state(), others(model, adapter)
        require_active(journal.parents, parents, adapter.name)
        source = before if stored is None else stored
        to_rebuild, carried = without_parents(records, source.records, parents)
        if not any(record.role == "own" for record in to_rebuild):
            to_rebuild, parents = [], ()
        start = adopt(before.emptied(), parents, carried)
        with all_or_nothing(adapter, before):
            for layer, delta in start.factors.items():
                adapter.write(layer, delta)
            state = rebuild_state(
                runner, metric, start, to_rebuild, source, adapter.write, together=together
            )
        former = [p for p in journal.parents if p.get("operation") != BESIDE]
        adapter.snapshots.clear()
        recorded = (*former, *ancestors, *(parent.recorded() for parent in parents))
        _commit(model, adapter, runner, state, recorded)


def _make(
    model: EditedModel,
    adapter: Adapter,
    runner: Runner,
    metric: Metric,
    batch: Sequence[EditRows],
    parents: Sequence[Parent],
    replaces: Mapping[str, str],
    progress: Callable[[int], None],
) -> tuple[EditResult, ...]:
    """One batch, wholly or not at all; what can take it back is remembered."""
    before, journal = adapter.state(), adapter.journal
    new = new_parents(journal.parents, parents, adapter.name)
    start = adopt(before, new)
    with all_or_nothing(adapter, before):
        state, results = edit_batch(
            runner, metric, start, batch, adapter.write, replaces=replaces, progress=progress
        )
        if state is not start:
            recorded = (*journal.parents, *(parent.recorded() for parent in new))
            _commit(model, adapter, runner, state, recorded)
            remember(adapter, journal, before, model.alphaedit_config.rollback_depth)
    return results


def _commit(
    model: EditedModel,
    adapter: Adapter,
    runner: Runner,
    state: EditState,
    parents: tuple[dict[str, Any], ...],
) -> None:
    journal = adapter.journal
    adapter.commit(
        state,
        contexts=runner.contexts,
        null_space=model.resources.provenance() or journal.null_space,
        parents=parents,
        decisions=tuple(in_force(journal.decisions, model.alphaedit_config)),
    )


def _known_ids(adapter: Adapter, edit_ids: Sequence[str]) -> set[str]:
    if isinstance(edit_ids, str):
        raise TypeError(f"edit_ids={edit_ids!r} is one text; pass a list of ids")
    known = {edit.id for edit in adapter.edits}
    unknown = sorted(set(edit_ids) - known)
    if unknown:
        raise ValueError(f"edit ids {unknown} are not in this model; it has {few(known)}")
    return set(edit_ids)

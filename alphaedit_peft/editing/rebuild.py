"""Write stored target values again, into a model that holds no edit.

In: the records to keep and the state that holds their target values. Out: the state as if only
these edits had been made. Keys are measured and layers solved anew; a target value is optimised
again only where its row has lost some of the edits it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alphaedit_peft.devices import solving_on
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.memory import within_budget
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.solve_layers import Write, solve_layers
from alphaedit_peft.editing.state import EditState, protects
from alphaedit_peft.editing.targets import optimise_targets
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.solve_metric import Metric


def rebuild_state(
    runner: Runner,
    metric: Metric,
    empty: EditState,
    records: Sequence[EditRecord],
    stored: EditState,
    write: Write,
    *,
    together: bool = False,
) -> EditState:
    """Write stored target values again, batch by batch, into a model that holds no edit.

    A row that has lost some of its edits gets a new target value, optimised for those that stay:
    the stored one would say the others too. Superseded records keep their values for a rollback,
    in rows of zeros.

    Args:
        records: the edits to write; a row is written with the latest of its edits' batches.
        stored: the state whose targets and rows the records refer to.
        together: all in one batch. Keys in upper layers are then measured with every edit in the
            layers below, where batch by batch those of early edits go stale.
    """
    state, standing = empty, [r for r in records if r.role != "superseded"]
    every = {row: [r for r in standing if r.row == row] for row in _rows(standing)}
    batch_of = {row: 0 if together else max(r.batch for r in rs) for row, rs in every.items()}
    for number in sorted(set(batch_of.values())):
        rows = [row for row in every if batch_of[row] == number]
        of_row = [every[row] for row in rows]
        groups = [
            Group(tuple(runner.renderer.edit_rows(r.edit, runner.contexts) for r in members))
            for members in of_row
        ]
        members = [member for group in groups for member in group.members]
        runner = within_budget(runner, metric, members, len(members), state.rank)
        values = stored.targets[rows].to(solving_on(runner.device))
        made_for = [{r.edit.id for r in stored.records if r.row == row} for row in rows]
        partial = [i for i, rs in enumerate(of_row) if {r.edit.id for r in rs} != made_for[i]]
        if partial:
            anew = optimise_targets(runner, [groups[i] for i in partial])
            values[partial] = anew.values.to(values)
        protected = protects(state.standing if runner.settings.history else (), state.rank)
        leaders = [group.leader for group in groups]
        solution = solve_layers(runner, metric, leaders, values, state, protected, write)
        moved = [replace(r, row=state.rank + i) for i, rs in enumerate(of_row) for r in rs]
        targets = torch.cat([state.targets, values.to(state.targets)])
        state = EditState(solution.factors, (*state.records, *moved), targets, solution.solvers)
    return _with_shadows(state, records, stored, write)


def _with_shadows(
    state: EditState, records: Sequence[EditRecord], stored: EditState, write: Write
) -> EditState:
    """Keep superseded records, as rows of zeros, while what superseded them stands."""
    asked = {record.edit.question for record in state.records}
    shadows = [r for r in records if r.role == "superseded" and r.edit.question in asked]
    rows = _rows(shadows)
    if not rows:
        return state
    factors = {}
    for layer, delta in state.factors.items():
        zeros = delta.A.new_zeros(len(rows), delta.A.shape[1])
        unchanged = delta.B.new_zeros(delta.rank + len(rows), delta.B.shape[0])
        factors[layer] = delta.extended(zeros, unchanged)
        write(layer, factors[layer])
    moved = tuple(replace(r, row=state.rank + rows.index(r.row)) for r in shadows)
    targets = torch.cat([state.targets, stored.targets[rows].to(state.targets)])
    return EditState(factors, state.records + moved, targets, state.kept)


def _rows(records: Sequence[EditRecord]) -> list[int]:
    return sorted({record.row for record in records})

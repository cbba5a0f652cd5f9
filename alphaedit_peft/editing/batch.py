"""The river: a batch of edits runs from prompts to keys to targets to factors.

In: tokenised edits, the state in place, a way to write factors into the model. Out: the new state
and a result for each edit. The caller undoes a batch that does not end: states are values, so it
writes the old one back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alphaedit_peft import parallel
from alphaedit_peft.editing.groups import Group, group_by_key
from alphaedit_peft.editing.keys import read
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.report import EditResult, outcome, score_after
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.solve_layers import SolvedLayers, Write, solve_layers
from alphaedit_peft.editing.state import EditState, protects
from alphaedit_peft.editing.targets import Targets, optimise_targets
from alphaedit_peft.metric import Metric
from alphaedit_peft.pack.record import EditRecord


def edit_batch(
    runner: Runner,
    metric: Metric,
    state: EditState,
    edits: Sequence[EditRows],
    write: Write,
    *,
    replaces: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[EditState, tuple[EditResult, ...]]:
    """Make one batch of edits.

    Args:
        runner: the model, which ``write`` changes layer by layer.
        metric: the metric of the solve.
        state: what is in place.
        edits: tokenised edits, free of contradictions.
        write: puts a layer's factors into the model.
        replaces: id of an edit here -> id of the edit in place whose place it takes, once made.
        progress: called with the number of edits whose target value is found.

    Returns:
        The new state, and one result for each edit in the given order.
    """
    timed = runner.phases.timed
    with timed("keys"):
        taken = read(runner, edits)
        reasons = _oversized(runner, edits, taken.hidden)
    places = [i for i, rows in enumerate(edits) if rows.edit.id not in reasons]
    usable = [edits[i] for i in places]
    if not usable:
        return state, _set_aside(edits, reasons)
    taken = taken.chosen(places)
    with timed("score"):
        before = runner.score([rows.rows[0] for rows in usable])
    with timed("keys"):
        replaced = _replaced(replaces, usable)
        groups = _groups(runner, metric, state, usable, replaced, taken.keys)
    with timed("targets"):
        found = _shared_targets(runner, groups, progress)
    groups, found, failed = _without_failures(groups, found)
    reasons |= failed
    if not groups:
        return state, _set_aside(edits, reasons)
    written = [rows for rows in usable if rows.edit.id not in failed]
    replaced = _replaced(replaces, written)
    leaders = [group.leader for group in groups]
    protected = _still_protected(runner, state, groups, replaced)
    taken = taken.chosen([usable.index(leader) for leader in leaders])
    solution = solve_layers(
        runner, metric, leaders, found.values, state, protected, write, taken=taken
    )
    with timed("score"):
        scores = score_after(runner, usable, before)
    parallel.require_same(repr(solution.total.tolist()), "what the batch's edits reach")
    made = outcome(runner, metric, state.rank, groups, found, solution, scores)
    results = tuple(made.get(r.edit.id) or _set_aside([r], reasons)[0] for r in edits)
    records = [
        _record(rows, made[rows.edit.id], state.next_batch)
        for rows in usable
        if rows.edit.id in made
    ]
    return _next_state(state, groups, found, solution, records, replaced), results


def _shared_targets(
    runner: Runner, groups: Sequence[Group], progress: Callable[[int], None]
) -> Targets:
    """Every group's target value; several processes optimise a share each."""

    def optimise(own: Sequence[Group]) -> Sequence[Tensor]:
        found = optimise_targets(runner, own, progress).columns
        progress(len(groups) - len(own))
        return found

    return Targets(*parallel.share(groups, optimise))


def _set_aside(edits: Sequence[EditRows], reasons: Mapping[str, str]) -> tuple[EditResult, ...]:
    return tuple(EditResult(rows.edit, reasons[rows.edit.id]) for rows in edits)


def _replaced(replaces: Mapping[str, str] | None, edits: Sequence[EditRows]) -> frozenset[str]:
    known = replaces or {}
    return frozenset(known[rows.edit.id] for rows in edits if rows.edit.id in known)


def _still_protected(
    runner: Runner, state: EditState, groups: Sequence[Group], replaced: frozenset[str]
) -> list[bool]:
    """Rows in place that keep their output: neither replaced nor taken over by a group."""
    taken = {row for group in groups for row in group.old_rows}
    kept = [r for r in state.standing if r.edit.id not in replaced and r.row not in taken]
    return protects(kept if runner.settings.history else (), state.rank)


def _oversized(runner: Runner, edits: Sequence[EditRows], hidden: Tensor) -> dict[str, str]:
    """Edits whose hidden state (of ``hidden``, (edits, d)) would wreck the solve by its size."""
    last, ratio = runner.layers[-1], runner.settings.max_hidden_ratio
    norms = hidden.norm(dim=1)
    if not norms.isfinite().all():
        first = edits[int((~norms.isfinite()).nonzero()[0])].edit
        raise ValueError(
            f"the hidden state of {first.question!r} after block {last} is not finite; the base "
            "model's weights hold NaN or infinity, or its dtype is too narrow"
        )
    if ratio == 0:
        return {}
    limit = ratio * float(norms.median())
    return {
        rows.edit.id: f"its hidden state has norm {norm:.3g}, over max_hidden_ratio={ratio:g} "
        f"times the batch's median {limit / ratio:.3g}"
        for rows, norm in zip(edits, norms.tolist(), strict=True)
        if not norm <= limit
    }


def _groups(
    runner: Runner,
    metric: Metric,
    state: EditState,
    edits: Sequence[EditRows],
    replaced: frozenset[str],
    keys: Tensor,
) -> list[Group]:
    """Edits with one key together; ``keys`` (edits, d_in) are of the first rewrite layer."""
    first = runner.layers[0]
    keys = metric.stored(first, metric.rows(first, keys))
    standing = [r for r in state.standing if r.edit.id not in replaced]
    found = group_by_key(
        [rows.prefix for rows in edits],
        keys,
        [(record.row, record.prefix) for record in standing],
        state.factors[first].A.to(keys),
        runner.settings.key_cosine,
    )
    groups = []
    for indices, old_rows in found:
        carried = [record.edit for record in standing if record.row in old_rows]
        members = [edits[i] for i in indices]
        members += [runner.renderer.edit_rows(edit, runner.contexts) for edit in carried]
        groups.append(Group(tuple(members), tuple(old_rows)))
    return groups


def _without_failures(
    groups: Sequence[Group], found: Targets
) -> tuple[list[Group], Targets, dict[str, str]]:
    """Leave out groups whose target value is not finite, with the reason for each edit."""
    good = found.values.isfinite().all(1) & found.losses.isfinite().to(found.values.device)
    failed = {
        member.edit.id: f"its target value became {float(found.losses[i])} while it was optimised; "
        "lower learning_rate"
        for i, group in enumerate(groups)
        if not good[i]
        for member in group.members
    }
    keep = good.nonzero()[:, 0].tolist()
    return [groups[i] for i in keep], Targets(*(part[keep] for part in found.columns)), failed


def _record(rows: EditRows, result: EditResult, batch: int) -> EditRecord:
    assert result.row is not None, "an edit that was made has its row"
    return EditRecord(
        rows.edit,
        row=result.row,
        batch=batch,
        prefix=rows.prefix,
        probability_before=result.probability_before,
        probability_after=result.probability_after,
    )


def _next_state(
    state: EditState,
    groups: Sequence[Group],
    found: Targets,
    solution: SolvedLayers,
    new: Sequence[EditRecord],
    replaced: frozenset[str],
) -> EditState:
    """The journal after a batch: replaced edits superseded, carried ones moved, new ones added."""
    moved = {row: state.rank + g for g, group in enumerate(groups) for row in group.old_rows}
    records, carried = [], []
    for record in state.records:
        if record.role != "superseded" and record.edit.id in replaced:
            record = replace(record, role="superseded")
        elif record.role != "superseded" and record.row in moved:
            carried.append(replace(record, row=moved[record.row]))
            record = replace(record, role="superseded")
        records.append(record)
    targets = torch.cat([state.targets, found.values.to(state.targets)])
    return EditState(solution.factors, (*records, *carried, *new), targets, solution.solvers)

"""One batch of edits: from prompts to keys, to target values, to factors, to results.

In: tokenised edits, the state in place, a way to write factors into the model. Out: the new state
and a result for each edit, with the reason where its target is not the likeliest. The caller undoes
a batch that does not end: states are values, so it writes the old one back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alphaedit_peft import log_probs, parallel
from alphaedit_peft.devices import for_solving
from alphaedit_peft.editing.edit_report import EditResult
from alphaedit_peft.editing.groups import Group, group_by_key
from alphaedit_peft.editing.keys import take_keys
from alphaedit_peft.editing.memory import by_halves
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.solve_layers import SolvedLayers, Write, solve_layers
from alphaedit_peft.editing.state import EditState, protects
from alphaedit_peft.editing.targets import Targets, optimise_targets
from alphaedit_peft.log_probs import Continuation, Score
from alphaedit_peft.messages import shown
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.settings import Settings
from alphaedit_peft.solve_metric import Metric

SAID = 0.5  # a target value works if greedy decoding says the target after this share of prompts
REACHED = 0.8  # share of z - h below which the layers, not the target value, are to blame


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
    """Make one batch of edits, free of contradictions, beside those of ``state``.

    Args:
        write: puts a layer's factors into the model.
        replaces: id of an edit here -> id of the edit in place whose place it takes, once made.
        progress: called with the number of edits whose target value is found.

    Returns:
        The new state, and one result for each edit in the given order.
    """
    timed = runner.phases.timed
    with timed("keys"):
        taken = take_keys(runner, edits)
        reasons = _oversized(runner, edits, taken.hidden)
    places = [i for i, rows in enumerate(edits) if rows.edit.id not in reasons]
    usable = [edits[i] for i in places]
    if not usable:
        return state, _results(edits, {}, reasons)
    taken = taken.chosen(places)
    with timed("score"):
        before = score(runner, [rows.rows[0] for rows in usable])
    with timed("keys"):
        replaced = _replaced(replaces, usable)
        groups = _groups(runner, metric, state, usable, replaced, taken.keys)
    with timed("targets"):
        found = _shared_targets(runner, groups, progress)
    groups, found, failed = _without_failures(groups, found)
    reasons |= failed
    if not groups:
        return state, _results(edits, {}, reasons)
    written = [rows for rows in usable if rows.edit.id not in failed]
    replaced = _replaced(replaces, written)
    leaders = [group.leader for group in groups]
    gone = {row for group in groups for row in group.old_rows}
    standing = [r for r in state.standing if r.edit.id not in replaced and r.row not in gone]
    protected = protects(standing if runner.settings.history else (), state.rank)
    taken = taken.chosen([usable.index(leader) for leader in leaders])
    solution = solve_layers(
        runner, metric, leaders, found.values, state, protected, write, taken=taken
    )
    with timed("score"):
        scores = score_after(runner, usable, before)
    parallel.require_same(repr(solution.total.tolist()), "what the batch's edits reach")
    made = outcome(runner, metric, state.rank, groups, found, solution, scores)
    new = [_record(rows, made[rows.edit.id], state.next_batch) for rows in written]
    state = _next_state(state, groups, found, solution, new, replaced)
    return state, _results(edits, made, reasons)


def score(runner: Runner, rows: Sequence[Continuation]) -> list[Score]:
    """Log-probability of each row's target, and whether greedy decoding would say it.

    Raises:
        ValueError: the model gives NaN.

    Warns:
        UserWarning: memory ran out, so that smaller passes are used.
    """

    def run(most: int) -> list[Score]:
        bounded = runner.within(most, runner.settings.target_tokens)
        return log_probs.score(runner.model, rows, bounded.batches)

    return by_halves(
        [runner.settings.tokens_per_batch],
        run,
        size=int,
        split=lambda _, most: [most],
        what="tokens",
        setting="tokens_per_batch",
        least=min(len(row.scoring_ids) for row in rows),  # each has run by itself
    )[0]


def score_after(
    runner: Runner, edits: Sequence[EditRows], before: Sequence[Score]
) -> dict[str, tuple[Score, ...]]:
    """By id of edits that are in the model now: scores before, after, and of each paraphrase."""
    after = score(runner, [rows.rows[0] for rows in edits])
    asked = [
        runner.renderer.target_row(text, rows.edit.target_new)
        for rows in edits
        for text in rows.edit.paraphrases
    ]
    said = iter(score(runner, asked) if asked else ())
    return {
        rows.edit.id: (old, new, *(next(said) for _ in rows.edit.paraphrases))
        for rows, old, new in zip(edits, before, after, strict=True)
    }


def outcome(
    runner: Runner,
    metric: Metric,
    first_row: int,
    groups: Sequence[Group],
    found: Targets,
    solution: SolvedLayers,
    scores: Mapping[str, Sequence[Score]],
) -> dict[str, EditResult]:
    """A result for each edit that ``scores`` has by id: the new ones of the groups, as solved.

    ``first_row`` is the row of ``lora_A`` that the first group got.
    """
    results, settings = {}, runner.settings
    for g, group in enumerate(groups):
        for member in group.members:
            if member.edit.id not in scores:
                continue
            before, after, *others = scores[member.edit.id]
            results[member.edit.id] = EditResult(
                member.edit,
                row=first_row + g,
                probability_before=before.probability,
                probability_after=after.probability,
                likeliest=after.greedy,
                loss=float(found.losses[g]),
                steps=int(found.steps[g]),
                clamped=float(found.clamped[g]),
                shares=dict(zip(runner.layers, solution.shares[:, g].tolist(), strict=True)),
                total_share=float(solution.total[g]),
                paraphrases=tuple(other.greedy for other in others),
                why_not="" if after.greedy else why_not(settings, metric, found, solution, g),
                beyond=member.beyond,
            )
    return results


def why_not(
    settings: Settings, metric: Metric, found: Targets, solution: SolvedLayers, group: int
) -> str:
    """Why a group's target is not the likeliest, as far as the numbers tell, and what to turn."""
    loss, steps = float(found.losses[group]), int(found.steps[group])
    said, size = float(found.said[group]), float(found.clamped[group])
    if said < SAID:
        ended = f"still had loss {loss:.2f} after {steps} steps; raise steps or learning_rate"
        if loss < settings.stop_loss:
            remedy = f"lower stop_loss (now {settings.stop_loss:g})"
            ended = f"was taken at loss {loss:.2f}, before it says the target; {remedy}"
        elif size >= 0.99 * settings.clamp_factor:
            remedy = f"raise clamp_factor (now {settings.clamp_factor:g})"
            ended = f"stopped at the clamp with loss {loss:.2f}; {remedy}"
        return f"its target value {ended}"
    share, lost = float(solution.total[group]), metric.lost(float(solution.kept[:, group].min()))
    if share < REACHED:
        also = f", and {lost}, or" if lost else ";"
        remedy = metric.advice(settings)
        if solution.guarded:
            layers = ", ".join(map(str, solution.guarded))
            remedy = (
                f"the norm guard raised the ridge of layers {layers}, so make edits with nearly "
                f"one key apart, or raise norm_guard (now {settings.norm_guard:g})"
            )
        return f"the layers reached {share:.0%} of its residual{also} {remedy}"
    return (
        f"its target value was reached ({share:.0%}), but the batch also moves the prompt's other "
        "tokens; raise ridge, rewrite other layers, or make fewer edits at once"
    )


def _oversized(runner: Runner, edits: Sequence[EditRows], hidden: Tensor) -> dict[str, str]:
    """Edits whose hidden state (of ``hidden``, (edits, d)) would wreck the solve by its size."""
    last, ratio = runner.layers[-1], runner.settings.max_hidden_ratio
    norms = hidden.norm(dim=1)
    if not norms.isfinite().all():
        first = edits[int((~norms.isfinite()).nonzero()[0])].edit
        raise ValueError(
            f"the hidden state of {shown(first.question, 100)} after block {last} is not finite; "
            "the base model's weights hold NaN or infinity, or its dtype is too narrow"
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


def _results(
    edits: Sequence[EditRows], made: Mapping[str, EditResult], reasons: Mapping[str, str]
) -> tuple[EditResult, ...]:
    """In the edits' order, those not made with their reason."""
    asked = [rows.edit for rows in edits]
    return tuple(made.get(edit.id) or EditResult(edit, reasons[edit.id]) for edit in asked)


def _replaced(replaces: Mapping[str, str] | None, edits: Sequence[EditRows]) -> frozenset[str]:
    known = replaces or {}
    return frozenset(known[rows.edit.id] for rows in edits if rows.edit.id in known)


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


def _shared_targets(
    runner: Runner, groups: Sequence[Group], progress: Callable[[int], None]
) -> Targets:
    """Every group's target value; several processes optimise a share each."""

    def optimise(own: Sequence[Group]) -> Sequence[Tensor]:
        found = optimise_targets(runner, own, progress).columns
        progress(len(groups) - len(own))
        return found

    return Targets(*map(for_solving, parallel.share(groups, optimise)))


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
        gone = record.edit.id in replaced
        if record.role != "superseded" and (gone or record.row in moved):
            carried += [] if gone else [replace(record, row=moved[record.row])]
            record = replace(record, role="superseded")
        records.append(record)
    targets = torch.cat([state.targets, found.values.to(state.targets)])
    return EditState(solution.factors, (*records, *carried, *new), targets, solution.solvers)

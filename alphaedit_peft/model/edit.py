"""Editing as methods of a model: make edits, take them back, pour them again.

In: the LoRA layers of a PEFT model, its journals, tokenizer and null space. Out: the same model
with longer or shorter factors. What is computed comes from ``editing``; here it is decided what is
written, remembered, and put back when a batch fails. :class:`~alphaedit_peft.model.AlphaEditModel`
inherits this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from alphaedit_peft import parallel
from alphaedit_peft.editing.batch import edit_batch
from alphaedit_peft.editing.decide import Decision
from alphaedit_peft.editing.groups import sort_out
from alphaedit_peft.editing.memory import within_budget
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.rebuild import repour_state
from alphaedit_peft.editing.report import EditReport, EditResult
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.editing.state import EditState, Snapshot
from alphaedit_peft.edits import Edit, as_edits
from alphaedit_peft.metric import Metric
from alphaedit_peft.model.stack import (
    BESIDE,
    Parent,
    adopt,
    new_parents,
    refuse_common,
    refuse_contradictions,
    require_active,
    without_parents,
)
from alphaedit_peft.model.workbench import WorkbenchModel
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.wording import few


class EditableModel(WorkbenchModel):
    """The editing half of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    @torch.no_grad()
    def edit(
        self,
        edits: Iterable[Edit | Mapping[str, Any]],
        batch_size: int = 100,
        *,
        into: str | None = None,
        progress: bool = True,
    ) -> EditReport:
        """Make edits, in batches; a batch that fails or is interrupted leaves no trace.

        Where several packs are active the edits go into one of them, on top of the others: their
        edits are protected as if they were in the same pack, and are its parents from then on.

        Args:
            edits: :class:`Edit` values or dicts of their fields.
            batch_size: edits solved together. About 100 is the paper's; one at a time drifts.
            into: name of the active adapter that gets the edits; needed where there are several.
            progress: whether to show a progress bar on stderr.

        Returns:
            A result for every edit, made or set aside with the reason, and figures by layer.

        Warns:
            UserWarning: the edits take more of a layer's room than ``config.capacity_bound``.

        Raises:
            ValueError: edits or statistics that cannot be used; says which and why. An edit that
                contradicts a parent's, or a parent that is missing or has changed.
            RuntimeError: the model is merged, disabled, or holds a plain LoRA; several active
                adapters and no ``into``.
        """
        given = as_edits(edits)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
        with self._on(into), self._runner() as (runner, objective):
            others, journal = self._others(), self._journal()
            new = new_parents(journal.parents, others, self._active)
            refuse_common(self.edits, new, self._active)
            refuse_contradictions(given, others, runner.settings.on_conflict)
            adopted = adopt(self._state(), new)
            standing = [record.edit for record in adopted.standing]
            plan = sort_out(given, standing, runner.settings.on_conflict)
            with runner.phases.timed("contexts"):
                rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in plan.to_make]
            runner = within_budget(runner, objective, rows, batch_size, adopted.rank)
            found = [EditResult(edit, reason) for edit, reason in plan.set_aside]
            hidden = not (progress and parallel.is_main())
            with (
                self._settled(runner, objective, rows[:batch_size]) as (objective, decided),
                tqdm(total=len(rows), desc="edits", unit="edit", disable=hidden) as bar,
            ):
                for start in range(0, len(rows), batch_size):
                    batch = rows[start : start + batch_size]
                    found += self._make(runner, objective, batch, plan.replaced, others, bar.update)
                    self._note(decided)
            found.sort(key=lambda result: given.index(result.edit))
            with runner.phases.timed("score"):
                layers, capacity = self._layer_reports(adopted.rank), self.capacity()
            report = EditReport(tuple(found), layers, decided, capacity, runner.phases.seconds)
        if report.made and report.capacity is not None and report.capacity.warning:
            warnings.warn(report.capacity.warning, stacklevel=3)  # through no_grad
        return report

    def _make(
        self,
        runner: Runner,
        objective: Metric,
        batch: Sequence[EditRows],
        replaces: Mapping[str, str],
        others: Sequence[Parent],
        progress: Callable[[int], None],
    ) -> tuple[EditResult, ...]:
        """One batch, wholly or not at all; what can take it back is remembered."""
        before, journal = self._state(), self._journal()
        new = new_parents(journal.parents, others, self._active)
        start = adopt(before, new)
        with self._all_or_nothing(before):
            state, results = edit_batch(
                runner, objective, start, batch, self._write, replaces=replaces, progress=progress
            )
            if state is not start:
                parents = (*journal.parents, *(parent.recorded() for parent in new))
                self._commit(state, runner.contexts, parents)
                self._remember(Snapshot.of(journal, before.factors))
        return results

    def _note(self, decided: Sequence[Decision]) -> None:
        """Keep what was decided for the first edits with them."""
        journal = self._journal()
        if decided and journal.rank:
            found = tuple(decision.to_json() for decision in decided)
            self._keep(replace(journal, decisions=found))

    @torch.no_grad()
    def repour(
        self,
        edit_ids: Sequence[str] | None = None,
        *,
        together: bool = False,
        adapter_name: str | None = None,
    ) -> None:
        """Pour stored target values again: key passes and solves only.

        The model then holds exactly these edits, as if the others had never been made. A target
        value is optimised again only where its row loses some of the edits that shared it. What is
        set in ``alphaedit_config`` and ``resources`` now counts: another ridge, threshold or null
        space takes effect here.

        Args:
            edit_ids: which edits; None: all that stand. Batches keep their order.
            together: all in one batch rather than batch by batch, which measures upper keys anew
                with every edit in place (see docs/tuning.md).
            adapter_name: which active adapter; needed where there are several. It is then poured on
                top of the others as they are now.

        Raises:
            ValueError: an id that is not in the adapter, a pack saved without target values, or a
                parent that is not active.
        """
        with self._on(adapter_name):
            records = list(self._journal().records)
            if edit_ids is not None:
                wanted = self._known_ids(edit_ids)
                records = [r for r in records if r.edit.id in wanted or r.role != "own"]
            self._repour(records, together=together)

    def remove_edits(self, edit_ids: Sequence[str], *, adapter_name: str | None = None) -> None:
        """Take edits out by pouring the others again, as if these had never been made.

        Args:
            edit_ids: of edits in the adapter; a parent's edits are removed from the parent.
            adapter_name: as in ``repour``.

        Raises:
            ValueError: as ``repour``.
        """
        with self._on(adapter_name):
            unwanted = self._known_ids(edit_ids)
            self.repour([e.id for e in self.edits if e.id not in unwanted])

    def rollback(self, batches: int = 1, *, adapter_name: str | None = None) -> None:
        """Take back the last batches of edits.

        Within a session the earlier factors come back bit for bit, for the last
        ``config.rollback_depth`` batches; after a load, what remains is poured again.

        Args:
            batches: how many.
            adapter_name: of which active adapter; needed where there are several.

        Raises:
            ValueError: more batches than the adapter holds.
        """
        with self._on(adapter_name):
            self._roll_back(batches)

    @torch.no_grad()
    def _roll_back(self, batches: int) -> None:
        self._require_editable()
        journal = self._journal()
        made = sorted({record.batch for record in journal.records if record.role != "protected"})
        if not isinstance(batches, int) or not 1 <= batches <= len(made):
            raise ValueError(f"batches={batches!r} cannot be taken back; the model has {len(made)}")
        self._others()  # refuses to change what an active pack stands on
        if batches > len(self._snapshots.get(self._active, ())):
            self._repour(journal.before_batch(made[-batches]))
            return
        for _ in range(batches):
            snapshot = self._snapshots[self._active].pop()
        for layer, delta in snapshot.restored(self.factors).items():
            self._write(layer, delta)
        self._keep(snapshot.journal)

    def _known_ids(self, edit_ids: Sequence[str]) -> set[str]:
        if isinstance(edit_ids, str):
            raise TypeError(f"edit_ids={edit_ids!r} is one text; pass a list of ids")
        known = {edit.id for edit in self.edits}
        unknown = sorted(set(edit_ids) - known)
        if unknown:
            raise ValueError(f"edit ids {unknown} are not in this model; it has {few(known)}")
        return set(edit_ids)

    def _repour(
        self,
        records: Sequence[EditRecord],
        stored: EditState | None = None,
        ancestors: Sequence[dict[str, Any]] = (),
        contexts: tuple[str, ...] | None = None,
        *,
        together: bool = False,
    ) -> None:
        """Pour records again, on top of the other active packs.

        Args:
            records: which.
            stored: holds their target values; None: the adapter itself.
            ancestors: packs that these come from, to be recorded.
            contexts: for an adapter that has none yet.
            together: all in one batch.
        """
        if stored is None and self._journal().targets is None and records:
            raise ValueError(
                "this pack was saved without target values, which pouring again needs; make the "
                "edits anew with edit()"
            )
        alone = stored is None and len(self.active_adapters) == 1
        anew = alone and all(record.role != "protected" for record in self._journal().records)
        with self._runner(contexts, anew=anew) as (runner, objective):
            before, parents = self._state(), self._others()
            require_active(self._journal().parents, parents, self._active)
            source = before if stored is None else stored
            to_pour, carried = without_parents(records, source.records, parents)
            if not any(record.role == "own" for record in to_pour):
                to_pour, parents = [], ()
            empty = EditState(
                {layer: delta.first(0) for layer, delta in before.factors.items()},
                (),
                before.targets[:0],
            )
            start = adopt(empty, parents, carried)
            with self._all_or_nothing(before):
                for layer, delta in start.factors.items():
                    self._write(layer, delta)
                state = repour_state(
                    runner, objective, start, to_pour, source, self._write, together=together
                )
            former = [p for p in self._journal().parents if p.get("operation") != BESIDE]
            self._snapshots.pop(self._active, None)
            recorded = (*former, *ancestors, *(parent.recorded() for parent in parents))
            self._commit(state, runner.contexts, recorded)

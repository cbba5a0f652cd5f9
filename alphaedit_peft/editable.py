"""Editing as methods of a model: make edits, take them back, pour them again.

In: the LoRA layers of a PEFT model, its journals, tokenizer and null space. Out: the same model
with longer or shorter factors. What is computed comes from ``editing``; here it is decided what is
written, remembered, and put back when a batch fails. :class:`~alphaedit_peft.model.AlphaEditModel`
inherits this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from alphaedit_peft import hooks
from alphaedit_peft.adapter import AdapterModel
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.contexts import sample_contexts
from alphaedit_peft.editing.groups import sort_out
from alphaedit_peft.editing.journal import Snapshot
from alphaedit_peft.editing.objective import Objective
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.report import EditReport, EditResult, LayerReport, layer_report
from alphaedit_peft.editing.repour import repour_state
from alphaedit_peft.editing.river import edit_batch
from alphaedit_peft.editing.state import EditState
from alphaedit_peft.edits import Edit, as_edits
from alphaedit_peft.pack import EditRecord


class EditableModel(AdapterModel):
    """The editing half of :class:`~alphaedit_peft.model.AlphaEditModel`."""

    @torch.no_grad()
    def edit(
        self,
        edits: Iterable[Edit | Mapping[str, Any]],
        batch_size: int = 100,
        *,
        progress: bool = True,
    ) -> EditReport:
        """Make edits, in batches; a batch that fails or is interrupted leaves no trace.

        Args:
            edits: :class:`Edit` values or dicts of their fields.
            batch_size: edits solved together. About 100 is the paper's; one at a time drifts.
            progress: whether to show a progress bar on stderr.

        Returns:
            A result for every edit, made or set aside with the reason, and figures by layer.

        Raises:
            ValueError: edits or statistics that cannot be used; says which and why.
            RuntimeError: the model is merged, disabled, or holds a plain LoRA.
        """
        given = as_edits(edits)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
        with self._bench() as (bench, objective):
            standing = [record.edit for record in self._journal().standing]
            plan = sort_out(given, standing, bench.config.on_conflict)
            rows = [bench.renderer.edit_rows(edit, bench.contexts) for edit in plan.to_make]
            found = [EditResult(edit, reason) for edit, reason in plan.set_aside]
            rank_before = self._journal().rank
            with tqdm(total=len(rows), desc="edits", unit="edit", disable=not progress) as bar:
                for start in range(0, len(rows), batch_size):
                    batch = rows[start : start + batch_size]
                    found += self._make(bench, objective, batch, plan.replaced, bar.update)
        found.sort(key=lambda result: given.index(result.edit))
        return EditReport(tuple(found), self._layer_reports(rank_before))

    def _make(
        self,
        bench: Bench,
        objective: Objective,
        batch: Sequence[EditRows],
        replaces: Mapping[str, str],
        progress: Callable[[int], None],
    ) -> tuple[EditResult, ...]:
        """One batch, wholly or not at all; what can take it back is remembered."""
        before, journal = self._state(), self._journal()
        with self._all_or_nothing(before):
            state, results = edit_batch(
                bench, objective, before, batch, self._write, replaces=replaces, progress=progress
            )
            if state is not before:
                self._commit(state, bench.contexts)
                self._remember(Snapshot.of(journal, before.factors))
        return results

    @torch.no_grad()
    def repour(self, edit_ids: Sequence[str] | None = None) -> None:
        """Pour stored target values again: key passes and solves only.

        The model then holds exactly these edits, as if the others had never been made. A target
        value is optimised again only where its row loses some of the edits that shared it.

        Args:
            edit_ids: which edits; None: all that stand. Batches keep their order.

        Raises:
            ValueError: an id that is not in the model, or a pack saved without target values.
        """
        records = list(self._journal().records)
        if edit_ids is not None:
            wanted = self._known_ids(edit_ids)
            records = [r for r in records if r.edit.id in wanted or r.role != "own"]
        self._repour(records)

    def remove_edits(self, edit_ids: Sequence[str]) -> None:
        """Take edits out by pouring the others again, as if these had never been made.

        Raises:
            ValueError: an id that is not in the model, or a pack saved without target values.
        """
        unwanted = self._known_ids(edit_ids)
        self.repour([edit.id for edit in self.edits if edit.id not in unwanted])

    @torch.no_grad()
    def rollback(self, batches: int = 1) -> None:
        """Take back the last batches of edits.

        Within a session the earlier factors come back bit for bit, for the last
        ``config.rollback_depth`` batches; after a load, what remains is poured again.

        Raises:
            ValueError: more batches than the model holds.
        """
        self._require_editable()
        journal = self._journal()
        made = sorted({record.batch for record in journal.records if record.role != "protected"})
        if not isinstance(batches, int) or not 1 <= batches <= len(made):
            raise ValueError(f"batches={batches!r} cannot be taken back; the model has {len(made)}")
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
            raise ValueError(f"edit ids {unknown} are not in this model; it has {sorted(known)}")
        return set(edit_ids)

    @contextmanager
    def _bench(self) -> Iterator[tuple[Bench, Objective]]:
        """What the river works with, in evaluation mode; contexts are sampled at the first use."""
        self._require_editable()
        base, config = self.get_base_model(), self.alphaedit_config
        tokenizer = self.resources.find_tokenizer(base)
        objective = self.resources.find_objective(config, self.base_fingerprint)
        self._require_same_null_space()
        with hooks.evaluating(base):
            contexts = self._journal().contexts
            if contexts is None:
                with self.disable_adapter():
                    contexts = sample_contexts(base, tokenizer, config)
            yield Bench(base, tokenizer, config, self.architecture, contexts), objective

    def _require_same_null_space(self) -> None:
        journal, given = self._journal(), self.resources.provenance()
        if journal.rank == 0 or journal.null_space is None or given is None:
            return
        if journal.null_space["digest"] != given["digest"]:
            raise ValueError(
                f"these edits were made with null space {journal.null_space}, and {given} was "
                "given; rows of two projectors do not go together: pass the first, or make the "
                "edits anew"
            )

    def _repour(self, records: Sequence[EditRecord]) -> None:
        targets = self._journal().targets
        if targets is None and records:
            raise ValueError(
                "this pack was saved without target values, which pouring again needs; make the "
                "edits anew with edit()"
            )
        with self._bench() as (bench, objective):
            before = self._state()
            empty = EditState(
                {layer: delta.first(0) for layer, delta in before.factors.items()},
                (),
                before.targets[:0],
            )
            with self._all_or_nothing(before):
                for layer, delta in empty.factors.items():
                    self._write(layer, delta)
                state = repour_state(bench, objective, empty, records, before, self._write)
            self._snapshots.pop(self._active, None)
            self._commit(state, bench.contexts)

    def _layer_reports(self, rank_before: int) -> tuple[LayerReport, ...]:
        null_space = self.resources.null_space
        if self.alphaedit_config.objective != "alphaedit":
            null_space = None  # its rows are not projected keys
        reports = []
        for layer, delta in self.factors.items():
            weight = self._lora_layer(layer).get_base_layer().weight
            norm = float(weight.float().norm()) if weight.is_floating_point() else None
            new = delta.rank - rank_before
            reports.append(layer_report(layer, delta, new, norm, null_space))
        return tuple(reports)

"""Batches of prompts that are run as far as the subject, and how far they have run.

In: a bench, tokenised edits. Out: :class:`Parts`: the bare prompts, those behind contexts, and what
several of these have in common in front. Rows are cut after the subject, since keys are causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft.editing.bench import Bench, at_least_float32
from alphaedit_peft.editing.prefixes import cut_rows
from alphaedit_peft.editing.prompts import EditRows, TokenRow
from alphaedit_peft.tokens import padded


@dataclass(frozen=True)
class Part:
    """A padded batch of rows and how far it has run: up to the front of ``block``.

    ``rows`` are pairs of an edit and which of its prompts it is, ``subjects`` (rows,) the positions
    that are read. ``behind`` says which shared prefix each row goes on from: of all rows or none.
    ``states`` (rows, tokens, d) is None in front of block 0; ``form`` is what the block below puts
    out, in its family's own form.
    """

    rows: tuple[tuple[int, int], ...]
    subjects: Tensor
    inputs: Mapping[str, Tensor]
    behind: tuple[int, ...] = ()
    block: int = 0
    states: Tensor | None = None
    form: Any = None

    def chosen(self, place: Mapping[int, int]) -> Part:
        """The rows of some edits, under their new numbers."""
        some = [k for k, (edit, _) in enumerate(self.rows) if edit in place]
        part = self._rows(some)
        return replace(part, rows=tuple((place[edit], prompt) for edit, prompt in part.rows))

    def halves(self) -> list[Part]:
        """The first half of the rows, and the others."""
        every, middle = list(range(len(self.rows))), len(self.rows) // 2
        return [self._rows(some) for some in (every[:middle], every[middle:])]

    def _rows(self, some: Sequence[int]) -> Part:
        return replace(
            self,
            rows=tuple(self.rows[k] for k in some),
            subjects=self.subjects[some],
            inputs={name: value[some] for name, value in self.inputs.items()},
            behind=tuple(self.behind[k] for k in some if self.behind),
            states=None if self.states is None else self.states[some],
        )

    def at_subject(self, values: Tensor) -> Tensor:
        """Values (rows, tokens, k) or (rows x tokens, k) at each row's subject, (rows, k)."""
        if values.ndim == 2:  # OPT's blocks flatten batch and tokens before their MLP
            values = values.unflatten(0, self.inputs["input_ids"].shape)
        rows = torch.arange(len(self.rows), device=values.device)
        return at_least_float32(values[rows, self.subjects.to(values.device)])


@dataclass(frozen=True)
class Parts:
    """Batches of edits' prompts.

    ``bare``: the bare prompts; ``others``: those behind contexts; ``shared``: leading tokens that
    some of ``others`` go on from, at most one batch.
    """

    bare: tuple[Part, ...]
    others: tuple[Part, ...] = ()
    shared: tuple[Part, ...] = ()

    def chosen(self, edits: Sequence[int]) -> Parts:
        """The same of some of the edits, under their new numbers."""
        place = {edit: k for k, edit in enumerate(edits)}
        bare, others = (
            tuple(part.chosen(place) for part in parts if any(e in place for e, _ in part.rows))
            for parts in (self.bare, self.others)
        )
        return Parts(bare, others, self.shared)


def parts_of(bench: Bench, edits: Sequence[EditRows]) -> Parts:
    """Batches of the bare prompts and of those behind contexts, in front of the first block."""
    bare = [((e, 0), edit.rows[0].key_row) for e, edit in enumerate(edits)]
    others = [
        ((e, j), row.key_row) for e, edit in enumerate(edits) for j, row in enumerate(edit.rows[1:])
    ]
    rows = [row for _, row in others]
    cut = cut_rows(bench, [row.ids for row in rows], [row.subject_last for row in rows])
    behind: list[Part] = []
    for side in cut.sides():
        some = [others[i] for i in side]
        prefixes = [prefix for i in side if (prefix := cut.behind[i]) is not None]
        behind += _batched(bench, some, [cut.starts[i] for i in side], prefixes)
    alone = _batched(bench, bare, [0] * len(bare), ())
    return Parts(alone, tuple(behind), _shared(bench, cut.prefixes))


def _batched(
    bench: Bench,
    rows: Sequence[tuple[tuple[int, int], TokenRow]],
    starts: Sequence[int],
    behind: Sequence[int],
) -> tuple[Part, ...]:
    """Named rows from ``starts`` on; ``behind`` tells each row's prefix, and is empty for none."""
    return tuple(
        Part(
            tuple(rows[i][0] for i in batch.indices),
            torch.tensor([rows[i][1].subject_last - starts[i] for i in batch.indices]),
            batch.inputs,
            tuple(behind[i] for i in batch.indices if behind),
        )
        for batch in bench.batches(
            [row.ids[start:] for (_, row), start in zip(rows, starts, strict=True)], starts
        )
    )


def _shared(bench: Bench, prefixes: Sequence[Sequence[int]]) -> tuple[Part, ...]:
    """The prefixes as one batch, where there are any."""
    if not prefixes:
        return ()
    last = torch.tensor([len(prefix) - 1 for prefix in prefixes])
    names = tuple((number, 0) for number in range(len(prefixes)))
    return (Part(names, last, padded(prefixes, bench.device)),)
